"""uint8 images -> the pixel values that a model is shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def to_pixel_values(
    pixels: Tensor, device: torch.device | str, pixel_range: Sequence[float], flip: bool = False,
    symmetry: bool = False, colors: bool = False, shift: int = 0, binarize: bool = False,
) -> Tensor:  # fmt: skip
    """uint8 batch (batch, channels, height, width) -> float `pixel_values` in `pixel_range` on `device`.

    flip: mirror half of the images. symmetry: one of the eight symmetries of the square for each image. colors:
    shuffle the channels of two images in three. shift: move each by up to `shift` pixels, repeating its border.
    binarize: draw each pixel from a Bernoulli with its gray value as probability. Pixel values, which the rows of a
    table are, stay as they are.
    """
    if pixels.is_floating_point():
        return pixels.to(device, non_blocking=True)
    x = pixels.to(device, non_blocking=True).float().div_(255)
    if symmetry:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.transpose(2, 3), x)
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-2), x)
    if colors:
        order = torch.rand(x.shape[:2], device=device).argsort(1)
        unchanged = torch.rand(len(x), 1, device=device) < 1 / 3
        order = torch.where(unchanged, torch.arange(x.shape[1], device=device), order)
        x = x.gather(1, order[:, :, None, None].expand_as(x))
    if flip or symmetry:
        mirrored = torch.rand(len(x), device=device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if shift:
        x = shift_randomly(x, shift)
    if binarize:
        x = torch.bernoulli(x)
    low, high = pixel_range
    return x if (low, high) == (0.0, 1.0) else x * (high - low) + low


def shift_randomly(x: Tensor, most: int) -> Tensor:
    """Move each image by a whole number of pixels from -most to most, down and right, repeating its border."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (most,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2, batch, 1), device=x.device)
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(batch, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


def binarized_once(pixels: Tensor, seed: int = 0) -> Tensor:
    """One fixed Bernoulli draw of uint8 images, as 0 and 255: the test set of binarised MNIST."""
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (noise < pixels.float() / 255).to(torch.uint8) * 255
