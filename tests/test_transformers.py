"""What transformers' users expect of every model: hidden states, Trainer, the feature pipeline, lenient files."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments, pipeline
from variants import VARIANTS, make, pixels, smooth_image

import hf_ae

ALL = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture
def folder(tmp_path):
    def save(name):
        model = make(name).eval()
        model.save_pretrained(tmp_path / name)
        hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return save


# Outputs


@ALL
def test_hidden_states_are_what_the_encoder_computes_on_the_way_to_the_bottleneck(name):
    model = make(name).eval()
    x = pixels(model)
    encoded, output = model.encode(x, output_hidden_states=True), model(x, output_hidden_states=True)
    seen = []
    handle = model.encoder.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    assert model.encode(x).hidden_states is None and model(x).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(x).hidden_states) == len(output.hidden_states) > 0
    handle.remove()
    for a, b in zip(encoded.hidden_states, output.hidden_states, strict=True):
        assert len(a) == len(x)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(output.hidden_states[-1], seen[0], rtol=0, atol=0)
    model.train()
    trained = model(x)
    for state in trained.hidden_states:
        state.retain_grad()
    trained.loss.backward()
    assert all(state.grad is not None for state in trained.hidden_states)
    assert trained.hidden_states[-1].grad.abs().sum() > 0


@ALL
def test_tuples_are_the_outputs_with_the_reconstruction_first(name):
    model = make(name).eval()
    x = pixels(model)
    output, as_tuple = model(x, output_hidden_states=True), model(x, return_dict=False, output_hidden_states=True)
    assert as_tuple[0].equal(output.reconstruction) and output.sample is output.reconstruction
    assert len(as_tuple) == len(output.to_tuple()) == len(output)
    assert output.pooler_output.shape == (len(x), output.latents.shape[1])
    assert output.pooler_output.allclose(
        output.latents.flatten(2).mean(2) if output.latents.ndim > 2 else output.latents
    )
    model.config.return_dict = False
    assert isinstance(model(x), tuple) and isinstance(model.encode(x), tuple)
    assert isinstance(model.decode(output.latents), tuple)


@ALL
def test_without_a_loss_the_rest_is_the_same(name):
    model = make(name).eval()
    x = pixels(model)
    output, without = model(x), model(x, return_loss=False)
    assert without.loss is None and without.losses is None and without.measures is None
    assert without.reconstruction.equal(output.reconstruction) and without.latents.equal(output.latents)


@ALL
def test_pixels_that_no_image_processor_made_are_refused(name):
    model = make(name)
    x = pixels(model)
    for wrong in ((x * 255).to(torch.uint8), x.long(), x.abs() * 255):
        with pytest.raises(ValueError, match="the image processor makes them"):
            model(wrong)
        with pytest.raises(ValueError, match="the image processor makes them"):
            model.encode(wrong)


def test_a_misspelt_argument_is_refused_and_labels_are_left_alone():
    for name in ("autoencoder-mlp", "vae-mlp", "denoising", "compressive"):
        model = make(name).eval()
        x = pixels(model)
        assert model(x, labels=torch.zeros(4)).loss.equal(model(x).loss)
        with pytest.raises(TypeError, match="output_hiden_states"):
            model(x, output_hiden_states=True)


# Configurations


@ALL
def test_a_file_may_hold_fields_that_are_unknown_here_and_a_user_may_not(name, folder):
    path, model = folder(name)
    content = json.loads((path / "config.json").read_text())
    foreign = {"tie_word_embeddings": False, "written_by_a_later_version": [1, 2], "use_cache": True, "top_k": 50}
    (path / "config.json").write_text(json.dumps({**content, **foreign}))
    config = AutoConfig.from_pretrained(path)
    assert config.written_by_a_later_version == [1, 2]
    again = AutoModel.from_pretrained(path)
    again.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["written_by_a_later_version"] == [1, 2]
    x = pixels(model)
    assert AutoModel.from_pretrained(path).eval()(x).latents.equal(model(x).latents)
    with pytest.raises(ValueError, match="has no field 'written_by_a_later_version'"):
        type(config)(written_by_a_later_version=1)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith(("vq", "compressive"))])
def test_what_stays_in_float32_is_there(name):
    model = make(name)
    names = {part for key in model.state_dict() for part in key.split(".")}
    assert set(model._keep_in_fp32_modules_strict or ()) <= names


# Loading


@ALL
def test_dtype_and_device_map(name, folder):
    path, model = folder(name)
    x = pixels(model)
    mapped = AutoModel.from_pretrained(path, device_map="cpu").eval()
    assert mapped(x).latents.equal(model(x).latents)
    half = AutoModel.from_pretrained(path, dtype="bfloat16", device_map="auto").eval()
    assert half.dtype == torch.bfloat16 and half.encode(x).latents.isfinite().all()


@ALL
def test_encode_and_decode_compile_to_one_graph(name):
    model = make(name).eval()
    x = pixels(model)
    torch._dynamo.reset()
    encode = torch.compile(lambda x: model.encode(x).latents, backend="aot_eager", fullgraph=True)
    decode = torch.compile(lambda z: model.decode(z).sample, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        latents = model.encode(x).latents
        torch.testing.assert_close(encode(x), latents)
        torch.testing.assert_close(decode(latents), model.decode(latents).sample)


# Pipelines


@pytest.mark.parametrize("name", ["autoencoder-mlp", "autoencoder-unpool", "vae-resnet", "compressive", "vqvae2"])
def test_the_feature_pipeline_gives_latents_in_batches_too(name, folder):
    path, model = folder(name)
    images = [smooth_image(30, 30, "RGB" if model.config.num_channels == 3 else "L", seed) for seed in range(3)]
    extract = pipeline("image-feature-extraction", model=str(path), device="cpu")
    values = hf_ae.AutoencoderImageProcessor.from_config(model.config)(images).pixel_values
    with torch.no_grad():
        latents = model.encode(values).latents
    for features in (extract(images), extract(images, batch_size=2)):
        np.testing.assert_allclose(np.concatenate(features), latents, rtol=1e-4, atol=1e-5)
    pooled = extract(images, batch_size=3, pool=True)
    np.testing.assert_allclose(np.concatenate(pooled), model(values).pooler_output.detach(), rtol=1e-4, atol=1e-5)


def test_the_feature_pipeline_asks_nothing_and_other_models_keep_theirs(folder, tmp_path):
    path, _ = folder("autoencoder-mlp")
    Image.new("L", (28, 28), 99).save(tmp_path / "gray.png")
    code = """
import sys, builtins
builtins.input = lambda *question: sys.exit(f"asked: {question}")
import hf_ae, torch
from transformers import ViTConfig, ViTImageProcessor, ViTModel, pipeline
print(len(pipeline("image-feature-extraction", model=sys.argv[1], device="cpu")(sys.argv[2])[0]))
torch.manual_seed(0)
config = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **config))
processor = ViTImageProcessor(size={"height": 16, "width": 16})
other = pipeline("image-feature-extraction", model=vit, image_processor=processor, device="cpu")
print(torch.tensor(other(sys.argv[2])).shape)
"""
    printed = run_python(code, path, tmp_path / "gray.png").splitlines()
    assert printed[-2:] == ["5", "torch.Size([1, 5, 8])"]


# Trainer


class Rows(torch.utils.data.Dataset):
    """Images with labels, as a dataset of the Hub has them."""

    def __init__(self, model):
        self.values = pixels(model, 32)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return {"pixel_values": self.values[i], "label": i % 3}


@pytest.mark.parametrize("name", ["autoencoder-mlp", "denoising", "vae-mlp", "vaegan-mlp", "compressive", "vqvae2"])
def test_trainer_trains_evaluates_and_keeps_the_best(name, tmp_path):
    model = make(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=8, max_steps=8, eval_strategy="steps", eval_steps=4, save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", report_to="none", disable_tqdm=True,
        use_cpu=True, learning_rate=1e-3, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(model), eval_dataset=Rows(model))
    trainer.train()
    assert trainer.state.best_metric is not None and math.isfinite(trainer.evaluate()["eval_loss"])
    assert any(not value.equal(before[key]) for key, value in model.named_parameters())
    trainer.save_model(tmp_path / "final")
    again = AutoModel.from_pretrained(tmp_path / "final").eval()
    x = pixels(model)
    assert again(x).latents.equal(model.eval()(x).latents)


def test_trainer_predicts_latents_and_reconstructions(tmp_path):
    model = make("vqvae-ema")
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=8, report_to="none", use_cpu=True)
    latents, reconstruction = Trainer(model, arguments).predict(Rows(model)).predictions
    x = Rows(model).values
    np.testing.assert_allclose(latents, model.eval()(x).latents.detach(), rtol=1e-4, atol=1e-5)
    assert reconstruction.shape == tuple(x.shape)


# In the place of diffusers' AutoencoderKL


def test_a_training_loop_for_autoencoder_kl_runs_on_ours():
    vae = make("vae-resnet").train()
    x = pixels(vae)
    sample = vae(x, return_dict=False)[0]
    assert sample.shape == x.shape and vae(sample=x).sample.shape == x.shape
    mode = vae(x, sample_posterior=False).sample
    torch.testing.assert_close(mode, vae.decode(vae.encode(x).latent_dist.mode()).sample)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    drawn = vae(x, sample_posterior=True, generator=generators).latents
    posterior = vae.encode(x, return_dict=False)[0]
    for i in range(len(x)):
        alone = vae.encode(x[i : i + 1]).latent_dist.sample(torch.Generator().manual_seed(i))
        torch.testing.assert_close(drawn[i : i + 1], alone)
    with pytest.raises(ValueError, match="3 generators for 4 images"):
        posterior.sample(generators[:3])
    assert vae.decode(drawn, generator=generators).sample.shape == x.shape
    config = vae.config
    assert (config.in_channels, config.out_channels, config.sample_size) == (3, 3, [16, 24])
    assert config.shift_factor == 0.0 and config.block_out_channels == [8, 8, 16]


def test_the_posterior_computes_what_that_of_diffusers_does():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    ours = make("vae-resnet").encode(pixels(make("vae-resnet"))).latent_dist
    other = make("vae-resnet").encode(pixels(make("vae-resnet"), seed=7)).latent_dist
    theirs, their_other = (DiagonalGaussianDistribution(torch.cat([q.mean, q.logvar], 1)) for q in (ours, other))
    z = torch.randn(ours.mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.nll(z), theirs.nll(z))
    torch.testing.assert_close(ours.nll(z, dims=[1]), theirs.nll(z, dims=[1]))
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.kl(other), theirs.kl(their_other))
    torch.testing.assert_close(ours.var, theirs.var)
