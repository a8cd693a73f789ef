"""Pipelines of diffusers that hold a VAE of ours, unchanged classes. Tiny random models."""

import json
import subprocess
import sys

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from tiny_pipelines import PROMPT, components, noise, stock, vae_of_hf_ae

READER = """
import json, sys
import hf_ae
import numpy, torch
from diffusers import {cls}
pipe = {cls}.from_pretrained(sys.argv[1], safety_checker=None)
pipe.set_progress_bar_config(disable=True)
latents = torch.from_numpy(numpy.load(sys.argv[2]))
images = pipe("{prompt}", latents=latents, num_inference_steps=2, output_type="np").images
print(json.dumps([type(pipe).__name__, type(pipe.vae).__module__, images.tolist()]))
"""


@pytest.mark.parametrize("cls", ["StableDiffusionPipeline", "DiffusionPipeline"])
def test_a_stock_pipeline_with_our_vae_is_saved_and_loaded_by_the_stock_class(tmp_path, cls):
    pipe = stock(**components(vae=vae_of_hf_ae))
    expected = pipe(PROMPT, latents=noise(), num_inference_steps=2, output_type="np").images
    pipe.save_pretrained(tmp_path / "pipe")
    np.save(tmp_path / "noise.npy", noise().numpy())
    code = READER.format(cls=cls, prompt=PROMPT)
    command = [sys.executable, "-c", code, str(tmp_path / "pipe"), str(tmp_path / "noise.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    kind, module, images = json.loads(done.stdout.splitlines()[-1])
    assert (kind, module) == ("StableDiffusionPipeline", "hf_ae.models.modeling_vae")
    np.testing.assert_array_equal(np.array(images, dtype=np.float32), expected)


def test_a_loaded_stock_pipeline_is_saved_again(tmp_path):
    pipe = stock(**components(vae=vae_of_hf_ae))
    pipe.save_pretrained(tmp_path / "first")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "first", safety_checker=None)
    again.save_pretrained(tmp_path / "second")
    last = StableDiffusionPipeline.from_pretrained(tmp_path / "second", safety_checker=None)
    assert type(last.vae) is type(pipe.vae) and last.vae.config.scaling_factor == 0.7
