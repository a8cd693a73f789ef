"""Evaluation, cards and the command line, as a user calls them."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_line import fails, runs
from conftest import SAMPLE
from huggingface_hub import ModelCard
from PIL import Image

from hf_ae.evaluation.evaluate import evaluate
from hf_ae.hub.cards import write_card
from hf_ae.hub.push import check_folder, refresh
from hf_ae.loading import load_model
from hf_ae.train import ImageTrainingArguments, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small VAE of binary images and a denoising model, trained and evaluated once."""
    root = tmp_path_factory.mktemp("trained")
    common = dict(
        dataset_name=str(SAMPLE), num_train_epochs=8, learning_rate=3e-3, validation_epochs=0, train_batch_size=50
    )
    vae = dict(model_type="hf_ae_vae", config_overrides="hidden_sizes=[32],latent_dim=2,reconstruction_loss=bce")
    train(ImageTrainingArguments(**common, **vae, binarize=True, output_dir=str(root / "vae")))
    clean = dict(model_type="hf_ae_denoising", config_overrides="network=conv,hidden_sizes=[8,16],latent_channels=4")
    train(ImageTrainingArguments(**common, **clean, save_dtype="float16", output_dir=str(root / "clean")))
    return root


def test_evaluate_writes_metrics_figures_and_a_card_that_agree(trained, capsys):
    folder = trained / "vae"
    data = ["--dataset_name", SAMPLE, "--binarize", "--samples", 5, "--max_images", 100]
    runs("evaluate", folder, *data)
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
    fails(capsys, ["evaluate", vae, "--dataset_name", SAMPLE, "--tasks", "likelihood"], "--binarize")
    fails(capsys, ["evaluate", trained / "clean", "--dataset_name", SAMPLE, "--tasks", "likelihood"], "variational")
    fails(capsys, ["evaluate", vae, "--dataset_name", SAMPLE, "--tasks", "beauty"], "beauty", "reconstruction")
    fails(capsys, ["evaluate", vae, "--dataset_name", SAMPLE, "--split", "val"], "val", "train, test")
    fails(capsys, ["evaluate", tmp_path / "none", "--dataset_name", SAMPLE], "none is neither a folder nor")
    fails(capsys, ["evaluate", vae], "Missing option '--dataset_name'")
    fails(capsys, ["reconstruct", tmp_path / "a.png", "--model", vae], "a.png", "does not exist")
    fails(capsys, ["sing"], "No such command 'sing'")
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "damaged" / name).write_bytes((vae / name).read_bytes())
    (tmp_path / "damaged" / "model.safetensors").write_bytes((vae / "model.safetensors").read_bytes()[:900])
    fails(capsys, ["evaluate", tmp_path / "damaged", "--dataset_name", SAMPLE], "is damaged: ")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    fails(capsys, ["evaluate", other, "--dataset_name", SAMPLE], "is a 'bert' model, not one of hf_ae's")


def test_reconstruct_draws_any_image_file(trained, tmp_path):
    Image.effect_noise((60, 90), 80).convert("CMYK").save(tmp_path / "a.jpg")
    Image.new("RGBA", (28, 28), (0, 0, 0, 128)).save(tmp_path / "b.png")
    images = [tmp_path / "a.jpg", tmp_path / "b.png"]
    runs("reconstruct", *images, "--model", trained / "vae", "-o", tmp_path / "o.png")
    assert Image.open(tmp_path / "o.png").width > 2 * 112


def test_folder_check_refuses_what_should_not_be_published(trained, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(trained / "clean", folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "training_state.json").write_text("{}")
    assert not [f for f in check_folder(folder) if "checkpoint" in f]
    (folder / "secret.env").write_text("TOKEN=1")
    fails(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "secret.env")
    (folder / "secret.env").unlink()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:500])
    fails(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "does not load")
    (folder / "model.safetensors").write_bytes((trained / "vae" / "model.safetensors").read_bytes())
    fails(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "do not fit")
    (folder / "model.safetensors").write_bytes(weights)
    fails(capsys, ["push", folder, "--repo", "me/x"], "Nothing was uploaded")
    (folder / "README.md").write_text("# hello")
    fails(capsys, ["push", folder, "--repo", "me/x", "--dry-run"], "not complete: license, tags")
    fails(capsys, ["push", tmp_path / "nowhere", "--repo", "me/x"], "no folder")


def test_code_that_a_folder_lacks_is_written_and_other_versions_of_it_stay(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained / "clean", folder)
    written = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert {"modeling_regularized.py", "networks.py", "image_processing.py"} < set(written)
    (folder / "networks.py").unlink()
    assert "networks.py" in check_folder(folder) and (folder / "networks.py").read_text() == written["networks.py"]
    (folder / "networks.py").write_text("# an earlier version\n")
    assert "networks.py" in check_folder(folder)
    assert (folder / "networks.py").read_text() == "# an earlier version\n"
    refresh(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("auto_map")
        (folder / name).write_text(json.dumps(content))
    assert set(written) < set(check_folder(folder))
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == written
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_regularized.DenoisingAutoencoderConfig",
        "AutoModel": "modeling_regularized.DenoisingAutoencoderModel",
    }


def test_card_keeps_hand_written_notes(trained):
    path = trained / "clean" / "README.md"
    path.write_text(path.read_text() + "\n## Notes\n\nNever feed it after midnight.\n")
    write_card(trained / "clean")
    assert path.read_text().endswith("## Notes\n\nNever feed it after midnight.\n")
    assert yaml.safe_load(path.read_text().split("---")[1])["library_name"] == "transformers"
