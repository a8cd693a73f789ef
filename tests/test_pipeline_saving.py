"""What save_pretrained and push_to_hub of a pipeline write: it loads without hf_ae, and is saved there again."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from hub_server import OWNER, HubServer
from tiny_pipelines import PROMPT, Brightness, pipeline, pizza_pipeline, pizza_vae, scheduler, vae_of_hf_ae

from hf_ae.pipelines import CaptionPrior, TextToImagePipeline

STRANGER = """
import json, sys
sys.modules["hf_ae"] = None  # importing it is an error
from diffusers import DiffusionPipeline
place, saved, prompt = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
pipe.save_pretrained(saved)
again = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
images = []
for each in (pipe, again):
    each.set_progress_bar_config(disable=True)
    images.append(each(prompt, seed=1, num_inference_steps=2, output_type="np").images.tolist())
print(json.dumps([type(pipe.scheduler).__name__, type(pipe.vae).__module__, *images]))
"""


def stranger(place, folder, prompt, **env):
    """What a process without hf_ae draws: (scheduler, module of the VAE, images, images after saving there)."""
    command = [sys.executable, "-c", STRANGER, str(place), str(folder / "again"), prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("vae", ["ours", "diffusers"])
def test_a_saved_pipeline_draws_where_the_package_is_not_installed_and_is_saved_there(tmp_path, vae):
    pipe = pipeline(vae=vae_of_hf_ae) if vae == "ours" else pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    _, module, first, again = stranger(tmp_path / "pipe", tmp_path, PROMPT)
    assert module.startswith("diffusers_modules." if vae == "ours" else "diffusers.models.")
    expected = pipe(PROMPT, seed=1, num_inference_steps=2, output_type="np").images
    np.testing.assert_array_equal(np.array(first, dtype=np.float32), expected)
    assert again == first
    files = {path.relative_to(tmp_path / "pipe").as_posix() for path in (tmp_path / "pipe").rglob("*.py")}
    assert files == {"pipeline.py"} | ({"vae/modeling_hf_ae_vae.py"} if vae == "ours" else set())
    for name in files:
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "pipe" / name).read_text()
    assert str(tmp_path) not in (tmp_path / "again" / "model_index.json").read_text()


def test_a_pushed_pipeline_with_another_scheduler_and_a_prior_draws_where_the_package_is_not_installed(tmp_path):
    pipe = pizza_pipeline(pizza_vae())
    pipe.scheduler = scheduler("euler")
    pipe.save_pretrained(tmp_path / "pipe")
    push = (
        "import sys; from hf_ae.pipelines import TextToImagePipeline\n"
        "TextToImagePipeline.from_pretrained(sys.argv[1]).push_to_hub('me/pizza')\n"
    )
    with HubServer() as server:
        environment = server.client_env(tmp_path / "owner", OWNER, OMP_NUM_THREADS="1")
        command = [sys.executable, "-c", push, str(tmp_path / "pipe")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        environment = server.client_env(tmp_path / "reader", None, OMP_NUM_THREADS="1")
        kind, module, first, again = stranger("me/pizza", tmp_path, "pizza", env=environment)
    assert kind == "EulerDiscreteScheduler" and module.startswith("diffusers_modules.")
    expected = pipe("pizza", seed=1, num_inference_steps=2, output_type="np").images
    np.testing.assert_array_equal(np.array(first, dtype=np.float32), expected)
    assert again == first


def test_what_was_assigned_is_saved_too(tmp_path):
    pipe = pipeline(vae=vae_of_hf_ae)
    pipe.image_decoder = vae_of_hf_ae((0.0, 1.0))
    pipe.discriminator = Brightness()  # cannot be saved, as diffusers says
    pipe.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.image_decoder.config.pixel_range == [0.0, 1.0] and loaded.discriminator is None


def test_a_class_of_ones_own_is_saved_with_the_code_of_ours(tmp_path):
    class Mine(TextToImagePipeline):
        pass

    Mine(**pipeline().components).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == [
        "pipeline",
        "TextToImagePipeline",
    ]
    assert type(Mine.from_pretrained(tmp_path)) is Mine
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(other).__name__ == "TextToImagePipeline"


# Pickles


def test_pickles_are_neither_written_nor_read(tmp_path):
    pipe = pizza_pipeline(pizza_vae())
    with pytest.raises(ValueError, match="safe_serialization=False writes pickled weights"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert not any(tmp_path.iterdir())
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False reads pickled weights"):
        TextToImagePipeline.from_pretrained(tmp_path, use_safetensors=False)
    for part, name in (("unet", "diffusion_pytorch_model"), ("prior", "diffusion_pytorch_model"), ("vae", "model")):
        weights = tmp_path / part / f"{name}.safetensors"
        pickle = weights.with_name("pytorch_model.bin" if name == "model" else f"{name}.bin")
        pickle.write_bytes(b"this would run code")
        saved = weights.read_bytes()
        weights.unlink()
        with pytest.raises(OSError, match="safetensors"):
            TextToImagePipeline.from_pretrained(tmp_path)
        weights.write_bytes(saved)
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    for options in ({}, {"use_safetensors": False}, {"use_safetensors": None}):
        with pytest.raises(OSError, match="safetensors"):
            CaptionPrior.from_pretrained(tmp_path / "prior", **options)


def test_a_variant_is_loaded_of_every_component(tmp_path):
    pipe = pipeline(vae=vae_of_hf_ae).to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "vae" / "model.fp16.safetensors").is_file()
    assert TextToImagePipeline.from_pretrained(tmp_path, variant="fp16").vae.config.scaling_factor == 0.7
