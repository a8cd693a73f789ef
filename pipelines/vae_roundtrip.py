"""An image through an autoencoder and back: what is kept, in how many bytes, beside JPEG, WebP and AVIF of that size.

```
image -> encoder -> latents -> quantizer and entropy coder -> file -> latents -> decoder -> image
                       '-> panel: original | latents | decoded, with the pixels and bits of each
```
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from PIL import Image, ImageDraw, ImageFont

FORMATS: dict[str, dict[str, Any]] = {"JPEG": dict(optimize=True), "WebP": dict(method=6), "AVIF": dict(speed=4)}
"""Pillow's encoders, each at its usual best effort."""


@dataclass
class Measured:
    """An image that came back from a file: `size` in bytes, `bpp` in bits a pixel, `psnr` in dB, `ssim` (at most
    1)."""

    picture: Image.Image
    size: int
    bpp: float
    psnr: float
    ssim: float


@dataclass
class VAERoundTripOutput(BaseOutput):
    """`panel`: original | latents | decoded, and a row of the others. `data`: the compressed file. `decoded`: what
    comes back from it. `latents`: an image of the latents. `others`: format -> the same image in a file of about as
    many bytes."""

    panel: Image.Image
    data: bytes
    decoded: Measured
    latents: Image.Image
    others: dict[str, Measured]


class VAERoundTripPipeline(DiffusionPipeline):
    """vae: an autoencoder that `hf_ae.codec` compresses with: one of hf_ae's, or diffusers' AutoencoderKL or Tiny."""

    if TYPE_CHECKING:  # register_modules sets the component

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str = "") -> VAERoundTripPipeline:
        """The pipeline for an autoencoder: its folder or Hub id, or `subfolder="vae"` of those of a pipeline."""
        from hf_ae.loading import load_autoencoder

        return cls(load_autoencoder(pretrained_model_name_or_path, subfolder))

    @torch.no_grad()
    def __call__(
        self, image: Any, quality: float | None = None, others: Sequence[str] = tuple(FORMATS)
    ) -> VAERoundTripOutput:
        """Send an image (path or PIL image) through a file and back. Needs hf_ae, with constriction.

        quality: as `hf_ae.codec.compress` takes it. others: the formats of FORMATS to put beside it. Raises ValueError
        where the codec does.
        """
        from hf_ae.codec import compress, decompress
        from hf_ae.models.image_processing import open_image, to_mode

        if unknown := sorted(set(others) - set(FORMATS)):
            raise ValueError(f"others={unknown} are not known: write some of {', '.join(FORMATS)}.")
        data = compress(self.vae, image, quality=quality, model_id="")
        back = decompress(data, self.vae)
        original = to_mode(open_image(image), len(back.getbands()))
        decoded = measure(original, back, len(data))
        rivals = {name: nearest_in_size(original, name, len(data)) for name in others}
        encoded = self.encode(original)
        latents = image_of(encoded)
        panel = draw_panel(original, latents, encoded, decoded, rivals)
        return VAERoundTripOutput(panel=panel, data=data, decoded=decoded, latents=latents, others=rivals)

    def encode(self, image: Image.Image) -> torch.Tensor:
        """The latents of an image: (channels, height, width); a vector is (values, 1, 1)."""
        from hf_ae.codec.compression import ready
        from hf_ae.codec.tiles import encode_latents, num_channels

        image = image.convert("L" if num_channels(self.vae) == 1 else "RGB")
        pixels = torch.from_numpy(np.array(image)).view(1, image.height, image.width, -1).permute(0, 3, 1, 2)
        with ready(self.vae):
            latents = encode_latents(self.vae, pixels)[0].float()
        return latents if latents.ndim == 3 else latents[:, None, None]


def measure(original: Image.Image, back: Image.Image, size: int) -> Measured:
    """How close an image that came back from a file of `size` bytes is to the original (same mode and size)."""
    from hf_ae.metrics import reconstruction_metrics

    arrays = (torch.from_numpy(np.array(i)).view(1, i.height, i.width, -1) for i in (original, back))
    x, y = (array.float().div(255).permute(0, 3, 1, 2) for array in arrays)
    found = reconstruction_metrics(x, y)
    return Measured(back, size, 8 * size / (back.width * back.height), found["psnr"], found.get("ssim", math.nan))


def encode_as(image: Image.Image, name: str, quality: int, **options: Any) -> bytes:
    """An image in another format at a quality of 0 to 100; `options` of Pillow's encoder."""
    buffer = io.BytesIO()
    image.save(buffer, name, quality=quality, **{**FORMATS[name], **options})
    return buffer.getvalue()


def nearest_in_size(image: Image.Image, name: str, size: int) -> Measured:
    """The image in another format at the quality whose file is nearest to `size` bytes."""
    low, high, files = 0, 100, {}
    while low <= high:
        middle = (low + high) // 2
        files[middle] = encode_as(image, name, middle)
        low, high = (middle + 1, high) if len(files[middle]) < size else (low, middle - 1)
    data = min(files.values(), key=lambda data: abs(len(data) - size))
    return measure(image, Image.open(io.BytesIO(data)).convert(image.mode), len(data))


def image_of(latents: torch.Tensor) -> Image.Image:
    """Latents (channels, height, width) -> one pixel a position: their three strongest components as colours."""
    flat = latents.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    if flat.shape[1] == 1:  # a vector: a square of its values
        side = math.ceil(math.sqrt(latents.shape[0]))
        values = torch.nn.functional.pad(latents.flatten(), (0, side * side - latents.numel()))
        return gray(values.view(side, side))
    parts, strengths, _ = torch.linalg.svd(flat, full_matrices=False)
    colours = (parts[:, :3].T @ flat) / (strengths[:3, None] / flat.shape[1] ** 0.5).clamp(min=1e-6)
    if len(colours) < 3:
        return gray(latents[0])
    pixels = (colours / 4 + 0.5).clamp(0, 1).view(3, *latents.shape[1:])
    return Image.fromarray(pixels.permute(1, 2, 0).mul(255).round().byte().numpy())


def gray(values: torch.Tensor) -> Image.Image:
    """Values (height, width) -> a gray image: the mean is middle gray, two standard deviations black and white."""
    scaled = (values - values.mean()) / (4 * values.std().clamp(min=1e-6)) + 0.5
    return Image.fromarray(scaled.clamp(0, 1).mul(255).round().byte().numpy()).convert("RGB")


def closeness(found: Measured) -> str:
    """In words; SSIM needs windows of 11 pixels, so a smaller image has none."""
    return f"{found.psnr:.2f} dB" + ("" if math.isnan(found.ssim) else f", SSIM {found.ssim:.3f}")


def draw_panel(
    original: Image.Image, latents: Image.Image, encoded: torch.Tensor, decoded: Measured, others: dict[str, Measured]
) -> Image.Image:
    """original | latents | decoded, and below them the other formats, each over what it is and costs."""
    bits, positions = 8 * len(original.getbands()), encoded[0].numel()
    rows, columns = encoded.shape[1:]
    shape = f"{columns}x{rows}@{8 * decoded.size / positions:.3g}bpp" if positions > 1 else f"{len(encoded)} values"
    size, file = f"{original.width}x{original.height}", f"{decoded.size:,} bytes, {decoded.bpp:.3g} bpp"
    cells = [
        (original, f"{size}@{bits}bpp", "original"),
        (latents, shape, f"latents: {file}"),
        (decoded.picture, f"{size}@{bits}bpp", f"decoded: {closeness(decoded)}"),
    ]
    for name, found in others.items():
        cells.append((found.picture, f"{name}: {found.size:,} bytes, {found.bpp:.3g} bpp", closeness(found)))
    scale = max(1.0, min(240 / original.width, 960 / original.height))
    shown = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
    width, height = max(240, shown[0]), shown[1]
    line = max(14, width // 26)
    font, gap = ImageFont.load_default(line), line // 2
    step = (width + gap, height + 3 * line + gap)
    sheet = Image.new("RGB", (3 * step[0] + gap, -(-len(cells) // 3) * step[1] + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, *texts) in enumerate(cells):
        left, top = gap + i % 3 * step[0], gap + i // 3 * step[1]
        enlarged = image.convert("RGB").resize(shown, Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + (width - shown[0]) // 2, top))
        for row, text in enumerate(texts):
            place = (left + width / 2, top + height + (row + 0.8) * 1.2 * line)
            draw.text(place, text, "#222222", font, anchor="mm")
    return sheet
