"""diffusers' own common tests of pipelines over ours, and those of Stable Diffusion with our VAE for theirs."""

import importlib.util
import sys
import types
import unittest

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import PROMPT, SIDE, autoencoder_kl, components, vae_of_hf_ae
from transformers import CLIPTokenizer
from upstream import as_package, diffusers_source, excluded

import hf_ae
from hf_ae.pipelines import TextToImagePipeline

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

as_package("diffusers_tests", diffusers_source() / "tests")

# Modules that the tests of models import at their top and those of pipelines never use.
for _name in ("requests_mock",):
    if importlib.util.find_spec(_name) is None:
        sys.modules[_name] = types.ModuleType(_name)

from diffusers_tests.pipelines import pipeline_params as named  # noqa: E402
from diffusers_tests.pipelines import test_pipelines_common as common  # noqa: E402
from diffusers_tests.pipelines.stable_diffusion import test_stable_diffusion as text_to_image  # noqa: E402
from diffusers_tests.pipelines.stable_diffusion import test_stable_diffusion_img2img as image_to_image  # noqa: E402
from diffusers_tests.pipelines.stable_diffusion import test_stable_diffusion_inpaint as inpainting  # noqa: E402

torch.use_deterministic_algorithms(False)  # which importing them switches on, for all tests of this process

if importlib.util.find_spec("torchsde") is None:
    common.KarrasDiffusionSchedulers = [s for s in common.KarrasDiffusionSchedulers if "SDE" not in s.name]

HUB = "loads a pipeline from the Hub"
EXCLUSIONS = {"test_from_pipe_consistent_config": HUB}
FUSED = {"test_fused_qkv_projections": "fuses the VAE too, which diffusers does with its AutoencoderKL alone"}
OUR_VAE = FUSED | {
    "test_StableDiffusionMixin_component": "asks for a VAE of a class of diffusers",
    "test_multi_vae": "reads norm_num_groups of the VAE, to make others like it",
    "test_save_load_local": "looks for each component in the log of diffusers' loader; AutoModel loads ours",
}
OTHER_WEIGHTS = "compares pixels with those of the VAE that ours stands in for"
STABLE_DIFFUSION = FUSED | {
    "test_stable_diffusion_no_safety_checker": HUB,
    "test_pipeline_accept_tuple_type_unet_sample_size": HUB,
    "test_stable_diffusion_ddim": OTHER_WEIGHTS,
    "test_stable_diffusion_ddim_factor_8": OTHER_WEIGHTS,
    "test_stable_diffusion_k_euler": OTHER_WEIGHTS,
    "test_stable_diffusion_k_euler_ancestral": OTHER_WEIGHTS,
    "test_stable_diffusion_k_lms": OTHER_WEIGHTS,
    "test_stable_diffusion_lcm": OTHER_WEIGHTS,
    "test_stable_diffusion_lcm_custom_timesteps": OTHER_WEIGHTS,
    "test_stable_diffusion_negative_prompt": OTHER_WEIGHTS,
    "test_stable_diffusion_pndm": OTHER_WEIGHTS,
}
IMAGE_TO_IMAGE = {
    "test_stable_diffusion_img2img_default_case": OTHER_WEIGHTS,
    "test_stable_diffusion_img2img_default_case_lcm": OTHER_WEIGHTS,
    "test_stable_diffusion_img2img_default_case_lcm_custom_timesteps": OTHER_WEIGHTS,
    "test_stable_diffusion_img2img_k_lms": OTHER_WEIGHTS,
    "test_stable_diffusion_img2img_multiple_init_images": OTHER_WEIGHTS,
    "test_stable_diffusion_img2img_negative_prompt": OTHER_WEIGHTS,
    "test_stable_diffusion_img2img_tiny_autoencoder": OTHER_WEIGHTS,
}
INPAINTING = {
    "test_stable_diffusion_inpaint": OTHER_WEIGHTS,
    "test_stable_diffusion_inpaint_lcm": OTHER_WEIGHTS,
    "test_stable_diffusion_inpaint_lcm_custom_timesteps": OTHER_WEIGHTS,
}
# Tests that need CUDA or xformers skip themselves.


class SafePipeline(TextToImagePipeline):
    """Ours, which refuses to write the pickles that most tests ask for: they get safetensors."""

    def save_pretrained(self, save_directory, safe_serialization=True, **kwargs):
        super().save_pretrained(save_directory, **kwargs)


diffusers.pipelines.SafePipeline = SafePipeline  # where the tests look for the source text of a pipeline


class Suite(
    common.SDFunctionTesterMixin,
    common.PipelineLatentTesterMixin,
    common.PipelineKarrasSchedulerTesterMixin,
    common.PipelineFromPipeTesterMixin,
    common.PipelineTesterMixin,
):
    pipeline_class = SafePipeline
    params, batch_params = named.TEXT_TO_IMAGE_PARAMS, named.TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = image_latents_params = frozenset()
    callback_cfg_params = named.TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
    test_layerwise_casting = test_group_offloading = True
    vae = staticmethod(autoencoder_kl)

    def get_dummy_components(self):
        parts = components(vae=self.vae)
        return {**dict.fromkeys(TextToImagePipeline._optional_components), **parts}

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        call = dict(num_inference_steps=2, guidance_scale=6.0, output_type="np")
        return dict(prompt=PROMPT, generator=generator, **call)


class TestTextToImage(excluded(Suite, EXCLUSIONS), unittest.TestCase):
    """With the VAE of diffusers."""


class TestTextToImageWithOurVAE(excluded(Suite, EXCLUSIONS | OUR_VAE), unittest.TestCase):
    vae = staticmethod(vae_of_hf_ae)


class ImageSuite(Suite):
    params = named.TEXT_GUIDED_IMAGE_VARIATION_PARAMS
    batch_params = named.TEXT_GUIDED_IMAGE_VARIATION_BATCH_PARAMS
    image_params = frozenset({"image"})

    def get_dummy_inputs(self, device, seed=0):
        pixels = np.random.default_rng(seed).random((1, 3, SIDE, SIDE), dtype=np.float32)
        image = torch.from_numpy(pixels).to(device)
        return super().get_dummy_inputs(device, seed) | dict(image=image, strength=0.75, num_inference_steps=4)


class TestImageToImage(excluded(ImageSuite, EXCLUSIONS), unittest.TestCase):
    """With an image to start from."""


# Stock Stable Diffusion with our VAE


def tokenizer(*args, **kwargs):
    """Spells all that ASCII has: instead of one that the tests take from the Hub."""
    signs = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *signs, *(sign + "</w>" for sign in signs)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


class WithOurVAE:
    def get_dummy_components(self, **options):
        """As upstream, but for the VAE and the tokenizer."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CLIPTokenizer, "from_pretrained", tokenizer)
            parts = super().get_dummy_components(**options)
        torch.manual_seed(0)
        size = dict(image_size=64, num_channels=3, hidden_sizes=[4, 8], latent_channels=4)
        config = hf_ae.VAEConfig(network="resnet", pixel_range=[-1.0, 1.0], scaling_factor=0.18215, **size)
        parts["vae"] = hf_ae.VAEModel(config).eval()
        return parts


class TestStableDiffusion(WithOurVAE, excluded(text_to_image.TestStableDiffusionPipeline, STABLE_DIFFUSION)):
    """From a prompt."""


class TestStableDiffusionImageToImage(
    WithOurVAE, excluded(image_to_image.TestStableDiffusionImg2ImgPipeline, IMAGE_TO_IMAGE)
):
    """From a prompt and an image."""


class TestStableDiffusionInpainting(WithOurVAE, excluded(inpainting.TestStableDiffusionInpaintPipeline, INPAINTING)):
    """From a prompt, an image and a mask."""
