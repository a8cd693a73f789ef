"""Training text-to-image pipelines: what is learned, exact resume, other autoencoders and text models, bad input.

Of two processes: test_processes.py.
"""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from command_line import fails
from diffusers import DDIMScheduler, UNet2DConditionModel
from rank_program import TEXT, UNET
from safetensors.torch import load_file
from tiny_pipelines import autoencoder_kl
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

import hf_ae
from hf_ae.diffusion.captions import Captions, cached_latents
from hf_ae.diffusion.denoiser import LatentDiffusion, make_unet
from hf_ae.diffusion.text_encoders import new_text_encoder, text_states, tokenize
from hf_ae.loading import image_processor_for
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train_latent_diffusion import LatentDiffusionArguments, main, train
from hf_ae.training.arguments import parse_overrides

EMOJI = Path(__file__).parent / "data" / "noto_emoji_sample"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a small untrained VAE with spatial latents."""
    torch.manual_seed(0)
    fields = dict(network="resnet", image_size=32, num_channels=3, patch_size=4, hidden_sizes=[16, 16])
    folder = tmp_path_factory.mktemp("vae")
    config = hf_ae.VAEConfig(**fields, latent_channels=4, pixel_range=[-1.0, 1.0])
    hf_ae.VAEModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(vae, tmp_path):
    def make(**values):
        defaults = dict(
            dataset_name=str(EMOJI), output_dir=str(tmp_path / "run"), vae=str(vae), unet_overrides=UNET,
            text_encoder=TEXT, caption_columns="text,keywords", max_text_length=12, train_batch_size=8,
            max_train_steps=4, validation_epochs=0, num_inference_steps=2,
        )  # fmt: skip
        return LatentDiffusionArguments(**{**defaults, **values})

    return make


@pytest.fixture
def text_folder(tmp_path):
    """The folder of a small text encoder, whose matrices hold what float8 holds."""
    rows = datasets.load_dataset(str(EMOJI))["train"]
    texts = [*rows["text"], *(word for words in rows["keywords"] for word in words)]
    tokenizer, text_encoder = new_text_encoder(texts, parse_overrides(TEXT), 12, seed=0)
    for parameter in text_encoder.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    text_encoder.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    return tmp_path / "text"


def weights(folder) -> dict:
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def text_weights(folder) -> dict:
    return load_file(Path(folder) / "text_encoder" / "model.safetensors")


def test_the_result_is_a_pipeline_that_draws(arguments, tmp_path):
    train(arguments(use_ema=True, validation_epochs=1, max_train_steps=7))
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run")
    assert pipe("a red heart", seed=1).images[0].size == (32, 32)
    assert pipe.vae.config.scaling_factor != 1.0
    assert (tmp_path / "run" / "samples" / "step-0000007.png").is_file()
    assert not list((tmp_path / "run").rglob("*.bin")) and not list((tmp_path / "run").rglob("*.pt"))


def test_resumed_gives_bitwise_the_weights_of_an_uninterrupted_run(arguments, tmp_path):
    """With a jointly trained text encoder, an average and Muon: all of them must come back."""
    flags = dict(use_ema=True, optimizer="muon", checkpointing_steps=2, seed=3, lr_scheduler="constant")
    train(arguments(output_dir=str(tmp_path / "whole"), max_train_steps=6, **flags))
    train(arguments(output_dir=str(tmp_path / "cut"), max_train_steps=4, **flags))
    os.rename(tmp_path / "cut" / "checkpoint-4", tmp_path / "checkpoint-4")
    resume = dict(output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    train(arguments(max_train_steps=6, **flags, **resume))
    for read in (weights, text_weights):
        cut, resumed, whole = (read(tmp_path / name) for name in ("cut", "resumed", "whole"))
        assert all(torch.equal(resumed[k], whole[k]) for k in whole)
        assert any(not torch.equal(resumed[k], cut[k]) for k in whole)


def test_a_run_is_resumed_in_another_process(arguments, vae, tmp_path):
    train(arguments(max_train_steps=3, checkpointing_steps=2, lr_scheduler="constant"))
    whole = weights(tmp_path / "run")
    flags = [f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}", f"--output_dir={tmp_path / 'resumed'}"]
    command = [sys.executable, "-m", "hf_ae.train_latent_diffusion", str(tmp_path / "run" / "recipe.yaml"), *flags]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from checkpoint-2" in done.stdout
    for name, weight in weights(tmp_path / "resumed").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-6)


def test_a_given_text_encoder_stays_frozen_and_a_new_one_is_trained(arguments, text_folder, tmp_path):
    train(arguments(text_encoder=str(text_folder), output_dir=str(tmp_path / "frozen")))
    given, frozen = load_file(text_folder / "model.safetensors"), text_weights(tmp_path / "frozen")
    assert all(torch.equal(given[k], frozen[k].float()) for k in given)
    for steps in (1, 3):
        train(arguments(output_dir=str(tmp_path / str(steps)), max_train_steps=steps))
    first, later = (text_weights(tmp_path / name) for name in ("1", "3"))
    assert set(first) == set(given) and any(not torch.equal(first[k], later[k]) for k in first)


@pytest.mark.parametrize("trained", [False, True])
def test_with_a_prior_a_prompt_is_drawn_as_the_caption_its_texts_lead_to(arguments, text_folder, tmp_path, trained):
    """The score of a caption: cosines with itself, with the nearest text of its images, and with the mean of those."""
    rows = datasets.load_dataset(str(EMOJI))["train"]
    names, words = rows["text"], rows["keywords"]
    text_encoder = {} if trained else {"text_encoder": str(text_folder)}
    train(arguments(**text_encoder, caption_prior=True, max_train_steps=2))
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run")
    assert pipe.prior.config.captions == list(dict.fromkeys(names))

    @torch.no_grad()
    def vectors(texts):
        tokens = tokenize(pipe.tokenizer, list(texts), "cpu")
        states, mask = pipe.text_encoder(**tokens)[0], tokens["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1), dim=1)

    leads = {name: {name} for name in names}
    for name, row in zip(names, words):
        leads[name].update(row)
    prompts = sorted({word for row in words for word in row})[:30] + names[:8] + ["a red rocket"]
    asked, scores = vectors(prompts), []
    for name, texts in leads.items():
        own, found = vectors([name]), vectors(sorted(texts))
        nearest, mean = (asked @ found.T).amax(1), F.normalize(found.mean(0), dim=0)
        scores.append((asked @ own.T)[:, 0] + nearest + asked @ mean)
    expected = [list(leads)[i] for i in torch.stack(scores).argmax(0).tolist()]
    assert pipe(prompts, seed=0, num_inference_steps=1).captions == expected
    assert expected[30:38] == names[:8] and len(set(expected[:30])) > 10


def test_matrices_that_float8_holds_take_a_byte_a_value(arguments, text_folder, tmp_path):
    train(arguments(text_encoder=str(text_folder), save_dtype="float16", max_train_steps=1))
    stored = text_weights(tmp_path / "run")
    expected = {k: torch.float8_e4m3fn if weight.ndim == 2 else torch.float16 for k, weight in stored.items()}
    assert {k: weight.dtype for k, weight in stored.items()} == expected
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "run").text_encoder.state_dict()
    assert all(torch.equal(loaded[name].float(), weight.float()) for name, weight in stored.items())
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float16}


def test_the_loss_is_zero_for_the_right_prediction_and_min_snr_limits_the_weight():
    """v = √ᾱ·ε − √(1−ᾱ)·x: a network that knows the noise and the latents has no error, whatever the time step."""
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True
    )
    latents = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    class Knowing(torch.nn.Module):
        config: dict = {}

        def forward(self, noisy, times, text, return_dict):
            kept = scheduler.alphas_cumprod[times][:, None, None, None]
            noise = (noisy - kept.sqrt() * latents) / (1 - kept).sqrt().clamp(min=1e-4)
            return (kept.sqrt() * noise - (1 - kept).sqrt() * latents,)

    model = LatentDiffusion(Knowing(), scheduler, snr_gamma=5.0)
    assert model(latents, text=torch.zeros(16, 1, 1)).loss < 1e-4
    snr = torch.tensor([0.1, 5.0, 50.0])
    kept = snr / (1 + snr)
    assert torch.allclose(model.weight(kept), torch.tensor([1.0, 5 / 6, 5 / 51]), rtol=1e-3)
    assert scheduler.alphas_cumprod[-1] < 1e-6  # the first step of sampling: pure noise
    assert model.weight(scheduler.alphas_cumprod[-1:]) == 1.0
    epsilon = LatentDiffusion(Knowing(), DDIMScheduler(prediction_type="epsilon"), snr_gamma=5.0)
    assert torch.allclose(epsilon.weight(kept), torch.tensor([1.0, 1.0, 0.1]), rtol=1e-3)


def test_time_steps_cover_their_range_evenly():
    seen = []

    class Watching(torch.nn.Module):
        config: dict = {}

        def forward(self, noisy, times, text, return_dict):
            seen.append(times)
            return (noisy,)

    LatentDiffusion(Watching(), DDIMScheduler())(torch.zeros(10, 1, 2, 2), text=torch.zeros(10, 1, 1))
    assert (seen[0] // 100).tolist() == list(range(10))


def test_captions_are_drawn_from_columns_then_from_lists_and_dropped_as_often_as_asked():
    rows = datasets.Dataset.from_dict({"text": ["heart", ""], "keywords": [["love", "red", "valentine"], ["sea"]]})
    captions = Captions(rows, ["text", "keywords"])
    generator = random.Random(0)
    drawn = captions.draw(torch.zeros(4000, dtype=torch.long), 0.1, generator).tolist()
    fractions = {text: drawn.count(index) / 4000 for index, text in enumerate(captions.texts)}
    assert math.isclose(fractions[""], 0.1, abs_tol=0.02) and math.isclose(fractions["heart"], 0.45, abs_tol=0.03)
    assert math.isclose(fractions["red"], 0.15, abs_tol=0.03) and fractions["sea"] == 0
    assert {captions.texts[n] for n in captions.draw(torch.ones(50, dtype=torch.long), 0.0, generator).tolist()} == {
        "sea"
    }


def test_the_first_column_keeps_the_images_and_drops_other_texts():
    rows = datasets.Dataset.from_dict(
        {"text": ["cat", "dog", ""], "keywords": [["pet", "cat"], ["pet", "wolf"], ["zebra"]]}
    )
    first = Captions(rows, ["keywords", "text"]).first_column()
    assert first.texts == ["", "pet", "cat", "wolf", "zebra"] and len(first) == 3
    assert [[first.texts[n] for n in column] for (column,) in first.choices] == [
        ["pet", "cat"],
        ["pet", "wolf"],
        ["zebra"],
    ]
    assert Captions(rows, ["text", "keywords"]).first_column().texts == ["", "cat", "dog", "zebra"]


def test_the_latent_cache_goes_on_where_it_was_cut_off(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ae.diffusion.captions.SHARD", 10)
    dataset = datasets.load_dataset(str(EMOJI))["train"]
    model = hf_ae.VAEModel.from_pretrained(vae).eval()
    arguments = (model, dataset, "image", image_processor_for(model), tmp_path, Accelerator(cpu=True))
    whole = cached_latents(*arguments)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 5 and whole.shape == (48, 4, 4, 4)
    files[2].unlink()
    kept = files[0].stat().st_mtime_ns
    assert torch.equal(cached_latents(*arguments), whole)
    assert files[0].stat().st_mtime_ns == kept
    with torch.no_grad():
        model.encoder.stem.weight.mul_(1.1)  # other weights, other latents
    assert not torch.allclose(cached_latents(*arguments), whole)


def test_a_diffusers_vae_and_a_clip_text_encoder_work_too(arguments, tmp_path):
    torch.manual_seed(0)
    autoencoder_kl().save_pretrained(tmp_path / "kl")
    tokenizer, _ = new_text_encoder(["red heart", "fire"] * 3, {}, 12, seed=0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=12, **sizes)
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    parts = dict(vae=str(tmp_path / "kl"), text_encoder=str(tmp_path / "clip"), image_size=16)
    train(arguments(**parts, prediction_type="epsilon", snr_gamma=5.0))
    assert TextToImagePipeline.from_pretrained(tmp_path / "run")("fire", seed=0).images[0].size == (16, 16)


def test_a_pipeline_is_fine_tuned(arguments, tmp_path):
    """Its text encoder, vae and noise stay; its denoiser moves on from where it was."""
    train(arguments(output_dir=str(tmp_path / "first"), prediction_type="epsilon"))
    again = dict(vae=None, unet_overrides=None, text_encoder=None, learning_rate=0.0)
    again |= dict(pretrained_pipeline=str(tmp_path / "first"))
    train(arguments(output_dir=str(tmp_path / "still"), **again))
    train(arguments(output_dir=str(tmp_path / "moved"), **{**again, "learning_rate": 1e-4}))
    first, still, moved = (weights(tmp_path / name) for name in ("first", "still", "moved"))
    assert all(torch.equal(first[k], still[k]) for k in first)
    text = [text_weights(tmp_path / name) for name in ("first", "moved")]
    assert all(torch.equal(text[0][k], text[1][k]) for k in text[0])
    change = [(moved[k] - first[k]).abs().max() for k in first]
    assert 0 < max(change) < 1e-2
    assert TextToImagePipeline.from_pretrained(tmp_path / "moved").scheduler.config.prediction_type == "epsilon"


def test_a_finished_pipeline_is_kept_unless_it_may_be_replaced(arguments, tmp_path):
    train(arguments())
    (tmp_path / "run" / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="holds an earlier run"):
        train(arguments())
    train(arguments(overwrite_output_dir=True))


def test_padding_does_not_change_what_a_masked_text_encoder_says():
    tokenizer, text_encoder = new_text_encoder(["red heart", "fire"] * 3, {"num_hidden_layers": 1}, 12, seed=0)
    short = {name: values[:, :4] for name, values in tokenize(tokenizer, ["red heart"], "cpu").items()}
    with torch.no_grad():
        long = text_states(text_encoder.eval(), **tokenize(tokenizer, ["red heart"], "cpu"))
        assert torch.allclose(text_states(text_encoder, **short), long[:, :4], atol=1e-5)


def test_the_unet_takes_overrides():
    unet = make_unet(4, (4, 8), 16, {"block_out_channels": [32, 64, 64], "layers_per_block": 2, "norm_num_groups": 8})
    assert isinstance(unet, UNet2DConditionModel) and unet.config.sample_size == [4, 8]
    with pytest.raises(ValueError, match="unet_overrides"):
        make_unet(4, (4, 4), 16, {"block_out_channel": [32]})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--vae", "missing"], "neither a folder"),
        (["--caption_columns", "title"], "title"),
        (["--caption_dropout", "1.5"], "caption_dropout"),
        (["--prediction_type", "x0"], "prediction_type"),
        (["--zero_terminal_snr", "--prediction_type", "epsilon"], "v_prediction"),
        (["--image_size", "30"], "does not divide by 8"),
        (["--text_encoder", "nowhere"], "neither a folder"),
        (["--unet_overrides", "block_out_channel=[8]"], "unet_overrides"),
        (["--max_train_steps", "0"], "max_train_steps"),
    ],
)
def test_bad_input_ends_with_one_line(flags, says, vae, tmp_path, capsys):
    common = ["--dataset_name", EMOJI, "--output_dir", tmp_path / "run", "--max_train_steps", "1", "--vae", vae]
    fails(capsys, [*common, "--unet_overrides", UNET, *flags], says, main=main)
