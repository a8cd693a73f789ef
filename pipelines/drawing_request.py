"""What a user asks a text-to-image pipeline for, checked before anything is computed, and gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.outputs import BaseOutput
from PIL import Image

from .image_io import read_images, require
from .inpainting import Inpainting

Images = list[Image.Image] | np.ndarray | torch.Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CANDIDATE_STRIDE = 1_000_003
"""Candidate j of seed s is drawn with seed s + j·stride: far from the seeds s + 1, s + 2, ..."""


@dataclass
class TextToImageOutput(BaseOutput):
    """What a call returns.

    images: a list of PIL images; or an array (batch, height, width, channels) or a tensor (batch, channels, height,
    width) in [0, 1]; or scaled latents. scores: the discriminator's for each image, in [0, 1], where there is one.
    captions: what the prior took each prompt for.
    """

    images: Images
    scores: list[float] | None = None
    captions: list[str] | None = None


@dataclass
class Preview:
    """All candidates after `step` (1 is the first) of `num_steps`, in the form of `TextToImageOutput.images`."""

    step: int
    num_steps: int
    images: Images


@dataclass
class DrawingRequest:
    """The arguments of a call, which `TextToImagePipeline.__call__` explains, and what follows from them."""

    prompt: Any = None
    negative_prompt: Any = None
    _: KW_ONLY
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    clip_skip: Any = None
    cross_attention_kwargs: dict[str, Any] | None = None
    timesteps: Any = None
    sigmas: Any = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: Any = None
    guidance_scale: Any = None
    guidance_rescale: float = 0.0
    guidance_interval: Any = (0.0, 1.0)
    seed: Any = None
    generator: Any = None
    num_images_per_prompt: int = 1
    num_candidates: int = 1
    latents: Any = None
    image: Any = None
    mask_image: Any = None
    strength: float = 0.8
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    prompts: list[str] | None = field(init=False)
    """None where `prompt_embeds` say what to draw."""
    negatives: list[str] = field(init=False)
    """As many as there are prompts."""
    num_prompts: int = field(init=False)
    pixels: torch.Tensor | None = field(init=False, default=None)
    """Of the image to start from."""
    mask: torch.Tensor | None = field(init=False, default=None)
    """Of the image, (images, 1, height, width) in [0, 1]: 1 where to paint anew."""
    kept: Inpainting | None = field(init=False, default=None)
    """What the mask keeps of the image, once it is encoded."""
    shape: tuple[int, ...] = field(init=False)
    """Of the latents of all images drawn."""
    captions: list[str] | None = field(init=False, default=None)
    """What the prior takes each prompt for."""

    @property
    def unprompted(self) -> bool:
        """Whether an image alone says what to draw: a variation of it."""
        return self.prompt is None and self.prompt_embeds is None and self.image is not None

    @property
    def candidates_per_prompt(self) -> int:
        """Images drawn for each prompt."""
        return self.num_images_per_prompt * self.num_candidates

    def check(self, pipe: Any) -> DrawingRequest:
        """Fill in the pipeline's defaults and what follows from the arguments. Raises ValueError for what cannot be
        drawn."""
        if self.unprompted and self.guidance_scale is None and self.negative_prompt is None:
            self.guidance_scale = 1.0  # towards nothing there is no guidance
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(self, name) is None:
                setattr(self, name, pipe.config[f"default_{name}"])
        self.check_texts()
        self._check_numbers()
        self._check_steps(pipe.scheduler)
        self._check_callback(pipe._callback_tensor_inputs)
        width = pipe.unet.config.get("encoder_hid_dim") or pipe.unet.config.cross_attention_dim
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            own = width if getattr(self, name) is None else getattr(self, name).shape[-1]
            good = own == width or not isinstance(width, int)
            require(good, f"{name} have width {own}, but the denoiser reads {width}.")
        choice = f"num_candidates={self.num_candidates} needs a discriminator to choose, and this pipeline has none"
        good = self.num_candidates == 1 or pipe.discriminator is not None
        require(good, f"{choice}: pipe.register_modules(discriminator=discriminator), or write num_candidates=1.")
        reads = getattr(pipe.discriminator, "reads_prompts", False)
        good = self.num_candidates == 1 or not (reads and self.unprompted)
        require(
            good, f"num_candidates={self.num_candidates}: without a prompt the discriminator has nothing to choose by."
        )
        self._check_size(pipe)
        self._check_noise()
        return self

    def check_texts(self) -> None:
        """Set `prompts`, `negatives` and `num_prompts`."""
        prompts, negatives = self.prompt, self.negative_prompt or ""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if self.unprompted:
            several = isinstance(self.image, (list, tuple)) or getattr(self.image, "ndim", 3) == 4
            prompts = [""] * (len(self.image) if several else 1)
        if self.prompt_embeds is None:
            good = is_texts(prompts) and prompts and (self.unprompted or all(text.strip() for text in prompts))
            advice = "write a text, or a list of texts, none of them empty"
            require(good, f"prompt={self.prompt!r} says nothing to draw: {advice}.")
            self.num_prompts = len(prompts)
        else:
            require(prompts is None, "prompt and prompt_embeds both say what to draw: write one of them.")
            check_embeddings("prompt_embeds", self.prompt_embeds, None)
            self.num_prompts = len(self.prompt_embeds)
        negatives = [negatives] * self.num_prompts if isinstance(negatives, str) else negatives
        require(is_texts(negatives), f"negative_prompt={negatives!r} must be a text or a list of texts.")
        counts = f"{len(negatives)} negative prompts for {self.num_prompts} prompts"
        require(len(negatives) == self.num_prompts, f"{counts}: write one for all, or one for each.")
        if self.negative_prompt_embeds is not None:
            both = "negative_prompt and negative_prompt_embeds both say what to move away from: write one of them."
            require(self.negative_prompt is None, both)
            like = None if self.prompt_embeds is None else tuple(self.prompt_embeds.shape)
            check_embeddings("negative_prompt_embeds", self.negative_prompt_embeds, like)
            count = len(self.negative_prompt_embeds)
            require(count == self.num_prompts, f"{count} negative_prompt_embeds for {self.num_prompts} prompts.")
        self.prompts, self.negatives = None if prompts is None else list(prompts), list(negatives)

    def _check_numbers(self) -> None:
        for name in ("num_inference_steps", "num_images_per_prompt", "num_candidates"):
            value = getattr(self, name)
            require(is_number(value, 1, kind=Integral), f"{name}={value!r} must be a whole number of at least 1.")
        good = is_number(self.guidance_scale)
        require(good, f"guidance_scale={self.guidance_scale!r} must be a number, 1 for no guidance.")
        for name in ("guidance_rescale", "strength"):
            value = getattr(self, name)
            require(is_number(value, 0, 1), f"{name}={value!r} must be a number between 0 and 1.")
        span = self.guidance_interval
        good = isinstance(span, (list, tuple)) and len(span) == 2
        good = good and is_number(span[1], 0, 1) and is_number(span[0], 0, span[1])
        require(good, f"guidance_interval={span!r} must be two fractions of the steps, as (0.0, 1.0) or (0.2, 0.8).")
        good, listed = self.output_type in OUTPUT_TYPES, ", ".join(OUTPUT_TYPES)
        require(good, f"output_type={self.output_type!r} must be one of {listed}.")
        good = self.clip_skip is None or is_number(self.clip_skip, 0, kind=Integral)
        require(good, f"clip_skip={self.clip_skip!r} must be a whole number of layers, or None.")
        good = self.cross_attention_kwargs is None or isinstance(self.cross_attention_kwargs, dict)
        require(good, f"cross_attention_kwargs={self.cross_attention_kwargs!r} must be a dictionary, or None.")

    def _check_steps(self, scheduler: Any) -> None:
        """Whether the scheduler may be asked for these steps."""
        limit, name = scheduler.config.get("num_train_timesteps"), type(scheduler).__name__
        given = [key for key in ("timesteps", "sigmas") if getattr(self, key) is not None]
        require(len(given) < 2, "timesteps and sigmas both say where to step: write one of them.")
        if not given:
            trained = f"num_inference_steps={self.num_inference_steps}: the scheduler was trained with {limit} steps"
            good = limit is None or self.num_inference_steps <= limit
            require(good, f"{trained}: write at most as many.")
        for key in given:
            values = getattr(self, key)
            values = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
            top = limit - 1 if key == "timesteps" and limit is not None else 2**62
            good = isinstance(values, (list, tuple)) and values and all(is_number(value, 0, top) for value in values)
            good = good and all(after < before for before, after in pairwise(values))
            bound = f" of at most {top}" if top < 2**62 else ""
            require(good, f"{key}={values!r} must be a list of falling numbers{bound}, none of them negative.")
            takes = key in inspect.signature(scheduler.set_timesteps).parameters
            require(takes, f"{name} takes no {key}: write num_inference_steps=, or draw with another scheduler.")
            setattr(self, key, list(values))

    def _check_callback(self, known: Sequence[str]) -> None:
        """Callbacks of diffusers say themselves which tensors they want."""
        callback = self.callback_on_step_end
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_on_step_end_tensor_inputs = callback.tensor_inputs
        tensors = self.callback_on_step_end_tensor_inputs
        good, listed = all(name in known for name in tensors), ", ".join(known)
        require(good, f"callback_on_step_end_tensor_inputs={tensors!r}: a callback gets some of {listed}.")

    def _check_size(self, pipe: Any) -> None:
        """Set `pixels`, and `shape` to that of one image's latents."""
        config, scale = pipe.vae.config, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        sides, of_image = [self.height, self.width], False
        for name, side in zip(("height", "width"), sides):
            good = side is None or is_number(side, 1, kind=Integral)
            require(good, f"{name}={side!r} must be a multiple of {scale}: write {scale} or more.")
        require(
            self.mask_image is None or self.image is not None, "mask_image names parts of an image: pass image, too."
        )
        if self.image is not None:
            channels = getattr(config, "in_channels", getattr(config, "num_channels", 3))
            of_image, self.pixels = sides == [None, None], read_images(self.image, channels, sides)
            sides = list(self.pixels.shape[2:])
            if self.mask_image is not None:
                self.mask = read_images(self.mask_image, 1, sides, "mask_image")
                images, masks = len(self.pixels), len(self.mask)
                require(masks in (1, images), f"{masks} masks for {images} images: pass one for all, or one for each.")
        elif None in sides:
            size = pipe.unet.config.sample_size
            require(size is not None, "the UNet's config has no sample_size: write height= and width=.")
            sides = [
                side or scale * latent for side, latent in zip(sides, (size, size) if isinstance(size, int) else size)
            ]
        height, width = (side or 0 for side in sides)
        for name, side in (("height", height), ("width", width)):
            below, what = max(side // scale, 1) * scale, f"the image's {name} {side}" if of_image else f"{name}={side}"
            choice = f"write {name}={below} or {name}={below + scale}"
            require(side % scale == 0, f"{what} does not divide by {scale}, the VAE's scale: {choice}.")
        self.shape = (pipe.unet.config.in_channels, height // scale, width // scale)

    def _check_noise(self) -> None:
        """Make `shape` that of all latents, and `generator` one for all or a list with one for each image drawn."""
        prompts, wanted = self.num_prompts, self.num_prompts * self.num_images_per_prompt
        drawn = wanted * self.num_candidates
        self.shape = (drawn, *self.shape)
        given = self.shape if self.latents is None else tuple(getattr(self.latents, "shape", ()))
        require(given == self.shape, f"latents must have shape {self.shape}, but have {given}.")
        tensor = self.latents is None or isinstance(self.latents, torch.Tensor)
        require(tensor, f"latents are of type {type(self.latents).__name__}: pass a tensor.")
        images = 1 if self.pixels is None else len(self.pixels)
        require(images in (1, prompts), f"{images} images for {prompts} prompts: pass one for all, or one for each.")
        if self.generator is not None:
            require(self.seed is None, "seed and generator both say what to draw: write one of them.")
            if isinstance(self.generator, (list, tuple)):
                self.generator = list(self.generator)
                counts = f"{len(self.generator)} generators for {drawn} images to draw"
                require(len(self.generator) == drawn, f"{counts}: pass one for all, or one for each.")
            return
        seeds: Any = torch.randint(2**31, (wanted,)).tolist() if self.seed is None else self.seed
        seeds = range(seeds, seeds + wanted) if is_number(seeds, 0, kind=Integral) else seeds
        good = isinstance(seeds, (list, tuple, range)) and all(is_number(seed, 0, kind=Integral) for seed in seeds)
        require(good, f"seed={self.seed!r} must be a whole number of at least 0, or a list of them.")
        require(len(seeds) == wanted, f"{len(seeds)} seeds for {wanted} images: write one, or one for each image.")
        own = [int(seed) + CANDIDATE_STRIDE * j for seed in seeds for j in range(self.num_candidates)]
        self.generator = [torch.Generator().manual_seed(seed) for seed in own]


class DrawingState:
    """What callbacks read and change of the drawing at hand; afterwards it is that of the last one."""

    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _clip_skip: int | None = None
    _cross_attention_kwargs: dict[str, Any] | None = None
    _interrupt: bool = False

    def _begin(self, request: DrawingRequest) -> None:
        self._guidance_scale, self._clip_skip = request.guidance_scale, request.clip_skip
        self._cross_attention_kwargs, self._interrupt = request.cross_attention_kwargs, False

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self: Any) -> bool:
        """Whether steps are guided: UNets that take the guidance scale as an input guide themselves."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """Steps to take."""
        return self._num_timesteps

    @property
    def clip_skip(self) -> int | None:
        """Layers of the text encoder that are left out."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """What the attention processors of the UNet get."""
        return self._cross_attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Set it to True, in a callback or between two previews, and the image is decoded as it is."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value


def is_number(value: Any, low: float = -(2**62), high: float = 2**62, kind: type = Real) -> bool:
    """Whether a value is a number of this kind between two others."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def check_embeddings(name: str, value: Any, like: tuple[int, ...] | None) -> None:
    """Raise ValueError unless a value is a tensor (prompts, tokens, width), of the shape `like` where there is one."""
    good = isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) > 0
    require(good, f"{name} must be a tensor (prompts, tokens, width), as encode_prompt returns it.")
    require(like in (None, tuple(value.shape)), f"{name} have shape {tuple(value.shape)}, but prompt_embeds {like}.")
