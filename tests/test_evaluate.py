"""Evaluation, cards and the command line, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SAMPLE
from huggingface_hub import ModelCard
from PIL import Image

from hf_ae.evaluation.evaluate import evaluate
from hf_ae.hub.cards import write_card
from hf_ae.hub.push import check_folder
from hf_ae.train import train
from hf_ae_cli import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small VAE of binary images and a denoising model, trained and evaluated once."""
    from hf_ae.train import ImageTrainingArguments

    root = tmp_path_factory.mktemp("trained")
    common = dict(
        dataset_name=str(SAMPLE), num_train_epochs=8, learning_rate=3e-3, validation_epochs=0, train_batch_size=50
    )
    train(ImageTrainingArguments(**common, output_dir=str(root / "vae"), model_type="hf_ae_vae", binarize=True,
                                 config_overrides="hidden_sizes=[32],latent_dim=2,reconstruction_loss=bce"))  # fmt: skip
    train(ImageTrainingArguments(**common, output_dir=str(root / "clean"), model_type="hf_ae_denoising", save_dtype="float16",
                                 config_overrides="network=conv,hidden_sizes=[8,16],latent_channels=4"))  # fmt: skip
    return root


def expect_one_line(capsys, argv, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
    for word in words:
        assert word in errors[0], errors[0]


def test_evaluate_writes_metrics_pictures_and_a_card_that_agree(trained, capsys):
    folder = trained / "vae"
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "evaluate",
                str(folder),
                "--dataset_name",
                str(SAMPLE),
                "--binarize",
                "--samples",
                "5",
                "--max_images",
                "100",
            ]
        )
    assert not stop.value.code
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["images"] == 100 and metrics["code_size"] == 2
    assert metrics["likelihood"]["elbo"] < metrics["likelihood"]["log_likelihood_bound"] < 0
    index = {r.metric_type: r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results}
    assert index["psnr"] == round(metrics["reconstruction"]["psnr"], 6)
    assert index["log_likelihood_bound"] == round(metrics["likelihood"]["log_likelihood_bound"], 6)
    for name in ("reconstructions.png", "latent_plane.png"):
        assert np.asarray(Image.open(folder / name)).std() > 20
    assert f"{metrics['reconstruction']['squared_error_per_image']:.5g}" in capsys.readouterr().out


def test_reported_error_is_that_of_the_model_on_those_images(trained):
    import datasets

    from hf_ae.evaluation.evaluate import load_model

    metrics = evaluate(trained / "clean", str(SAMPLE), tasks="reconstruction", max_images=30, save=False)
    model, processor = load_model(trained / "clean")
    images = datasets.load_dataset(str(SAMPLE), split="test")[:30]["image"]
    x = torch.from_numpy(np.stack([np.asarray(i) for i in images])).float()[:, None] / 255
    with torch.no_grad():
        error = (model(**processor(images, return_tensors="pt")).reconstruction - x).square()
    assert abs(metrics["reconstruction"]["squared_error_per_image"] - error.sum((1, 2, 3)).mean().item()) < 1e-3
    assert metrics["denoising"]["mse"] < metrics["denoising_input"]["mse"]


def test_bad_requests_are_one_line(trained, capsys, tmp_path):
    vae = trained / "vae"
    expect_one_line(capsys, ["evaluate", vae, "--dataset_name", SAMPLE, "--tasks", "likelihood"], "--binarize")
    expect_one_line(
        capsys, ["evaluate", trained / "clean", "--dataset_name", SAMPLE, "--tasks", "likelihood"], "variational"
    )
    expect_one_line(
        capsys, ["evaluate", vae, "--dataset_name", SAMPLE, "--tasks", "beauty"], "beauty", "reconstruction"
    )
    expect_one_line(capsys, ["evaluate", vae, "--dataset_name", SAMPLE, "--split", "val"], "val", "train, test")
    expect_one_line(capsys, ["evaluate", tmp_path / "none", "--dataset_name", SAMPLE], "none")
    expect_one_line(capsys, ["evaluate", vae], "dataset_name")
    expect_one_line(capsys, ["reconstruct", tmp_path / "a.png", "--model", vae], "a.png", "does not exist")
    expect_one_line(capsys, ["sing"], "sing")
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "damaged" / name).write_bytes((vae / name).read_bytes())
    (tmp_path / "damaged" / "model.safetensors").write_bytes((vae / "model.safetensors").read_bytes()[:900])
    expect_one_line(capsys, ["evaluate", tmp_path / "damaged", "--dataset_name", SAMPLE], "damaged")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    expect_one_line(capsys, ["evaluate", other, "--dataset_name", SAMPLE], "bert")


def test_reconstruct_draws_any_image_file(trained, tmp_path):
    Image.effect_noise((60, 90), 80).convert("CMYK").save(tmp_path / "a.jpg")
    Image.new("RGBA", (28, 28), (0, 0, 0, 128)).save(tmp_path / "b.png")
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "reconstruct",
                str(tmp_path / "a.jpg"),
                str(tmp_path / "b.png"),
                "--model",
                str(trained / "vae"),
                "-o",
                str(tmp_path / "o.png"),
            ]
        )
    assert not stop.value.code
    assert Image.open(tmp_path / "o.png").width > 2 * 112


def test_folder_check_refuses_what_should_not_be_published(trained, tmp_path, capsys):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "clean", folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "training_state.json").write_text("{}")
    assert not [f for f in check_folder(folder) if "checkpoint" in f]
    (folder / "secret.env").write_text("TOKEN=1")
    expect_one_line(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "secret.env")
    (folder / "secret.env").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:500])
    expect_one_line(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "does not load")
    (folder / "model.safetensors").write_bytes((trained / "vae" / "model.safetensors").read_bytes())
    expect_one_line(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "do not fit")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "networks.py").unlink()
    expect_one_line(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "remote code", "networks.py")
    (folder / "networks.py").write_bytes((trained / "clean" / "networks.py").read_bytes())
    expect_one_line(capsys, ["push", folder, "--repo", "me/x"], "Nothing was uploaded")
    (folder / "README.md").write_text("# hello")
    expect_one_line(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "license")
    expect_one_line(capsys, ["push", tmp_path / "nowhere", "--repo", "me/x"], "no folder")


def test_card_keeps_hand_written_notes(trained):
    path = trained / "clean" / "README.md"
    path.write_text(path.read_text() + "\n## Notes\n\nNever feed it after midnight.\n")
    write_card(trained / "clean")
    assert path.read_text().endswith("## Notes\n\nNever feed it after midnight.\n")
    assert yaml.safe_load(path.read_text().split("---")[1])["library_name"] == "transformers"


def test_command_line_starts_as_a_program(trained):
    program = Path(sys.executable).with_name("hf-ae")
    done = subprocess.run([program, "evaluate", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--dataset_name" in done.stdout
