"""Figures: grids of images, with Pillow alone; curves and panels are drawn where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)  # type: ignore[return-value]


def to_images(pixels: Tensor, cell: int) -> list[Image.Image]:
    """(images, 1, 3 or 4 channels, height, width) in 0…1 -> RGB images about `cell` pixels high, enlarged without
    blur."""
    values = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    values = values.expand(-1, 3, -1, -1) if values.shape[1] == 1 else values[:, :3]
    images = [Image.fromarray(v.permute(1, 2, 0).contiguous().numpy()) for v in values]
    factor = max(1, round(cell / images[0].height))
    return [i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST) for i in images]


def labelled_rows(
    rows: dict[str, Tensor], path: str | Path | None = None, cell: int = 56, gap: int = 3
) -> Image.Image:
    """One row of images for each name, the name at its left; saved to `path`.

    Each value is (images, channels, height, width) in 0…1.
    """
    drawn = {name: to_images(pixels, cell) for name, pixels in rows.items()}
    font = label_font(max(12, cell // 4))
    left = max(int(font.getlength(line)) for name in drawn for line in name.split("\n")) + 4 * gap
    width, height = next(iter(drawn.values()))[0].size
    columns = max(len(images) for images in drawn.values())
    sheet = Image.new("RGB", (left + columns * (width + gap) + gap, len(drawn) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(drawn.items()):
        top = gap + row * (height + gap)
        draw.multiline_text((2 * gap, top + height / 2), name, "#222222", font, anchor="lm", spacing=2)
        for column, image in enumerate(images):
            sheet.paste(image, (left + gap + column * (width + gap), top))
    return saved(sheet, path)


def image_grid(
    pixels: Tensor, columns: int, path: str | Path | None = None, cell: int = 28, gap: int = 1,
    captions: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Images (images, channels, height, width) in 0…1 in rows of `columns`, each over its caption if any; saved to
    `path`."""
    images, line = to_images(pixels, cell), cell // 5 if captions else 0
    width, height = images[0].width + gap, images[0].height + gap + line
    sheet = Image.new("RGB", (columns * width + gap, -(-len(images) // columns) * height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), label_font(max(8, cell // 10))
    for i, image in enumerate(images):
        left, top = gap + i % columns * width, gap + i // columns * height
        sheet.paste(image, (left, top))
        if captions:
            middle = (left + image.width / 2, top + image.height + line / 2)
            draw.text(middle, captions[i], "#333333", font, anchor="mm")
    return saved(sheet, path)


def saved(sheet: Image.Image, path: str | Path | None) -> Image.Image:
    """The figure, written to `path` where there is one."""
    if path is not None:
        sheet.save(path)
    return sheet


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, apart from pyplot, which is the caller's; `figure.savefig(path)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def class_colours(count: int) -> Any:
    """A colour map of `count` classes."""
    from matplotlib import colormaps

    return colormaps["tab10" if count <= 10 else "nipy_spectral"].resampled(count)


def scatter_of_classes(
    axis: Any, points: np.ndarray, labels: Sequence[int] | None, names: Sequence[str] = (), **how: Any
) -> Any:
    """Points (images, 2), coloured by class where there are `labels`; with `names`, a legend of them."""
    style = dict(s=float(np.clip(20_000 / max(1, len(points)), 4, 40)), alpha=0.7, linewidths=0, **how)
    if labels is None:
        return axis.scatter(points[:, 0], points[:, 1], **style)
    top = max(len(names), max(labels) + 1)
    limits = dict(cmap=class_colours(top), vmin=-0.5, vmax=top - 0.5)
    drawn = axis.scatter(points[:, 0], points[:, 1], c=labels, **style, **limits)
    if 0 < len(names) <= 20:
        marks = [axis.scatter([], [], color=drawn.cmap(i / max(1, top - 1)), s=24) for i in range(len(names))]
        axis.legend(marks, names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    return drawn


def latent_plane(
    latents: np.ndarray, labels: Sequence[int] | None, decoded: Tensor, extent: tuple[float, float, float, float],
    path: str | Path, size: int = 720,
) -> None:  # fmt: skip
    """A 2-d latent space: left the latents of test images coloured by class, right what the decoder draws all over it.

    latents: (images, 2). labels: whole numbers from 0, (images,), or None. decoded: (rows·rows, channels, height,
    width), rows from the top. extent: (x low, x high, y low, y high) of both halves.
    """
    sheet = image_grid(decoded, round(len(decoded) ** 0.5), cell=decoded.shape[-2], gap=0)
    figure = new_figure(2 * size / 100, size / 100)
    left, right = figure.subplots(1, 2)
    scattered = scatter_of_classes(left, latents, labels)
    if labels is not None:
        top = max(labels) + 1
        ticks = range(0, top, max(1, top // 10))
        bar = figure.colorbar(scattered, ax=left, ticks=ticks, location="left", shrink=0.8)
        bar.set_label("class")
        bar.solids.set_alpha(1)
    left.set(title="latents of test images", xlim=extent[:2], ylim=extent[2:])
    right.imshow(sheet, extent=extent, interpolation="lanczos")
    right.set(title="what the decoder draws there")
    for axis in (left, right):
        axis.set_box_aspect(1)
        axis.set_aspect("auto")
    figure.savefig(path)
