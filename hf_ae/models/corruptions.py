"""What denoising removes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray: ITU-R BT.601."""


def corrupt(
    x: Tensor, kind: str, level: float, low: float = 0.0, high: float = 1.0, generator: torch.Generator | None = None,
    patch_size: int = 4,
) -> Tensor:  # fmt: skip
    """Damage pixel values `x` (batch, channels, height, width) in [low, high]; the result has their shape and range.

    gaussian: add noise of standard deviation level·(high − low), and limit to the range. masking: a fraction `level`
    of the pixels becomes `low`. salt_pepper: a fraction `level` becomes `low` or `high`, half each. patches: a
    fraction `level` of the squares of `patch_size` pixels becomes `low`, at least one and never all (He et al. 2022).
    brightness: what an image is above `low` is multiplied by exp(u), with one u in ±level for each image, limited to
    the range. low_resolution: average over level×level pixels, enlarged again. grayscale: luma in all three channels.
    A masked pixel is hit in every channel. Raises ValueError for another kind.
    """
    if kind == "gaussian":
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return (x + level * (high - low) * noise).clamp(low, high)
    if kind in ("masking", "salt_pepper"):
        uniform = torch.rand(x[:, :1].shape, generator=generator, device=x.device)  # one number for each pixel
        x = x.masked_fill(uniform < level, low)
        return x if kind == "masking" else x.masked_fill(uniform < level / 2, high)
    if kind == "patches":
        return x.masked_fill(hidden_patches(x, level, patch_size, generator), low)
    if kind == "brightness":
        uniform = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
        factor = torch.exp(level * (2 * uniform - 1)).to(x.dtype)
        return (low + (x - low) * factor).clamp(low, high)
    if kind == "low_resolution":
        small = F.avg_pool2d(x, int(level), ceil_mode=True, count_include_pad=False)
        return F.interpolate(small, scale_factor=float(level), mode="nearest")[..., : x.shape[-2], : x.shape[-1]]
    if kind == "grayscale":
        weights = torch.tensor(LUMA, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
        return (x * weights).sum(1, keepdim=True).expand_as(x)
    known = "gaussian, masking, salt_pepper, patches, brightness, low_resolution or grayscale"
    raise ValueError(f"corruption {kind!r} is not known: write {known}.")


def hidden_patches(x: Tensor, fraction: float, patch_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Which pixels of `x` lie in patches that are hidden: (batch, 1, height, width), as many patches in each image."""
    rows, columns = (-(-side // patch_size) for side in x.shape[-2:])
    hidden = min(max(round(fraction * rows * columns), 1), rows * columns - 1)
    order = torch.rand(len(x), rows * columns, generator=generator, device=x.device).argsort(1).argsort(1)
    mask = (order < hidden).view(-1, 1, rows, columns)
    mask = mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return mask[..., : x.shape[-2], : x.shape[-1]]
