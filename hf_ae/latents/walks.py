"""What one does with codes: walk from one to another, add and subtract them, turn one dimension, map a plane, draw at random.

A code has the shape `model.config.code_shape`, as `encode(x).latents` gives it without the batch. Functions that take a model
return pictures (n, channels, height, width) in its pixel range, on the CPU; the others return codes.
"""

from __future__ import annotations

import math

import torch

from ..data.images import batch_for
from .sampling import prior

KINDS = ("linear", "spherical")
SMALLEST_SINE = 1e-4
"""Below it two directions count as parallel or opposite, and the way between them is straight."""


def interpolate(a: torch.Tensor, b: torch.Tensor, steps: int, kind: str = "linear") -> torch.Tensor:
    """Two codes of one shape -> `steps` codes (steps, *shape) from `a` to `b`, both exactly among them. Raises ValueError.

    spherical: directions turn at an even speed (Shoemake 1985) while lengths change evenly, so that codes of equal length
    stay as long: where codes are N(0, I), nearly all have about one length, and a straight line leaves it (White 2016).
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known: write one of {', '.join(KINDS)}.")
    if a.shape != b.shape:
        raise ValueError(f"The codes have different shapes, {tuple(a.shape)} and {tuple(b.shape)}: encode both with one model.")
    if steps < 2:
        raise ValueError(f"steps={steps} must be at least 2: the way holds both its ends.")
    share = torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device)[:, None]
    first, last = a.flatten().double()[None], b.flatten().double()[None]
    way = first + share * (last - first)
    lengths = first.norm(), last.norm()
    if kind == "spherical" and min(lengths) > 0:
        cosine = float((first / lengths[0]) @ (last / lengths[1]).T)
        angle = math.acos(min(1.0, max(-1.0, cosine)))
        if math.sin(angle) > SMALLEST_SINE:
            turned = ((1 - share) * angle).sin() * first / lengths[0] + (share * angle).sin() * last / lengths[1]
            way = turned / math.sin(angle) * (lengths[0] + share * (lengths[1] - lengths[0]))
    way = way.to(a.dtype).view(steps, *a.shape)
    way[0], way[-1] = a, b
    return way


def arithmetic(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Mean of the codes `a` (n, *shape) minus mean of `b` (m, *shape), added to each of `c` (k, *shape).

    Radford et al. 2016 reckon so with the codes of faces. Raises ValueError where a group is empty or of another shape.
    """
    for group in (a, b, c):
        if not len(group) or group.shape[1:] != c.shape[1:]:
            raise ValueError(f"Codes of shape {tuple(group.shape)} beside {tuple(c.shape)}: give groups of at least one, of one model.")
    return a.mean(0) - b.mean(0) + c


def traversal(model, latents: torch.Tensor, dimension: int, values) -> torch.Tensor:
    """One code, drawn with its number `dimension` (counted in the flattened code) at each of `values`. Raises ValueError."""
    size = latents.numel()
    if not 0 <= dimension < size:
        raise ValueError(f"dimension={dimension} is not in this code: its numbers are 0 to {size - 1}.")
    values = torch.as_tensor(values, dtype=latents.dtype)
    codes = latents.flatten().repeat(len(values), 1)
    codes[:, dimension] = values
    return decode(model, codes.view(-1, *latents.shape))


def manifold_grid(model, side: int = 20, x: tuple[float, float] = (-3.0, 3.0), y: tuple[float, float] = (-3.0, 3.0)) -> torch.Tensor:
    """The plane of a model whose code is two numbers: `side`² pictures, row by row from (lowest x, highest y). Raises ValueError."""
    shape = list(model.config.code_shape)
    if shape != [2]:
        raise ValueError(f"A plane has two dimensions, and the code of this model has the shape {shape}.")
    columns, rows = torch.linspace(*x, side), torch.linspace(y[1], y[0], side)
    across, down = torch.meshgrid(columns, rows, indexing="xy")
    return decode(model, torch.stack([across.flatten(), down.flatten()], 1))


def random_codes(model, n: int, like: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """`n` codes of the model drawn from N(0, I); with `like` (m, *shape), from a normal distribution of as large a mean and
    spread in each number as these codes have. The same seed gives the same."""
    codes = prior(model.config.code_shape).sample(n, generator=torch.Generator().manual_seed(seed))
    return codes if like is None else like.mean(0) + like.std(0, correction=min(1, len(like) - 1)) * codes.to(like)


@torch.no_grad()
def decode(model, codes: torch.Tensor) -> torch.Tensor:
    """Codes (n, *shape) -> pictures, in batches that fit into memory."""
    parts = codes.split(batch_for(model.config.num_pixels))
    return torch.cat([model.decode(part.to(model.device)).sample.float().cpu() for part in parts])
