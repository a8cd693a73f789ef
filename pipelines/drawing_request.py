"""What a user asks a text-to-image pipeline for, checked before anything is computed, and gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers.utils.outputs import BaseOutput
from PIL import Image

from .image_io import read_images, require

Images = list[Image.Image] | np.ndarray | torch.Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CANDIDATE_STRIDE = 1_000_003
"""Candidate j of seed s is drawn with seed s + j·stride: far from the seeds s + 1, s + 2, ..."""


@dataclass
class TextToImageOutput(BaseOutput):
    """What a call returns.

    images: a list of PIL images; or an array (batch, height, width, channels) or a tensor (batch, channels, height,
    width) in [0, 1]; or scaled latents. scores: the discriminator's for each image, where it chose among candidates.
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

    prompt: Any
    negative_prompt: Any = None
    _: KW_ONLY
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
    strength: float = 0.8
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    prompts: list[str] = field(init=False)
    negatives: list[str] = field(init=False)
    """As many as there are prompts."""
    pixels: torch.Tensor | None = field(init=False, default=None)
    """Of the image to start from."""
    shape: tuple[int, ...] = field(init=False)
    """Of the latents of all images drawn."""
    captions: list[str] | None = field(init=False, default=None)
    """What the prior takes each prompt for."""

    @property
    def candidates_per_prompt(self) -> int:
        """Images drawn for each prompt."""
        return self.num_images_per_prompt * self.num_candidates

    def check(self, pipe: Any) -> DrawingRequest:
        """Fill in the pipeline's defaults and what follows from the arguments. Raises ValueError for what cannot be
        drawn."""
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(self, name) is None:
                setattr(self, name, pipe.config[f"default_{name}"])
        self._check_texts()
        self._check_numbers()
        choice = f"num_candidates={self.num_candidates} needs a discriminator to choose, and this pipeline has none"
        good = self.num_candidates == 1 or pipe.discriminator is not None
        require(good, f"{choice}: pipe.register_modules(discriminator=discriminator), or write num_candidates=1.")
        self._check_size(pipe)
        self._check_noise()
        return self

    def _check_texts(self) -> None:
        prompts, negatives = self.prompt, self.negative_prompt or ""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        good = is_texts(prompts) and prompts and all(text.strip() for text in prompts)
        require(
            good, f"prompt={self.prompt!r} says nothing to draw: write a text, or a list of texts, none of them empty."
        )
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
        require(is_texts(negatives), f"negative_prompt={negatives!r} must be a text or a list of texts.")
        counts = f"{len(negatives)} negative prompts for {len(prompts)} prompts"
        require(len(negatives) == len(prompts), f"{counts}: write one for all, or one for each.")
        self.prompts, self.negatives = list(prompts), list(negatives)

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
        tensors = self.callback_on_step_end_tensor_inputs
        good = list(tensors) == ["latents"]
        require(good, f"callback_on_step_end_tensor_inputs={tensors!r}: a callback gets ('latents',) alone.")

    def _check_size(self, pipe: Any) -> None:
        """Set `pixels`, and `shape` to that of one image's latents."""
        config, scale = pipe.vae.config, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        sides, of_image = [self.height, self.width], False
        for name, side in zip(("height", "width"), sides):
            good = side is None or is_number(side, 1, kind=Integral)
            require(good, f"{name}={side!r} must be a multiple of {scale}: write {scale} or more.")
        if self.image is not None:
            channels = getattr(config, "in_channels", getattr(config, "num_channels", 3))
            of_image, self.pixels = sides == [None, None], read_images(self.image, channels, sides)
            sides = list(self.pixels.shape[2:])
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
        prompts, wanted = len(self.prompts), len(self.prompts) * self.num_images_per_prompt
        drawn = wanted * self.num_candidates
        self.shape = (drawn, *self.shape)
        given = self.shape if self.latents is None else tuple(getattr(self.latents, "shape", ()))
        require(given == self.shape, f"latents must have shape {self.shape}, but have {given}.")
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


def is_number(value: Any, low: float = -(2**62), high: float = 2**62, kind: type = Real) -> bool:
    """Whether a value is a number of this kind between two others."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
