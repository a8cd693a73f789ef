"""Images and their prompts -> how well they fit, by a pipeline's discriminator."""

from __future__ import annotations

from typing import Any

import torch

from .drawing_request import DrawingRequest, is_texts
from .image_io import dtype_of, read_images, require


class Scoring:
    """Scores of images by the `discriminator` of a pipeline, of which this is another base class."""

    @torch.no_grad()
    def score(self: Any, images: Any, prompts: str | list[str]) -> list[float]:
        """How well each image shows its prompt: in [0, 1], above 0.5 is yes. images: one or a list, as `image` of a
        call. Raises ValueError."""
        reads = getattr(self.discriminator, "reads_prompts", False)
        self._require("discriminator", *(("text_encoder", "tokenizer") if reads else ()))
        texts = [prompts] if isinstance(prompts, str) else prompts
        require(is_texts(texts), f"prompts={prompts!r} must be a text or a list of texts.")
        config, device = self.vae.config, self._execution_device
        channels = getattr(config, "in_channels", getattr(config, "num_channels", 3))
        several = images if isinstance(images, (list, tuple)) else [images]
        pixels = [one[None] for image in several for one in read_images(image, channels, (None, None)).to(device)]
        require(len(pixels) == len(texts), f"{len(pixels)} images for {len(texts)} prompts: pass one for each.")
        with self._inferring():
            states = self.embeddings(list(texts), device, None) if reads else torch.zeros(len(texts), 1)
            return [self._scores(one, states[i : i + 1]).item() for i, one in enumerate(pixels)]

    def _judged(self: Any, request: DrawingRequest, pixels: torch.Tensor, states: torch.Tensor) -> Any:
        """The scores of all images drawn; None where there is no discriminator, or none of the prompts that it
        reads."""
        reads = getattr(self.discriminator, "reads_prompts", False)
        if self.discriminator is None or (reads and request.unprompted):
            return None
        if reads and request.clip_skip is not None and request.prompts is not None:  # it was trained on all layers
            states = self._for_each_image(
                request, self.embeddings(request.prompts, pixels.device, None), pixels.device
            )
        return self._scores(pixels, states)

    def _scores(self: Any, pixels: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """pixels in [0, 1] (images, channels, height, width), and the states of their prompts -> scores (images,)."""
        dtype, reads = dtype_of(self.discriminator), getattr(self.discriminator, "reads_prompts", False)
        logits = self.discriminator(pixels.mul(2).sub(1).to(dtype), *([states.to(dtype)] if reads else []))
        logits = getattr(logits, "logits", logits)
        return logits.float().reshape(len(pixels), -1).mean(dim=1).sigmoid()
