"""Generated images of which every factor is known: one shape, at each size, angle and place (and colour)."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import require

SIDE = 64
"""Height and width in pixels."""
SHAPES = ("square", "ellipse", "heart")
COLORS = {
    "red": (230, 60, 50), "yellow": (240, 200, 40), "green": (60, 180, 80), "cyan": (50, 190, 210),
    "blue": (70, 90, 220), "magenta": (200, 70, 190),
}  # fmt: skip
LARGEST = 16
"""No point of a sprite is farther from its middle, in pixels."""
FINE = 8
"""Outlines are drawn so many times finer; a pixel is white where at least half of it is covered."""


def outline(shape: str) -> np.ndarray:
    """Points (n, 2) around a shape, x to the right and y down, the farthest 1 from the middle."""
    t = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    if shape == "square":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    elif shape == "ellipse":
        points = np.stack([np.cos(t), 0.5 * np.sin(t)], 1)
    else:
        down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([16 * np.sin(t) ** 3, down - (down.max() + down.min()) / 2], 1)
    return points / np.linalg.norm(points, axis=1).max()


def stamp(shape: str, scale: float, angle: float) -> np.ndarray:
    """One sprite around the middle of (2·LARGEST, 2·LARGEST) pixels: bool; `scale` at most 1, `angle` in radians,
    clockwise."""
    cos, sin = math.cos(angle), math.sin(angle)
    points = outline(shape) @ np.array([[cos, sin], [-sin, cos]]) * scale * LARGEST + LARGEST
    image = Image.new("L", (2 * LARGEST * FINE,) * 2)
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points * FINE], fill=1)
    covered = np.asarray(image, dtype=np.float32).reshape(2 * LARGEST, FINE, 2 * LARGEST, FINE).mean((1, 3))
    return covered >= 0.5


def sprites(
    colored: bool = False, scales: int = 6, orientations: int | None = None, positions: int | None = None,
    seed: int = 0,
) -> Any:  # fmt: skip
    """A `datasets.Dataset` of every combination of the factors once, 64×64 pixels, like dSprites (Matthey et al.
    2017), with columns `image`, `shape` (square, ellipse, heart), `scale`, `orientation`, `x`, `y` (and `color`):
    each a whole number from 0.

    scale: from half to the whole size in equal steps. orientation: full turns in equal steps from 0 on, so that no
    angle comes twice; a square looks the same after a quarter and an ellipse after half a turn, as in dSprites.
    x, y: equal steps of the middle over the places where the largest sprite fits.

    Default: 40 orientations and 32 positions each way, 737,280 white sprites on black; `colored`: 20, 16 and six
    colours, 552,960. Rows come in an order that `seed` fixes: the first ones are a sample of all. Raises ValueError.
    """
    import datasets

    orientations = (20 if colored else 40) if orientations is None else orientations
    positions = (16 if colored else 32) if positions is None else positions
    most = SIDE - 2 * LARGEST
    require(min(scales, orientations) >= 1, "scales and orientations must be at least 1.")
    require(1 <= positions <= most, f"positions={positions} must lie between 1 and {most}.")
    sizes = [len(SHAPES), scales, orientations, positions, positions, len(COLORS) if colored else 1]
    order = np.random.default_rng(seed).permutation(math.prod(sizes))
    factors = dict(zip(("shape", "scale", "orientation", "x", "y", "color"), np.unravel_index(order, sizes)))
    images = [{"bytes": file, "path": None} for file in files(np.stack([*factors.values()], 1).tolist(), sizes)]
    kinds = {name: datasets.Value("int32") for name in factors}
    kinds |= {"shape": datasets.ClassLabel(names=list(SHAPES)), "color": datasets.ClassLabel(names=list(COLORS))}
    if not colored:
        del factors["color"], kinds["color"]
    features = datasets.Features({"image": datasets.Image(), **kinds})
    return datasets.Dataset.from_dict({"image": images, **factors}, features=features)


def files(combinations: list[list[int]], sizes: list[int]) -> Iterator[bytes]:
    """The image file of each combination of factors, of which there are `sizes`."""
    shapes, scales, orientations, positions, _, colors = sizes
    stamps = {
        (i, j, k): stamp(SHAPES[i], 1.0 - 0.5 * (scales - 1 - j) / max(1, scales - 1), 2 * math.pi * k / orientations)
        for i, j, k in itertools.product(range(shapes), range(scales), range(orientations))
    }
    places = np.linspace(0, SIDE - 2 * LARGEST, positions).round().astype(int).tolist()
    palettes = [(255, 255, 255)] if colors == 1 else list(COLORS.values())
    for shape, scale, orientation, x, y, color in combinations:
        pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
        pixels[places[y] : places[y] + 2 * LARGEST, places[x] : places[x] + 2 * LARGEST] = stamps[
            shape, scale, orientation
        ]
        image = Image.fromarray(pixels)
        image.putpalette([0, 0, 0, *palettes[color]])
        yield png(image)


def png(image: Image.Image) -> bytes:
    """The bytes of a file of two colours, one bit a pixel."""
    file = io.BytesIO()
    image.save(file, "PNG", bits=1)
    return file.getvalue()
