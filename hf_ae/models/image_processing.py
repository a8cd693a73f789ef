"""Any image -> pixel_values, and back."""

from __future__ import annotations

import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ImagesKwargs

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for a number of channels."""


class AutoencoderImageProcessorKwargs(ImagesKwargs, total=False):
    num_channels: int
    pixel_range: list[float]


class AutoencoderImageProcessor(PilBackend):
    """Images -> `pixel_values` (batch, num_channels, height, width), float32 in `pixel_range`; `postprocess` goes back.

    Takes one image or a list: paths, encoded bytes, PIL images of any mode (palette, 16-bit and CMYK too; transparency
    is laid on white unless `num_channels=4`; EXIF rotation is applied), and arrays or tensors, channels first or last:
    uint8 in 0…255, uint16, or floats in 0…1. An image of another size is scaled to cover `size`, then cropped to its
    centre. `config` is the model's, from which size, channels and range come.
    """

    valid_kwargs = AutoencoderImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 28, "width": 28}
    num_channels = 1
    pixel_range = [0.0, 1.0]
    do_resize = True
    _auto_class = "AutoImageProcessor"

    @classmethod
    def from_config(cls, config) -> AutoencoderImageProcessor:
        """The processor that fits a model's configuration."""
        height, width = config.image_hw
        fields = {"num_channels": config.num_channels, "pixel_range": list(config.pixel_range)}
        return cls(size={"height": height, "width": width}, **fields)

    def preprocess(self, images, return_tensors: str | None = "pt", size=None, do_resize: bool | None = None, **kwargs) -> BatchFeature:
        """Images -> BatchFeature with `pixel_values`. `do_resize=False` keeps the size (images must then share one)."""
        if kwargs:
            raise ValueError(f"The image processor takes no {', '.join(kwargs)}: it takes images, return_tensors, size and do_resize.")
        images = images if isinstance(images, list | tuple) else [images]
        if len(images) == 1 and isinstance(images[0], np.ndarray | torch.Tensor) and images[0].ndim == 4:
            images = list(images[0])
        if not images:
            raise ValueError("No image was given.")
        target = self.target_size(size) if (self.do_resize if do_resize is None else do_resize) else None
        pixels = [torch.from_numpy(self.to_array(image, target)) for image in images]
        if len({p.shape for p in pixels}) > 1:
            raise ValueError(f"With do_resize=False all images must have one size, not {sorted({tuple(p.shape[1:]) for p in pixels})}.")
        low, high = self.pixel_range
        values = torch.stack([p.float() / 255 if p.dtype == torch.uint8 else p for p in pixels]) * (high - low) + low
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def target_size(self, size=None) -> tuple[int, int]:
        """(height, width) that images are brought to."""
        size = self.size if size is None else size
        if isinstance(size, int):
            return size, size
        try:
            return size["height"], size["width"]
        except (KeyError, TypeError):
            raise ValueError(f"size={size!r} must be one number, or {{'height': …, 'width': …}}.") from None

    def to_array(self, image, target: tuple[int, int] | None) -> np.ndarray:
        """One image -> (num_channels, height, width): uint8 from an 8-bit image, float32 in 0…1 from other arrays."""
        if isinstance(image, np.ndarray | torch.Tensor):
            array = array_to_channels(image, self.num_channels)
            return fit_array(array, target)
        image = to_mode(open_image(image), self.num_channels)
        if target is not None and image.size != target[::-1]:
            image = ImageOps.fit(image, target[::-1], Image.Resampling.BICUBIC)
        array = np.array(image)
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def postprocess(self, pixel_values: torch.Tensor, output_type: str = "pil"):
        """pixel_values in `pixel_range` -> list of PIL images (`pil`), array (batch, height, width, channels) in 0…1
        (`np`), or tensor (batch, channels, height, width) in 0…1 (`pt`). Values out of range are limited."""
        low, high = self.pixel_range
        values = ((pixel_values.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
        if output_type == "pt":
            return values
        array = values.permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return array
        if output_type != "pil":
            raise ValueError(f"output_type={output_type!r} is not known: write 'pil', 'np' or 'pt'.")
        if self.num_channels not in MODES:
            raise ValueError(f"PIL has no image of {self.num_channels} channels: write output_type='np' or 'pt'.")
        bytes_ = (array * 255).round().astype(np.uint8)
        return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a, MODES[self.num_channels]) for a in bytes_]


def open_image(image) -> Image.Image:
    """A path, encoded bytes or a PIL image -> a PIL image, turned as its EXIF entry says. Raises ValueError."""
    name = "The image"
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | os.PathLike):
            name = str(image)
            image = Image.open(image)
        elif not isinstance(image, Image.Image):
            raise ValueError(f"{type(image).__name__} is not an image: give a path, bytes, a PIL image, an array or a tensor.")
        image.load()
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no image file that Pillow can read.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def to_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """PIL image of any mode -> L, RGB or RGBA. 16-bit gray is scaled to 8 bits; transparency is laid on white."""
    if num_channels not in MODES:
        raise ValueError(f"num_channels={num_channels} takes arrays or tensors only: PIL images have 1, 3 or 4 channels.")
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float32)
        top = 1.0 if image.mode == "F" and values.max() <= 1 else (255.0 if values.max() <= 255 and image.mode != "I;16" else 65535.0)
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if transparent and num_channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[num_channels] else image.convert(MODES[num_channels])


def array_to_channels(array, num_channels: int) -> np.ndarray:
    """Array or tensor, channels first or last or none -> (num_channels, height, width), uint8 or float32 in 0…1."""
    array = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    array = array[None] if array.ndim == 2 else array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.integer) and array.dtype != np.uint16 and array.size and array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    if array.ndim == 3 and array.shape[0] not in (num_channels, 1, 3, 4) and array.shape[-1] in (num_channels, 1, 3, 4):
        array = array.transpose(2, 0, 1)
    given = array.shape[0]
    if array.dtype == np.uint8 and array.ndim == 3 and given in MODES and num_channels in MODES and given != num_channels:
        image = Image.fromarray(array.transpose(1, 2, 0).squeeze(), MODES[given])
        array = np.atleast_3d(np.asarray(to_mode(image, num_channels))).transpose(2, 0, 1)
    if array.ndim == 3 and array.shape[0] == 1 and num_channels == 3:
        array = array.repeat(3, axis=0)
    if array.ndim != 3 or array.shape[0] != num_channels:
        raise ValueError(f"An image array of shape {array.shape} has not {num_channels} channels, which this model takes.")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array / 65535).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Image arrays hold whole numbers 0…255, uint16 or floats 0…1, not {array.dtype} beyond 255.")
    if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1.001:
        raise ValueError("A float image array must lie in 0…1: divide by its largest value, or pass uint8.")
    return array.astype(np.float32).clip(0, 1)


def fit_array(array: np.ndarray, target: tuple[int, int] | None) -> np.ndarray:
    """Scale (channels, height, width) to cover `target`, and crop to its centre."""
    if target is None or array.shape[1:] == target:
        return array
    scale = max(t / s for t, s in zip(target, array.shape[1:]))
    size = [max(t, round(s * scale)) for t, s in zip(target, array.shape[1:])]
    pixels = torch.tensor(array).float()[None] / (255 if array.dtype == np.uint8 else 1)
    scaled = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1).numpy()
    top, left = ((s - t) // 2 for s, t in zip(size, target))
    return scaled[:, top : top + target[0], left : left + target[1]]
