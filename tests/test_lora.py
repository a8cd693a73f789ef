"""Adapters of a pipeline's denoiser: trained, saved alone, loaded, shared, and refused where they are pickled."""

from pathlib import Path

import datasets
import pytest
import torch
from command_line import fails, runs
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPT, bert, pipeline, vae_of_hf_ae

from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train_latent_diffusion import LatentDiffusionArguments, main, train

EMOJI = Path(__file__).parent / "data" / "noto_emoji_sample"
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_pipeline(pipeline(text=bert, vae=vae_of_hf_ae), folder)
    return folder


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Ten images with captions."""
    folder = tmp_path_factory.mktemp("ten")
    rows = datasets.load_dataset(str(EMOJI))["train"].select(range(10))
    rows.select_columns(["image", "text"]).to_parquet(folder / "train.parquet")
    return folder


def arguments(base, ten, folder, **values):
    defaults = dict(
        dataset_name=str(ten), output_dir=str(folder), pretrained_pipeline=str(base), lora_rank=2,
        train_batch_size=5, max_train_steps=6, learning_rate=1e-2, validation_epochs=0,
    )  # fmt: skip
    return LatentDiffusionArguments(**{**defaults, **values})


def test_adapters_are_trained_saved_and_loaded(base, ten, tmp_path, capsys):
    folder = tmp_path / "run"
    train(arguments(base, ten, folder, use_ema=True, ema_decay=0.5, validation_epochs=3, checkpointing_steps=6))
    assert "load_lora_weights" in capsys.readouterr().out
    weights = load_file(folder / NAME)
    assert any("conv1" in name for name in weights) and any("to_q" in name for name in weights)
    assert not (folder / "unet").exists() and "load_lora_weights" in (folder / "README.md").read_text()
    pipe = TextToImagePipeline.from_pretrained(base)
    options = dict(seed=3, output_type="pt")
    before = pipe(PROMPT, **options).images
    pipe.load_lora_weights(folder)
    adapted = pipe(PROMPT, **options).images
    assert (adapted - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(PROMPT, **options).images, before, atol=2e-6, rtol=0)
    checkpoint = load_file(folder / "checkpoint-6" / "model.safetensors")
    frozen = {k.removeprefix("unet."): v for k, v in checkpoint.items() if "lora" not in k}
    original = {k.replace("unet.", ""): v for k, v in pipe.unet.state_dict().items()}
    for name, weight in original.items():
        same = [v for k, v in frozen.items() if k.replace(".base_layer", "") == name]
        assert len(same) == 1 and torch.equal(same[0], weight), name


def test_an_interrupted_run_goes_on(base, ten, tmp_path):
    flags = dict(checkpointing_steps=3, lr_scheduler="constant")
    train(arguments(base, ten, tmp_path / "whole", **flags))
    train(arguments(base, ten, tmp_path / "cut", **flags, max_train_steps=3))
    (tmp_path / "cut" / "checkpoint-3").rename(tmp_path / "checkpoint-3")
    resumed = dict(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    train(arguments(base, ten, tmp_path / "resumed", **flags, **resumed))
    whole, again = (load_file(tmp_path / name / NAME) for name in ("whole", "resumed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    with pytest.raises(ValueError, match="lora_rank"):
        train(arguments(base, ten, tmp_path / "other", **flags, **resumed, lora_rank=3))


def test_another_run_may_replace_them_and_they_another_run(base, ten, tmp_path):
    folder = tmp_path / "run"
    train(arguments(base, ten, folder))
    train(arguments(base, ten, folder, overwrite_output_dir=True))
    train(arguments(base, ten, folder, overwrite_output_dir=True, lora_rank=None))
    assert not (folder / NAME).exists() and "num_candidates" not in (folder / "README.md").read_text()
    assert TextToImagePipeline.from_pretrained(folder)(PROMPT).images
    train(arguments(base, ten, folder, overwrite_output_dir=True))
    assert (folder / NAME).exists() and not (folder / "model_index.json").exists()
    assert "load_lora_weights" in (folder / "README.md").read_text()


def test_they_may_be_shared_but_nothing_else_under_their_name(base, ten, tmp_path, capsys):
    folder = tmp_path / "run"
    train(arguments(base, ten, folder))
    runs("push", str(folder), "--repo", "me/style", "--dry-run")
    assert NAME in capsys.readouterr().out
    save_file({"weight": torch.ones(2)}, folder / NAME)
    fails(capsys, ["push", str(folder), "--repo", "me/style", "--dry-run"], "other weights")
    (folder / NAME).write_bytes(b"\x80\x04K\x01.")
    fails(capsys, ["push", str(folder), "--repo", "me/style", "--dry-run"], "cannot be read")


def test_pickled_adapters_are_refused(base, tmp_path):
    pipe = TextToImagePipeline.from_pretrained(base)
    torch.save({"unet.x.lora.down.weight": torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="pickled"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="pickled"):
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="pickled"):
        pipe.load_lora_weights(tmp_path / "pytorch_lora_weights.bin")


def test_bad_input_ends_with_one_line(base, ten, tmp_path, capsys):
    common = ["--dataset_name", ten, "--output_dir", tmp_path / "run", "--max_train_steps", "1"]
    fails(capsys, [*common, "--lora_rank", "2"], "pretrained_pipeline", main=main)
    fails(capsys, [*common, "--lora_rank", "0", "--pretrained_pipeline", base], "lora_rank", main=main)
