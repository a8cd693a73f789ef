"""Pictures: grids of images, with Pillow alone; curves and panels are drawn where they are needed."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)  # type: ignore[return-value]


def to_images(pixels: torch.Tensor, cell: int) -> list[Image.Image]:
    """(images, 1, 3 or 4 channels, height, width) in 0…1 -> RGB images about `cell` pixels high, enlarged without blur."""
    values = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    values = values.expand(-1, 3, -1, -1) if values.shape[1] == 1 else values[:, :3]
    images = [Image.fromarray(v.permute(1, 2, 0).contiguous().numpy()) for v in values]
    factor = max(1, round(cell / images[0].height))
    return [i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST) for i in images]


def labelled_rows(rows: dict[str, torch.Tensor], path=None, cell: int = 56, gap: int = 3) -> Image.Image:
    """One row of images for each name, the name at its left; saved to `path`.

    Each value is (images, channels, height, width) in 0…1.
    """
    drawn = {name: to_images(pixels, cell) for name, pixels in rows.items()}
    font = label_font(max(12, cell // 4))
    left = max(int(font.getlength(line)) for name in drawn for line in name.split("\n")) + 4 * gap
    width, height = drawn[next(iter(drawn))][0].size
    columns = max(len(images) for images in drawn.values())
    sheet = Image.new("RGB", (left + columns * (width + gap) + gap, len(drawn) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(drawn.items()):
        top = gap + row * (height + gap)
        draw.multiline_text((2 * gap, top + height / 2), name, "#222222", font, anchor="lm", spacing=2)
        for column, image in enumerate(images):
            sheet.paste(image, (left + gap + column * (width + gap), top))
    if path is not None:
        sheet.save(path)
    return sheet


def image_grid(pixels: torch.Tensor, columns: int, path=None, cell: int = 28, gap: int = 1, captions: list[str] | None = None):
    """Images (images, channels, height, width) in 0…1 in rows of `columns`, each over its caption if any; saved to `path`."""
    images, line = to_images(pixels, cell), cell // 5 if captions else 0
    width, height = images[0].width + gap, images[0].height + gap + line
    sheet = Image.new("RGB", (columns * width + gap, -(-len(images) // columns) * height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), label_font(max(8, cell // 10))
    for i, image in enumerate(images):
        left, top = gap + i % columns * width, gap + i // columns * height
        sheet.paste(image, (left, top))
        if captions:
            draw.text((left + image.width / 2, top + image.height + line / 2), captions[i], "#333333", font, anchor="mm")
    if path is not None:
        sheet.save(path)
    return sheet


def latent_plane(codes, labels, decoded: torch.Tensor, extent, path=None, size: int = 720) -> Image.Image:
    """A 2-d latent space: left the codes of test images coloured by class, right what the decoder draws all over it.

    codes: array (images, 2). labels: whole numbers from 0, (images,), or None. decoded: (rows·rows, channels,
    height, width), rows from the top. extent: (x low, x high, y low, y high) of both halves.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    side = round(len(decoded) ** 0.5)
    sheet = image_grid(decoded, side, cell=decoded.shape[-2], gap=0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * size / 100, size / 100), dpi=100, layout="constrained")
    if labels is None:
        left.scatter(codes[:, 0], codes[:, 1], s=3, alpha=0.7, linewidths=0)
    else:
        top = max(labels) + 1
        colours = plt.get_cmap("tab10" if top <= 10 else "nipy_spectral", top)
        points = left.scatter(codes[:, 0], codes[:, 1], c=labels, cmap=colours, s=3, alpha=0.7, linewidths=0, vmin=-0.5, vmax=top - 0.5)
        bar = figure.colorbar(points, ax=left, ticks=range(0, top, max(1, top // 10)), location="left", shrink=0.8)
        bar.set_label("class")
        bar.solids.set_alpha(1)  # type: ignore[union-attr]
    left.set(title="codes of test images", xlim=extent[:2], ylim=extent[2:])
    right.imshow(sheet, extent=extent, interpolation="lanczos")
    right.set(title="what the decoder draws there")
    for axis in (left, right):
        axis.set_box_aspect(1)
        axis.set_aspect("auto")
    if path is not None:
        figure.savefig(path)
    plt.close(figure)
    return Image.open(path) if path is not None else sheet
