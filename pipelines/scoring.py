"""Images and their prompts -> how well they fit, by a pipeline's discriminator."""

from __future__ import annotations

from typing import Any

import torch

from .image_io import dtype_of, read_images, require


class Scoring:
    """Scores of images by the `discriminator` of a pipeline, of which this is another base class."""

    @torch.no_grad()
    def score(self: Any, images: Any, prompts: str | list[str]) -> list[float]:
        """How well each image shows its prompt: in [0, 1], above 0.5 is yes. images: one or a list, as `image` of a
        call. Raises ValueError."""
        self._require("discriminator", "text_encoder", "tokenizer")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        config, device = self.vae.config, self._execution_device
        pixels = read_images(images, getattr(config, "in_channels", getattr(config, "num_channels", 3)), (None, None))
        require(len(pixels) == len(prompts), f"{len(pixels)} images for {len(prompts)} prompts: pass one for each.")
        with self._inferring():
            scores: list[float] = self._scores(pixels.to(device), self.embeddings(prompts, device, None)).tolist()
        return scores

    def _scores(self: Any, pixels: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """pixels in [0, 1] (images, channels, height, width), and the states of their prompts -> scores (images,)."""
        dtype, reads = dtype_of(self.discriminator), getattr(self.discriminator, "reads_prompts", False)
        logits = self.discriminator(pixels.mul(2).sub(1).to(dtype), *([states.to(dtype)] if reads else []))
        logits = getattr(logits, "logits", logits)
        return logits.float().reshape(len(pixels), -1).mean(dim=1).sigmoid()
