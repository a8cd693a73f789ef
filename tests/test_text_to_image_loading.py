"""TextToImagePipeline beside stock Stable Diffusion, and its ways from folders. test_hub.py has those from the Hub."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline
from tiny_pipelines import (
    PROMPT,
    SIDE,
    autoencoder_kl,
    bert,
    clip,
    components,
    noise,
    pipeline,
    ship,
    stock,
    vae_of_hf_ae,
)

import hf_ae
from hf_ae.pipelines import TextToImagePipeline

# Against stock Stable Diffusion


@pytest.mark.parametrize("text", [clip, lambda: bert(use_attention_mask=True)], ids=["clip", "bert"])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "pndm", "heun", "lcm"])
def test_draws_what_stock_stable_diffusion_draws(name, text):
    parts = components(text, noise=name)
    call = dict(
        num_inference_steps=4, guidance_scale=5.0, num_images_per_prompt=2, guidance_rescale=0.5, output_type="np"
    )
    prompts, negatives = [PROMPT, "the dog"], ["a hat", "a mat"]
    if name == "lcm":  # draws noise on its way
        call |= dict(generator=[torch.Generator().manual_seed(i) for i in range(4)])
    expected = stock(**parts)(prompts, negative_prompt=negatives, latents=noise(4), **call).images
    if name == "lcm":
        call |= dict(generator=[torch.Generator().manual_seed(i) for i in range(4)])
    images = TextToImagePipeline(**parts)(prompts, negatives, latents=noise(4), **call).images
    np.testing.assert_allclose(images, expected, atol=2e-6)
    assert images.std() > 0.01


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun"])
def test_image_to_image_draws_what_stock_draws(name):
    parts = components(vae=vae_of_hf_ae, noise=name)
    parts["vae"].encode = encode_mode(parts["vae"])
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    call = dict(image=image, strength=0.6, num_inference_steps=5, guidance_scale=4.0, output_type="np")
    expected = stock(StableDiffusionImg2ImgPipeline, **parts)(
        PROMPT, generator=torch.Generator().manual_seed(5), **call
    ).images
    images = TextToImagePipeline(**parts)(PROMPT, generator=torch.Generator().manual_seed(5), **call).images
    np.testing.assert_allclose(images, expected, atol=2e-6)


def encode_mode(vae):
    """Stock samples the posterior; with its mode instead the two can be compared."""
    encode = vae.encode

    def wrapped(x, **options):
        encoded = encode(x, **options)
        encoded.latent_dist.sample = lambda generator=None: encoded.latent_dist.mode()
        return encoded

    return wrapped


def test_stock_stable_diffusion_runs_with_our_vae():
    parts = components(vae=vae_of_hf_ae)
    expected = stock(**parts)(PROMPT, latents=noise(), num_inference_steps=2, output_type="np").images
    images = TextToImagePipeline(**parts)(PROMPT, latents=noise(), num_inference_steps=2, output_type="np").images
    np.testing.assert_allclose(images, expected, atol=2e-6)


def test_loads_a_stable_diffusion_folder_unchanged(tmp_path, warnings):
    parts = components(noise="pndm")
    stock(**parts).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"requires_safety_checker": True, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))  # with the checker that it has on the Hub
    loaded, call = TextToImagePipeline.from_pretrained(tmp_path), dict(num_inference_steps=2, seed=1, output_type="np")
    loaded.set_progress_bar_config(disable=True)
    assert len(warnings) == 1 and "safety_checker is not run" in warnings[0]
    expected = stock(**parts)(
        PROMPT, generator=torch.Generator().manual_seed(1), num_inference_steps=2, output_type="np"
    ).images
    np.testing.assert_allclose(loaded(PROMPT, **call).images, expected, atol=2e-6)


# Loading and saving


@pytest.mark.parametrize("remote", [True, False], ids=["remote-code", "plain"])
def test_own_repo_loads_without_running_its_code(tmp_path, remote):
    pipe = pipeline(vae=vae_of_hf_ae, default_guidance_scale=3.0)
    loaded = TextToImagePipeline.from_pretrained(ship(pipe, tmp_path, remote), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is TextToImagePipeline and type(loaded.vae) is hf_ae.VAEModel
    assert (loaded.config.default_num_inference_steps, loaded.config.default_guidance_scale) == (3, 3.0)
    np.testing.assert_array_equal(
        loaded(PROMPT, seed=0, output_type="np").images, pipe(PROMPT, seed=0, output_type="np").images
    )
    other = TextToImagePipeline.from_pretrained(tmp_path, vae=autoencoder_kl(), dtype=torch.bfloat16)
    assert isinstance(other.vae, AutoencoderKL) and other.unet.dtype == torch.bfloat16


def test_a_model_type_that_nobody_registered_is_named(tmp_path):
    ship(pipeline(vae=vae_of_hf_ae), tmp_path)
    path = tmp_path / "vae" / "config.json"
    path.write_text(path.read_text().replace("hf_ae_vae", "unheard_of"))
    with pytest.raises(ValueError, match=r"vae is a 'unheard_of' model.*import"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_takes_over_the_parts_of_a_stock_pipeline():
    parts = components()
    pipe = TextToImagePipeline(**stock(**parts).components)
    assert pipe.unet is parts["unet"] and TextToImagePipeline.from_pipe(stock(**parts)).vae is parts["vae"]
