"""Walks through the latent space: from one image to another, along one dimension, over a plane, at random.

Latents of one image have the shape `model.config.latent_shape`, as `encode(x).latents` gives them without the batch.
Functions that take a model return images (n, channels, height, width) in its pixel range, on the CPU; the others
return latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import batch_for, each_batch
from ..errors import require
from ..loading import eval_mode
from .sampling import prior

KINDS = ("linear", "spherical")
SMALLEST_SINE = 1e-4
"""Below it two directions count as parallel or opposite, and the way between them is straight."""


def interpolate(a: Tensor, b: Tensor, steps: int, kind: str = "linear") -> Tensor:
    """Two latents of one shape -> `steps` latents (steps, *shape) from `a` to `b`, both exactly among them.

    spherical: directions turn at an even speed (Shoemake 1985) while lengths change evenly, so that latents of equal
    length stay as long: where latents are N(0, I), nearly all have about one length, and a straight line leaves it
    (White 2016). Raises ValueError for other kinds, different shapes and fewer than two steps.
    """
    require(kind in KINDS, f"kind={kind!r} is not known: write one of {', '.join(KINDS)}.")
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    require(a.shape == b.shape, f"The latents have different shapes, {shapes}: encode both with one model.")
    require(steps >= 2, f"steps={steps} must be at least 2: the way holds both its ends.")
    fraction = torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device)[:, None]
    first, last = a.flatten().double()[None], b.flatten().double()[None]
    way = first + fraction * (last - first)
    lengths = float(first.norm()), float(last.norm())
    if kind == "spherical" and min(lengths) > 0:
        cosine = float((first / lengths[0]) @ (last / lengths[1]).T)
        angle = math.acos(min(1.0, max(-1.0, cosine)))
        if math.sin(angle) > SMALLEST_SINE:
            turned = ((1 - fraction) * angle).sin() * first / lengths[0] + (fraction * angle).sin() * last / lengths[1]
            way = turned / math.sin(angle) * (lengths[0] + fraction * (lengths[1] - lengths[0]))
    way = way.to(a.dtype).view(steps, *a.shape)
    way[0], way[-1] = a, b
    return way


def arithmetic(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mean of the latents `a` (n, *shape) minus mean of `b` (m, *shape), added to each of `c` (k, *shape).

    Radford et al. 2016 do so with the latents of faces. Raises ValueError where a group is empty or of another shape.
    """
    for group in (a, b, c):
        shapes = f"Latents of shape {tuple(group.shape)} beside {tuple(c.shape)}"
        good = len(group) and group.shape[1:] == c.shape[1:]
        require(good, f"{shapes}: give groups of at least one, of one model.")
    return a.mean(0) - b.mean(0) + c


def traversal(model: Any, latents: Tensor, dimension: int, values: Sequence[float] | Tensor) -> Tensor:
    """One image's latents, decoded with the value at index `dimension` (of the flattened latents) set to each of
    `values` in turn. Raises ValueError."""
    size = latents.numel()
    require(0 <= dimension < size, f"dimension={dimension} is not in these latents: write 0 to {size - 1}.")
    values = torch.as_tensor(values, dtype=latents.dtype)
    moved = latents.flatten().repeat(len(values), 1)
    moved[:, dimension] = values
    return decode(model, moved.view(-1, *latents.shape))


def manifold_grid(
    model: Any, side: int = 20, x: tuple[float, float] = (-3.0, 3.0), y: tuple[float, float] = (-3.0, 3.0)
) -> Tensor:
    """The plane of a model with two latents: `side`² images, row by row from (lowest x, highest y). Raises
    ValueError."""
    shape = list(model.config.latent_shape)
    require(shape == [2], f"A plane has two dimensions, and the latents of this model have the shape {shape}.")
    columns, rows = torch.linspace(*x, side), torch.linspace(y[1], y[0], side)
    across, down = torch.meshgrid(columns, rows, indexing="xy")
    return decode(model, torch.stack([across.flatten(), down.flatten()], 1))


def random_latents(model: Any, n: int, like: Tensor | None = None, seed: int = 0) -> Tensor:
    """`n` latents drawn from N(0, I); with `like` (m, *shape), from a normal distribution with the mean and standard
    deviation that these have, value by value. The same seed gives the same."""
    drawn = prior(model.config.latent_shape).sample(n, generator=torch.Generator().manual_seed(seed))
    return drawn if like is None else like.mean(0) + like.std(0, correction=min(1, len(like) - 1)) * drawn.to(like)


random_codes = random_latents
"""Its former name."""


@torch.no_grad()
def decode(model: Any, latents: Tensor) -> Tensor:
    """Latents (n, *shape) -> images, in batches that fit into memory."""
    parts = latents.split(batch_for(model.config.num_pixels))
    return torch.cat([model.decode(part.to(model.device)).sample.float().cpu() for part in parts])


@torch.no_grad()
def encode_images(model: Any, images: Tensor) -> Tensor:
    """Images in 0…1 (images, channels, height, width) -> latents (images, *shape), float32 on the CPU, a VAE's the
    means, in batches that fit into memory."""
    low, high = model.config.pixel_range
    with eval_mode(model):
        batches = (x.to(model.device) * (high - low) + low for x in each_batch(images))
        return torch.cat([model.encode(x).latents.float().cpu() for x in batches])


@torch.no_grad()
def reconstruct(model: Any, images: Tensor) -> Tensor:
    """Images in 0…1 (images, channels, height, width) -> their reconstructions in 0…1, on the CPU, in batches that fit
    into memory."""
    low, high = model.config.pixel_range
    with eval_mode(model):
        batches = (x.to(model.device) * (high - low) + low for x in each_batch(images))
        parts = [model(x).reconstruction.float().cpu() for x in batches]
    return ((torch.cat(parts) - low) / (high - low)).clamp(0, 1)
