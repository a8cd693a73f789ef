"""What version 0.1.0 wrote still loads, decodes and goes on. tests/data/before_rooms/README.md says what it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import save_pizza
from transformers import AutoImageProcessor, AutoModel

import hf_ae
from hf_ae.codec import CorruptFileError, compress, decompress, unpack
from hf_ae.hub.cards import write_card
from hf_ae.hub.push import check_folder, refresh
from hf_ae.hub.remote_code import write_model_code
from hf_ae.latents import sampling
from hf_ae.loading import load_autoencoder, load_model
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train import main
from hf_ae.training.output_folder import checkpoints

OLD = Path(__file__).parent / "data" / "before_rooms"
MODELS = {"vae": "VAEModel", "compressive": "CompressiveAutoencoderModel", "vqvae2": "VQVAE2Model"}
FILES = {"hyperprior": "compressive", "latents": "vae", "palette": "vae", "indices": "vqvae2"}


@pytest.mark.parametrize("name", MODELS)
def test_auto_classes_load_a_model_and_it_says_what_it_said(name):
    config = json.loads((OLD / name / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"].split(".")[0] in ("configuration", "configuration_discrete")
    model, processor = AutoModel.from_pretrained(OLD / name).eval(), AutoImageProcessor.from_pretrained(OLD / name)
    assert type(model) is getattr(hf_ae, MODELS[name]) and model.dtype == torch.float32
    assert type(processor) is hf_ae.AutoencoderImageProcessor
    expected = load_file(OLD / name / "expected.safetensors")
    with torch.no_grad():
        latents = model.encode(expected["pixel_values"]).latents
        reconstruction = model(expected["pixel_values"]).reconstruction
    torch.testing.assert_close(latents, expected["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reconstruction, expected["reconstruction"], rtol=1e-5, atol=1e-5)
    assert latents.std() > 0.01 and reconstruction.std() > 0.01


def test_a_sampler_draws_what_it_drew():
    sampler = sampling.Sampler.load(OLD / "vae")
    assert sampler.kind == "gaussian" and sampler.latent_shape == load_model(OLD / "vae")[0].config.latent_shape
    drawn = sampler.sample(5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, load_file(OLD / "vae" / "expected.safetensors")["drawn"])


@pytest.mark.parametrize("method, model", FILES.items())
def test_a_compressed_file_is_read(method, model):
    data, model = (OLD / "files" / f"{method}.hfae").read_bytes(), load_autoencoder(OLD / model)
    assert unpack(data).method == method
    decoded, expected = decompress(data, model), Image.open(OLD / "files" / f"{method}.png")
    assert decoded.size == expected.size == (45, 30) and decoded.mode == "L"
    difference = np.abs(np.asarray(decoded).astype(int) - np.asarray(expected))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.99


@pytest.mark.parametrize("method", sorted(set(FILES) - {"palette"}))
def test_the_same_file_is_written_again(method):
    """Of `latents` and `indices` an encoder in float32 may round a value otherwise on another machine."""
    model, image = load_autoencoder(OLD / FILES[method]), Image.open(OLD / "files" / "original.png")
    quality = 0.6 if method == "latents" else None
    data, old = compress(model, image, quality, model_id=""), (OLD / "files" / f"{method}.hfae").read_bytes()
    assert abs(len(data) - len(old)) <= 8 and data[:8] == old[:8], "the same header, the same fingerprint"


def test_a_damaged_palette_is_refused():
    """With a right checksum: its number of groups, its number of colours, a count, the end."""
    import zlib

    data, model = (OLD / "files" / "palette.hfae").read_bytes(), load_autoencoder(OLD / "vae")
    content, start = data[:-4], len(data) - 4 - len(unpack(data).body)
    colours = start + 1 + 4 * content[start]
    assert content[start] == 2 and 1 < content[colours] < 128
    counts = colours + 1 + 2 * content[colours]
    damaged = [
        content[:at] + bytes([value]) + content[at + 1 :] for at, value in ((start, 3), (colours, 0), (counts, 0))
    ]
    for forged in [*damaged, content[: counts + 5], content[:start]]:
        with pytest.raises(CorruptFileError):
            decompress(forged + zlib.crc32(forged).to_bytes(4, "little"), model)
    with pytest.raises(CorruptFileError, match="fingerprint"):
        decompress(data, load_autoencoder(OLD / "vqvae2"))


def test_a_run_goes_on_from_a_checkpoint_as_it_did(tmp_path):
    """Matrices in bfloat16 inside Muon are not bitwise equal on all processors."""
    shutil.copytree(OLD / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    flags = ["--dataset_name", SAMPLE, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "latest"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main([str(word) for word in (OLD / "run" / "recipe.yaml", *flags)])
    finally:
        torch.set_num_threads(threads)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-8"]
    final, expected = load_file(tmp_path / "run" / "model.safetensors"), load_file(OLD / "run" / "final.safetensors")
    before = load_file(OLD / "run" / "checkpoint-4" / "model.safetensors")
    assert set(final) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(final[name], weight, rtol=0, atol=1e-6)
    assert max((expected[name] - before[name]).abs().max() for name in expected) > 5e-5


def old_model_folder(folder: Path, name: str, code: bool) -> Path:
    """A copy of a model folder, if asked for with modules that are named and import each other as those of then."""
    shutil.copytree(OLD / name, folder)
    (folder / "expected.safetensors").unlink()
    if code:
        (folder / "configuration.py").write_text("class VAEConfig: ...\n")
        (folder / "networks.py").write_text("from .configuration import VAEConfig\n")
        (folder / "modeling_vae.py").write_text(
            "from .configuration import VAEConfig\nfrom .networks import (\n    x,\n)\n"
        )
        (folder / "image_processing.py").write_text("# of then\n")
    return folder


@pytest.mark.parametrize("code", [False, True], ids=["without-code", "with-old-code"])
def test_the_code_of_a_model_folder_is_renewed_and_its_auto_map(code, tmp_path):
    folder = old_model_folder(tmp_path / "vae", "vae", code)
    weights = (folder / "model.safetensors").read_bytes()
    write_model_code(folder)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_vae.VAEConfig",
        "AutoModel": "modeling_vae.VAEModel",
    }
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing.AutoencoderImageProcessor"}
    models = Path(hf_ae.__file__).parent / "models"
    written = {path.name for path in folder.glob("*.py")}
    assert {"configuration_vae.py", "modeling_vae.py", "networks.py", "image_processing.py"} < written
    assert "configuration.py" not in written
    assert all((folder / name).read_text() == (models / name).read_text() for name in written)
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_can_be_pushed(name, tmp_path):
    folder = old_model_folder(tmp_path / name, name, code=False)
    write_card(folder)
    assert {"config.json", "image_processing.py", "modeling_autoencoder.py"} < set(check_folder(folder))
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert all((folder / f"{entry.split('.')[0]}.py").is_file() for entry in auto_map.values())


def test_a_pipeline_folder_is_renewed(tmp_path):
    """Its prior then came from a copy of the pipeline's own file."""
    folder = save_pizza(tmp_path / "pizza")
    index = json.loads((folder / "model_index.json").read_text())
    index["prior"] = ["pipeline", "CaptionPrior"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "prior" / "caption_prior.py").rename(folder / "prior" / "pipeline.py")
    assert TextToImagePipeline.from_pretrained(folder).prior.config.captions == ["a slice", "pizza"]
    files = check_folder(folder)
    assert "prior/caption_prior.py" in files and "prior/pipeline.py" not in files
    assert json.loads((folder / "model_index.json").read_text())["prior"] == ["caption_prior", "CaptionPrior"]
    refresh(folder)
    assert check_folder(folder) == files
