"""Painting anew what a mask names, and keeping the rest of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass
class Inpainting:
    """mask: (images, 1, height, width), 1 where to paint anew and 0 where to keep `pixels` (images, channels, height,
    width), in [0, 1]. clean, noise: the latents of the image, and what is added to them, (images, channels, rows,
    columns)."""

    mask: torch.Tensor
    pixels: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, pixels: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> Inpainting:
        """A mask and an image for all latents, or for each n latents one."""
        mask, pixels = (x.to(clean.device).repeat_interleave(len(clean) // len(x), dim=0) for x in (mask, pixels))
        return cls(mask, pixels, clean, noise)

    def keep_latents(self, scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor | None) -> torch.Tensor:
        """The latents before a timestep (None: after the last) with those of the image, as noisy as these, where it is
        kept (Lugmayr et al. 2022, equation 8). A position is painted anew if the mask names a pixel of it."""
        known = self.clean
        if timestep is not None:
            known = scheduler.add_noise(known, self.noise, timestep.reshape(1).repeat(len(known)))
        mask = F.adaptive_max_pool2d(self.mask, latents.shape[2:])
        return torch.where(mask > 0.5, latents, known.to(latents.dtype))

    def keep_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Painted pixels where the mask is 1, the image's own where it is 0, and a blend of both between."""
        return self.mask * pixels + (1 - self.mask) * self.pixels
