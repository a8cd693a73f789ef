"""Bad input of TextToImagePipeline: one clear line each. Tiny random models."""

import numpy as np
import pytest
import torch
from tiny_pipelines import PROMPT, SIDE, TOKENS, components, pipeline

from hf_ae.pipelines import TextToImagePipeline

PICTURE, TEXT = torch.zeros(3, SIDE, SIDE), torch.zeros(1, TOKENS, 16)
BAD = {
    "empty prompt": ({"prompt": " "}, "prompt=' ' says nothing to draw"),
    "latents as an array": ({"latents": np.zeros((1, 4, SIDE // 2, SIDE // 2))}, "of type ndarray: pass a tensor"),
    "one empty prompt": ({"prompt": ["a cat", ""]}, "none of them empty"),
    "no prompts": ({"prompt": []}, "says nothing to draw"),
    "prompt is no text": ({"prompt": 3}, "prompt=3 says nothing"),
    "negative is no text": ({"negative_prompt": 3}, "negative_prompt=3 must be a text"),
    "negatives do not match": ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts"),
    "height": ({"height": 17}, "height=17 does not divide by 2, the VAE's scale: write height=16 or height=18"),
    "width": ({"width": 0}, "width=0 must be a multiple of 2: write 2 or more"),
    "steps": ({"num_inference_steps": -3}, "num_inference_steps=-3 must be a whole number of at least 1"),
    "steps no int": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be a whole number"),
    "pictures": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a number"),
    "rescale": ({"guidance_rescale": 2}, "guidance_rescale=2 must be a number between 0 and 1"),
    "strength": ({"strength": 1.5, "image": PICTURE}, "strength=1.5 must be a number between 0 and 1"),
    "interval order": ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval=\(0.8, 0.2\) must be two fractions"),
    "interval length": ({"guidance_interval": 0.5}, "guidance_interval=0.5 must be two fractions"),
    "output type": ({"output_type": "jpg"}, "output_type='jpg' must be one of pil, np, pt, latent"),
    "latents": (
        {"latents": torch.zeros(1, 4, 8, 7)},
        r"latents must have shape \(1, 4, 8, 8\), but have \(1, 4, 8, 7\)",
    ),
    "latents no tensor": ({"latents": 3}, r"latents must have shape \(1, 4, 8, 8\), but have \(\)"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, "seed and generator both"),
    "seed": ({"seed": -1}, "seed=-1 must be a whole number"),
    "seeds": ({"seed": [1, 2]}, "2 seeds for 1 images"),
    "generators": ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    "candidates": ({"num_candidates": 2}, "num_candidates=2 needs a discriminator"),
    "no candidates": ({"num_candidates": 0}, "num_candidates=0 must be a whole number"),
    "image kind": ({"image": "cat.png"}, "image is a str"),
    "no image": ({"image": []}, "holds no image"),
    "image size": (
        {"image": torch.zeros(3, 15, 16)},
        "the image's height 15 does not divide by 2.*write height=14 or height=16",
    ),
    "image sizes": ({"image": [PICTURE, PICTURE[:, 2:]]}, "images of several sizes"),
    "image channels": ({"image": PICTURE[:1]}, r"image has shape \(1, 16, 16\)"),
    "image range": ({"image": PICTURE - 1}, r"image has values from -1 to -1: pass values in \[0, 1\]"),
    "images": ({"image": [PICTURE] * 2}, "2 images for 1 prompts"),
    "steps beyond training": (
        {"num_inference_steps": 1001},
        "num_inference_steps=1001: the scheduler was trained with 1000 steps: write at most as many",
    ),
    "timesteps": ({"timesteps": [900, 300]}, "DDIMScheduler takes no timesteps: write num_inference_steps="),
    "sigmas": ({"sigmas": [14.0, 0.1]}, "DDIMScheduler takes no sigmas"),
    "timesteps rise": ({"timesteps": [1, 2]}, r"timesteps=\[1, 2\] must be a list of falling numbers of at most 999"),
    "timesteps beyond training": ({"timesteps": [1000]}, "must be a list of falling numbers of at most 999"),
    "timesteps empty": ({"timesteps": []}, "must be a list of falling numbers"),
    "timesteps no list": ({"timesteps": 5}, "timesteps=5 must be a list"),
    "timesteps and sigmas": ({"timesteps": [1], "sigmas": [0.1]}, "timesteps and sigmas both say where to step"),
    "prompt and embeddings": ({"prompt_embeds": TEXT}, "prompt and prompt_embeds both say what to draw"),
    "no prompt": ({"prompt": None}, "prompt=None says nothing to draw"),
    "embeddings": ({"prompt": None, "prompt_embeds": TEXT[0]}, r"prompt_embeds must be a tensor \(prompts, tokens"),
    "embeddings' width": (
        {"prompt": None, "prompt_embeds": TEXT[..., :9]},
        "prompt_embeds have width 9, but the denoiser reads 16",
    ),
    "negatives and embeddings": (
        {"negative_prompt": "a", "negative_prompt_embeds": TEXT},
        "negative_prompt and negative_prompt_embeds both",
    ),
    "negative embeddings": (
        {"negative_prompt_embeds": torch.cat([TEXT] * 2)},
        "2 negative_prompt_embeds for 1 prompts",
    ),
    "embeddings do not match": (
        {"prompt": None, "prompt_embeds": TEXT, "negative_prompt_embeds": TEXT[:, 1:]},
        r"negative_prompt_embeds have shape \(1, 11, 16\), but prompt_embeds \(1, 12, 16\)",
    ),
    "layers": ({"clip_skip": -1}, "clip_skip=-1 must be a whole number of layers, or None"),
    "attention": ({"cross_attention_kwargs": 3}, "cross_attention_kwargs=3 must be a dictionary"),
    "image nan": ({"image": PICTURE * float("nan")}, "image has values from nan to nan"),
    "callback tensors": ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "a callback gets"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(shared_pipe, arguments, message):
    arguments = {"prompt": PROMPT, **arguments}
    for call in (shared_pipe, shared_pipe.stream):
        with pytest.raises(ValueError, match=message) as caught:
            call(**arguments)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def shared_pipe():
    return pipeline()


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_missing_component_is_named(name):
    pipe = TextToImagePipeline(**{**components(), name: None})
    with pytest.raises(ValueError, match=f"this pipeline has no {name}: load one"):
        pipe(PROMPT)


def test_unknown_arguments_are_named(shared_pipe):
    for call in (shared_pipe, shared_pipe.stream):
        with pytest.raises(TypeError, match="steps"):
            call(PROMPT, steps=3)
