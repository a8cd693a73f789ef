"""Work on a large image in overlapping tiles, and blend them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: int, down: bool) -> Tensor:
    """`function` on overlapping tiles of `x` (batch, channels, height, width), blended linearly over the overlap.

    `tile`: height and width of a tile of `x`; neighbours overlap by a quarter of it. `function` divides height and
    width by `scale` (`down`) or multiplies by it. Every output position is the weighted mean of the tiles that cover
    it, so there are no seams and any size is covered.
    """
    step = scale if down else 1
    tile = max(tile // step, 1) * step
    overlap = max(tile // 4 // step, 1) * step

    def out(size: int) -> int:
        return size // scale if down else size * scale

    height, width = x.shape[-2:]
    total = weight = torch.empty(0)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            y = function(x[..., top : top + tile, left : left + tile])
            if not total.numel():
                total = y.new_zeros(*y.shape[:2], out(height), out(width), dtype=torch.float32)
                weight = torch.zeros(out(height), out(width), device=y.device)
            window = ramp(y.shape[-2], out(overlap), y.device)[:, None] * ramp(y.shape[-1], out(overlap), y.device)
            rows, columns = slice(out(top), out(top) + y.shape[-2]), slice(out(left), out(left) + y.shape[-1])
            total[..., rows, columns] += y.float() * window
            weight[rows, columns] += window
    return (total / weight).to(y.dtype)


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `size` and overlap by at least `overlap`."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    """Weights (length,): 1 inside, falling linearly towards both ends over `overlap` values."""
    distance = torch.arange(length, device=device) + 0.5
    return torch.minimum(distance, length - distance).div(max(overlap, 1)).clamp(max=1.0)
