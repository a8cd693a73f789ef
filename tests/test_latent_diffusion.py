"""Training text-to-image pipelines: what is learned, exact resume, several processes, other autoencoders and text models, bad input."""

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
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch.nn import functional as F

import hf_ae
from hf_ae.diffusion.captions import Captions, cached_latents, text_states, tokenize
from hf_ae.diffusion.denoiser import LatentDiffusion, make_unet
from hf_ae.diffusion.text_encoders import align_text_encoder, mean_states, text_encoder_from_scratch
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train_latent_diffusion import LatentDiffusionArguments, main, picture_processor, train
from hf_ae.training.arguments import parse_overrides

EMOJI = Path(__file__).parent / "data" / "noto_emoji_sample"
UNET = "block_out_channels=[32,32],norm_num_groups=8,attention_head_dim=4,addition_embed_type_num_heads=4"
TEXT = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a small untrained VAE with a spatial code."""
    torch.manual_seed(0)
    fields = dict(
        network="resnet", image_size=32, num_channels=3, patch_size=4, hidden_sizes=[16, 16], latent_channels=4
    )
    folder = tmp_path_factory.mktemp("vae")
    hf_ae.VAEModel(hf_ae.VAEConfig(**fields, pixel_range=[-1.0, 1.0])).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(vae, tmp_path):
    def make(**values):
        defaults = dict(
            dataset_name=str(EMOJI), output_dir=str(tmp_path / "run"), vae=str(vae), unet_overrides=UNET, text_overrides=TEXT,
            caption_columns="text,keywords", max_text_length=12, train_batch_size=8, max_train_steps=4, validation_epochs=0,
            num_inference_steps=2,
        )  # fmt: skip
        return LatentDiffusionArguments(**{**defaults, **values})

    return make


def weights(folder) -> dict:
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_result_is_a_pipeline_that_draws(arguments, tmp_path):
    train(arguments(use_ema=True, validation_epochs=1, max_train_steps=7))
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run")
    picture = pipe("a red heart", seed=1).images[0]
    assert picture.size == (32, 32)
    assert pipe.vae.config.scaling_factor != 1.0
    assert (tmp_path / "run" / "samples" / "step-0000007.png").is_file()
    assert not list((tmp_path / "run").rglob("*.bin")) and not list((tmp_path / "run").rglob("*.pt"))


def test_resumed_gives_bitwise_the_weights_of_an_uninterrupted_run(arguments, tmp_path):
    """With a jointly trained text encoder, an average and Muon: all of them must come back."""
    flags = dict(use_ema=True, optimizer="muon", checkpointing_steps=2, max_train_steps=6, seed=3)
    train(arguments(output_dir=str(tmp_path / "whole"), **flags))
    train(arguments(output_dir=str(tmp_path / "cut"), **{**flags, "max_train_steps": 4, "lr_scheduler": "constant"}))
    first = weights(tmp_path / "cut")
    train(arguments(output_dir=str(tmp_path / "again"), **{**flags, "lr_scheduler": "constant"}))
    for step in (6,):
        assert not (tmp_path / "cut" / f"checkpoint-{step}").exists()
    os.rename(tmp_path / "cut" / "checkpoint-4", tmp_path / "checkpoint-4")
    resume = dict(
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "checkpoint-4"),
        lr_scheduler="constant",
    )
    train(arguments(**{**flags, **resume}))
    resumed, whole = weights(tmp_path / "resumed"), weights(tmp_path / "again")
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert any(not torch.equal(resumed[k], first[k]) for k in whole)
    text = "text_encoder/model.safetensors"
    one, other = load_file(tmp_path / "resumed" / text), load_file(tmp_path / "again" / text)
    assert all(torch.equal(one[k], other[k]) for k in one)


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


def test_two_processes_take_the_step_of_one(vae, tmp_path):
    """The gradient of 2 × 4 pictures is that of 8: the caption and the noise are fixed by dropping all captions' choice."""
    flags = [
        "--dataset_name", str(EMOJI), "--vae", str(vae), "--unet_overrides", UNET, "--text_overrides", TEXT, "--max_train_steps", "2",
        "--validation_epochs", "0", "--max_text_length", "12", "--num_inference_steps", "2", "--train_batch_size", "4",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "hf_ae.train_latent_diffusion",
    ]
    done = subprocess.run(
        [*start, *flags, "--output_dir", str(tmp_path / "two")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TextToImagePipeline.from_pretrained(tmp_path / "two")("rocket", seed=0).images[0].size == (32, 32)
    assert len(list((tmp_path / "two" / "latents").rglob("*.safetensors"))) == 1


def test_a_given_text_encoder_stays_frozen_and_an_aligned_one_changes(arguments, tmp_path):
    tokenizer, text_encoder = text_encoder_from_scratch(["a red heart", "a rocket", "fire"] * 3, {"hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}, 12, seed=0)  # fmt: skip
    text_encoder.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    before = load_file(tmp_path / "text" / "model.safetensors")
    train(arguments(text_encoder=str(tmp_path / "text"), output_dir=str(tmp_path / "frozen")))
    frozen = load_file(tmp_path / "frozen" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(before[k], frozen[k]) for k in before)
    train(arguments(text_encoder=str(tmp_path / "text"), output_dir=str(tmp_path / "aligned"), align_text_epochs=1))
    aligned = load_file(tmp_path / "aligned" / "text_encoder" / "model.safetensors")
    assert any(not torch.equal(before[k], aligned[k]) for k in before)


def test_with_a_prior_keywords_lead_to_names_and_rounded_matrices_take_a_byte(arguments, tmp_path, capsys):
    rows = datasets.load_dataset(str(EMOJI))["train"]
    names, words = rows["text"], rows["keywords"]
    tokenizer, text_encoder = text_encoder_from_scratch(
        [*names, *(w for row in words for w in row)], parse_overrides(TEXT), 12, seed=0
    )
    text_encoder.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    flags = dict(
        align_text_epochs=150, round_text_encoder=True, caption_prior=True, save_dtype="float16", max_train_steps=2
    )
    train(arguments(text_encoder=str(tmp_path / "text"), **flags))
    stored = load_file(tmp_path / "run" / "text_encoder" / "model.safetensors")
    assert all(
        weight.dtype == (torch.float8_e4m3fn if weight.ndim == 2 else torch.float16) for weight in stored.values()
    )
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run")
    weights = pipe.text_encoder.state_dict()
    assert all(torch.equal(weights[name].float(), weight.float()) for name, weight in stored.items())
    assert pipe.prior.config.captions == list(dict.fromkeys(names))
    assert pipe(names[:8], seed=0).captions == names[:8]
    only = [
        (name, word) for name, row in zip(names, words) for word in row if sum(word in other for other in words) == 1
    ][:20]
    found = pipe([word for _, word in only], seed=0).captions
    assert sum(caption == name for caption, (name, _) in zip(found, only)) >= 15


def test_alignment_puts_captions_of_one_picture_together():
    rows = datasets.Dataset.from_dict(
        {"text": ["alpha", "beta", "gamma", "delta"], "keywords": [["one"], ["two"], ["three"], ["four"]]}
    )
    captions = Captions(rows, ["text", "keywords"])
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer, text_encoder = text_encoder_from_scratch(captions.texts * 2, fields, 8, seed=0)
    latents = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def agreement():
        with torch.no_grad():
            vectors = F.normalize(
                mean_states(text_encoder.eval(), tokenize(tokenizer, captions.texts[1:], "cpu")), dim=1
            )
        names, words = vectors[0::2], vectors[1::2]
        return ((names @ words.T).argmax(1) == torch.arange(4)).float().mean().item()

    before = agreement()
    align_text_encoder(text_encoder, tokenizer, captions, latents, epochs=8000, seed=0, say=lambda _: None)
    assert before < 1.0 and agreement() == 1.0


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
    assert torch.allclose(model.weight(kept), torch.tensor([0.1 / 1.1, 5 / 6, 5 / 51]), rtol=1e-3)
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
    dice = random.Random(0)
    drawn = captions.draw(torch.zeros(4000, dtype=torch.long), 0.1, dice).tolist()
    shares = {text: drawn.count(number) / 4000 for number, text in enumerate(captions.texts)}
    assert math.isclose(shares[""], 0.1, abs_tol=0.02) and math.isclose(shares["heart"], 0.45, abs_tol=0.03)
    assert math.isclose(shares["red"], 0.15, abs_tol=0.03) and shares["sea"] == 0
    assert {captions.texts[n] for n in captions.draw(torch.ones(50, dtype=torch.long), 0.0, dice).tolist()} == {"sea"}


def test_the_first_column_keeps_the_pictures_and_drops_other_texts():
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
    arguments = (model, dataset, "image", picture_processor(model, None), tmp_path, Accelerator(cpu=True))
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
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = dict(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    AutoencoderKL(**sizes, norm_num_groups=4, latent_channels=4, sample_size=16).save_pretrained(tmp_path / "kl")
    tokenizer, _ = text_encoder_from_scratch(["red heart", "fire"] * 3, {}, 12, seed=0)
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                            max_position_embeddings=12)  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    train(
        arguments(
            vae=str(tmp_path / "kl"),
            text_encoder=str(tmp_path / "clip"),
            image_size=16,
            prediction_type="epsilon",
            snr_gamma=5.0,
        )
    )
    assert TextToImagePipeline.from_pretrained(tmp_path / "run")("fire", seed=0).images[0].size == (16, 16)


def test_a_pipeline_is_fine_tuned(arguments, tmp_path):
    """Its text encoder, vae and noise stay; its denoiser moves on from where it was."""
    train(arguments(output_dir=str(tmp_path / "first"), prediction_type="epsilon"))
    again = dict(vae=None, pretrained_pipeline=str(tmp_path / "first"), unet_overrides=None, learning_rate=0.0)
    train(arguments(output_dir=str(tmp_path / "still"), **again))
    train(arguments(output_dir=str(tmp_path / "moved"), **{**again, "learning_rate": 1e-4}))
    first, still, moved = (weights(tmp_path / name) for name in ("first", "still", "moved"))
    assert all(torch.equal(first[k], still[k]) for k in first)
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
    tokenizer, text_encoder = text_encoder_from_scratch(
        ["red heart", "fire"] * 3, {"num_hidden_layers": 1}, 12, seed=0
    )
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
    common = [
        "--dataset_name",
        str(EMOJI),
        "--output_dir",
        str(tmp_path / "run"),
        "--max_train_steps",
        "1",
        "--vae",
        str(vae),
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--text_overrides", TEXT, "--unet_overrides", UNET, *flags])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error:") and says in line
