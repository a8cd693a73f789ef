"""Images as people have them <-> pixels (batch, channels, height, width) in [0, 1], float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F


def require(condition: object, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def read_images(images: Any, channels: int, size: Sequence[int | None], name: str = "image") -> torch.Tensor:
    """One image or a list: PIL images, arrays (height, width, channels) or tensors (channels, height, width) in [0, 1]
    -> pixels, resized to the (height, width) that `size` has. Errors call them `name`. Raises ValueError."""
    batch = [
        read_image(image, channels, name) for image in (images if isinstance(images, (list, tuple)) else [images])
    ]
    require(batch, f"{name}=[] holds no image.")
    for i, pixels in enumerate(batch):
        sides = tuple(side or own for side, own in zip(size, pixels.shape[2:]))
        if sides != pixels.shape[2:]:
            batch[i] = F.interpolate(pixels, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    sizes = sorted({tuple(pixels.shape[2:]) for pixels in batch})
    require(len(sizes) == 1, f"images of several sizes, {sizes}: write height= and width= to resize them all.")
    return torch.cat(batch)


def read_image(image: Any, channels: int, name: str = "image") -> torch.Tensor:
    """One image, or a batch as array or tensor -> pixels. Transparent parts become white. Raises ValueError."""
    if isinstance(image, Image.Image):
        image = np.asarray(upright(image, "L" if channels == 1 else "RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint16:
        image = (image / 65535).astype(np.float32)
    if isinstance(image, np.ndarray):
        image = torch.tensor(image[..., None] if image.ndim == 2 else image).movedim(-1, -3)
    kind = type(image).__name__
    if isinstance(image, torch.Tensor) and image.ndim == 2 and channels == 1:
        image = image[None]
    require(isinstance(image, torch.Tensor), f"{name} is a {kind}: pass a PIL image, an array, a tensor, or a list.")
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    wanted = f"a tensor ({channels}, height, width) or an array (height, width, {channels})"
    good = pixels.ndim == 4 and pixels.shape[1] == channels
    require(good, f"{name} has shape {tuple(image.shape)}: pass {wanted}.")
    low, high = pixels.min().item(), pixels.max().item()
    require(low >= 0 and high <= 1, f"{name} has values from {low:.3g} to {high:.3g}: pass values in [0, 1].")
    return pixels


def upright(image: Image.Image, mode: str) -> Image.Image:
    """A PIL image of any mode -> L or RGB, turned as its EXIF entry asks, transparent parts white. Raises
    ValueError."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be read: {str(error).splitlines()[0]}") from error
    if image.mode == "F" or image.mode.startswith("I"):
        image = deep_to_8_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def deep_to_8_bits(image: Image.Image) -> Image.Image:
    """Gray image of 16 or 32 bits or floats -> L. White is 1 (floats up to 1), 255 (values up to 255) or 65535;
    up to a tenth beyond black and white is limited. Raises ValueError for other values."""
    values = np.asarray(image, dtype=np.float32)
    least, most = float(values.min()), float(values.max())
    whites = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((white for white in whites if most <= 1.1 * white), 0.0)  # 0 where none of them fits, or of NaN
    known = " or ".join(f"0…{white:g}" for white in whites)
    require(
        white > 0 and least >= -0.1 * most,
        f"the image holds values from {least:g} to {most:g}: bring them to {known}.",
    )
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


def present(pixels: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Pixels -> the same as tensor (`pt`), array (batch, height, width, channels; `np`) or PIL images (`pil`)."""
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.permute(0, 2, 3, 1).cpu().numpy()
    arrays = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def pixel_range(autoencoder: Any) -> tuple[float, float]:
    """What an autoencoder's pixels are in: [-1, 1] unless its configuration says otherwise."""
    low, high = getattr(getattr(autoencoder, "config", None), "pixel_range", (-1.0, 1.0))
    return low, high


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point weights; float32 where it has none."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


def decode(decoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """Unscaled latents -> pixels. Raises ValueError where they are not finite numbers."""
    low, high = pixel_range(decoder)
    pixels = decoder.decode(latents.to(dtype_of(decoder))).sample.float()
    cause = "the decoder" if latents.isfinite().all() else "the denoiser"
    advice = "load its weights in float32 or bfloat16, or draw with another scheduler or fewer steps"
    require(pixels.isfinite().all(), f"{cause} gave NaN or infinite values, which are no image: {advice}.")
    return pixels.sub(low).div(high - low).clamp(0, 1)
