"""ONNX and torch.export programs compute what the models do, at other batches and sizes than the example's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from command_line import fails, runs
from shipped import ROOT
from variants import VARIANTS, make, pixels, shaken

import hf_ae
from hf_ae.export import differences, export, parts, run

# One of each flow and network; the others are exported by `make test-slow`.
FEW = ("autoencoder-mlp", "autoencoder-unpool", "vae-resnet", "vqvae-fsq")
ALL = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in VARIANTS if name != "compressive"]


@pytest.mark.parametrize("name", ALL)
def test_onnx_computes_what_the_model_does(name, tmp_path):
    model = make(name).eval()
    files = export(model, tmp_path)
    assert set(files) == {"encoder", "decoder"} | ({"indices_decoder"} if model.has_discrete_codes else set())
    for found in differences(model, files).values():
        assert all(value.max() <= 1e-5 for value in found.values()), found
    spatial = model.config.latent_channels is not None
    for batch, times in ((1, (1, 1)), (4, (1, 1)), *([(2, (1, 2)), (3, (2, 2))] if spatial else [])):
        for part, module, inputs in parts(model, batch, times):
            outputs = run(files[part], inputs)
            with torch.no_grad():
                for key, value in module(**inputs).items():
                    torch.testing.assert_close(outputs[key], value, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pixel_range"] == model.config.pixel_range


@pytest.mark.slow
def test_a_compressive_model_takes_any_size_and_quality(tmp_path):
    """Where a value lies on the edge between two steps, rounding may go the other way: one step of quantization."""
    model = shaken("compressive")
    files = export(model, tmp_path)
    for batch, times in ((1, (1, 1)), (3, (2, 1)), (2, (3, 2))):
        for part, module, inputs in parts(model, batch, times):
            with torch.no_grad():
                expected = module(**inputs)
            for key, value in run(files[part], inputs).items():
                wrong = ((value - expected[key]).abs() > 1e-5).float().mean()
                assert wrong <= (0.005 if part == "encoder" else 0), (part, batch, times, float(wrong))


@pytest.mark.parametrize("name", ["autoencoder-conv", "vae-resnet", "vqvae2"])
def test_torch_export_computes_what_the_model_does(name, tmp_path):
    model = make(name).eval()
    files = export(model, tmp_path, "torch")
    assert all(file.suffix == ".pt2" for file in files.values())
    for found in differences(model, files).values():
        assert all(value.max() <= 1e-5 for value in found.values()), found


def test_the_command_line_exports_and_ten_lines_of_onnxruntime_use_it(tmp_path, capsys):
    model = make("vae-mlp").eval()
    model.save_pretrained(tmp_path / "model")
    hf_ae.AutoencoderImageProcessor.from_config(model.config).save_pretrained(tmp_path / "model")
    runs("export", tmp_path / "model", "-o", tmp_path / "onnx")
    assert capsys.readouterr().out.count("largest difference from the model") == 2
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{n}.onnx") for n in ("encoder", "decoder"))
    x = pixels(model)
    latents = encoder.run(["latents"], {"pixel_values": x.numpy()})[0]
    sample = decoder.run(["sample"], {"latents": latents})[0]
    torch.testing.assert_close(torch.tensor(sample), model(x).reconstruction.detach(), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "onnx" / "preprocessor_config.json").is_file()
    wrong = ["export", tmp_path / "model", "-o", tmp_path / "x", "--format", "coreml"]
    fails(capsys, wrong, "format='coreml'", "onnx, torch")


@pytest.mark.parametrize("name", [pytest.param("compressive", marks=pytest.mark.slow), "vae-resnet", "vqvae-ema"])
def test_a_torch_program_takes_single_images_and_other_sizes(name, tmp_path):
    """It refused a batch of one, and sides as long as the model's own."""
    model = make(name).eval()
    encoder = torch.export.load(export(model, tmp_path, "torch")["encoder"]).module()
    for batch, rows, columns in ((1, 1, 1), (2, 1, 2), (3, 4, 1), (1, 3, 5)):
        height, width = (side * times for side, times in zip(model.config.image_hw, (rows, columns)))
        x = torch.rand(batch, model.config.num_channels, height, width)
        inputs = {"pixel_values": x} | ({"quality": torch.full((batch,), 0.5)} if name == "compressive" else {})
        with torch.no_grad():
            wanted = model._encode(**{"pixel_values": x, **({"quality": 0.5} if "quality" in inputs else {})})
        torch.testing.assert_close(encoder(**inputs)["latents"], wanted.latents, rtol=1e-4, atol=1e-4)


def test_the_autoencoder_in_a_pipeline_is_exported_and_noise_is_not_printed(tmp_path):
    """In a process of its own: what is printed there is what a user sees."""
    folder = ROOT / "model_cards" / "emoji-text-to-image"
    words = ["hf-ae", "export", str(folder / "vae"), "-o", str(tmp_path / "onnx")]
    words[0] = str(Path(sys.executable).with_name("hf-ae"))
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2 and not done.stderr.strip(), done.stderr
    assert (tmp_path / "onnx" / "preprocessor_config.json").is_file()


def test_where_an_export_cannot_go(tmp_path, capsys):
    model = make("vae-mlp")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    for place, words in (("file", "is a file"), ("model", "folder of its own")):
        fails(capsys, ["export", tmp_path / "model", "-o", tmp_path / place], words)
    fails(capsys, ["export", ROOT / "model_cards" / "emoji-text-to-image", "-o", tmp_path / "x"], "is a pipeline")
