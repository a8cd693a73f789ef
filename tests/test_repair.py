"""Repair beside methods without learning."""

import numpy as np
import pytest
import torch
from command_line import fails
from conftest import SAMPLE
from variants import make, smooth_image

import hf_ae
from hf_ae.evaluation.evaluate import evaluate, summary
from hf_ae.evaluation.repair import Damage, enlarge, has_opencv, measure_repair, without_learning
from hf_ae.loading import image_processor_for
from hf_ae.metrics import reconstruction_metrics


def smooth(count: int, channels: int = 1) -> torch.Tensor:
    """Smooth images (count, channels, 30, 30) in 0…1."""
    mode = "L" if channels == 1 else "RGB"
    images = [np.asarray(smooth_image(30, 30, mode, seed)).reshape(30, 30, channels) for seed in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("text", ["gaussian:0.2", "salt_pepper:0.1", "masking:0.5", "patches:0.3", "low_resolution:4"])
def test_methods_without_learning_repair(text, channels):
    images, train, damage = smooth(6, channels), smooth(10, channels)[6:], Damage.read(text)
    damaged = damage(images)
    before = reconstruction_metrics(images, damaged)["psnr"]
    found = {
        name: reconstruction_metrics(images, made)["psnr"] for name, made in without_learning(damaged, damage, train)
    }
    assert max(found.values()) > before + 2
    assert min(found.values()) > before
    assert ("Telea" in found) == (has_opencv() and text[:4] in ("mask", "patc"))


def test_only_lost_pixels_are_filled_in():
    images, damage = smooth(2), Damage.read("masking:0.4")
    damaged, lost = damage(images, seed=3), damage.lost(images, seed=3)
    assert torch.equal(damaged.squeeze(1)[~lost], images.squeeze(1)[~lost])
    assert (damaged.squeeze(1)[lost] == 0).all()
    made = dict(without_learning(damage(images), damage, smooth(4)))["biharmonic"]
    kept = ~damage.lost(images)
    torch.testing.assert_close(made.squeeze(1)[kept], images.squeeze(1)[kept])


def test_enlarging_gives_back_a_plane_that_was_averaged():
    column = np.linspace(0, 1, 32, dtype=np.float32)
    image = np.repeat(column[:, None, None], 30, 1)
    small = np.repeat(np.repeat(image.reshape(8, 4, 30, 1).mean(1), 4, 0), 1, 1)
    from PIL import Image

    made = enlarge(small[:, :30], np.zeros((32, 30)), 4, Image.Resampling.BICUBIC)
    assert np.abs(made - image)[8:-8, 8:-8].max() < 0.01  # away from the borders, where nothing lies beyond


def test_figures_of_a_repair_are_those_of_its_images():
    model = make("denoising").eval()
    images = torch.rand(4, *[model.config.num_channels, *model.config.image_hw])
    found, rows = measure_repair(model, images, images, Damage.of(model))
    assert found["damage"] == f"{model.config.corruption}:{model.config.corruption_level:g}"
    assert found["damaged"] == reconstruction_metrics(images, rows["damaged"])
    assert found["restored"] == reconstruction_metrics(images, rows["restored"])
    assert next(iter(rows)) == "original" and list(rows)[-1] == "restored"


@pytest.mark.parametrize("text", ["blur:2", "gaussian:much", "low_resolution:0", "gaussian:"])
def test_a_damage_that_cannot_be_done_has_one_line(text):
    with pytest.raises(ValueError, match=r"--corrupt .* cannot be done: write a kind and a level, as gaussian:0\.5"):
        Damage.read(text)


def test_evaluate_repairs_with_any_model_and_any_damage(tmp_path, capsys):
    model = hf_ae.AutoencoderModel(hf_ae.AutoencoderConfig(hidden_sizes=[32], latent_dim=8))
    model.save_pretrained(tmp_path)
    image_processor_for(model).save_pretrained(tmp_path)
    found = evaluate(tmp_path, str(SAMPLE), tasks="repair", corrupt="salt_pepper:0.1", max_images=20)["repair"]
    assert found["damage"] == "salt_pepper:0.1" and found["images"] == 20
    assert found["without_learning"]["median"]["psnr"] > found["damaged"]["psnr"]
    card = (tmp_path / "README.md").read_text()
    assert "damage `salt_pepper:0.1`" in card and "![Damaged images" in card and "--corrupt salt_pepper:0.1" in card
    assert (tmp_path / "repair.png").stat().st_size > 1000
    assert "restored" in summary({"repair": found})
    command = ["evaluate", tmp_path, "--dataset_name", SAMPLE, "--tasks", "repair"]
    fails(capsys, command, "--corrupt gaussian:0.5")
    fails(capsys, [*command, "--corrupt", "grayscale"], "needs a model of colour images")
