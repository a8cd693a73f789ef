"""Any image -> pixel_values, and back."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ImagesKwargs

from .configuration_autoencoder import AutoencoderConfig

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for a number of channels."""


MOST_DEVIATIONS = 10.0
"""Values of a table that lie farther from their column's mean, in standard deviations, are limited to it."""


class AutoencoderImageProcessorKwargs(ImagesKwargs, total=False):
    """What the processor is made with, beside transformers' own fields."""

    num_channels: int
    pixel_range: list[float]
    feature_columns: list[str] | None
    feature_means: list[float] | None
    feature_stds: list[float] | None


class AutoencoderImageProcessor(PilBackend):
    """Images -> `pixel_values` (batch, num_channels, height, width), float32 in `pixel_range`, and back again.

    Takes one image or a list: paths, encoded bytes, PIL images of any mode (palette, 16-bit and CMYK too; transparency
    is laid on white unless `num_channels=4`; EXIF rotation is applied), and arrays or tensors, channels first or last:
    uint8 in 0…255, uint16, or floats in 0…1. An image of another size is scaled to cover `size`, then cropped to its
    centre. `config` is the model's, from which size, channels and range come.

    With `feature_columns` it takes rows of a table instead (an array (rows, columns), a data frame, a mapping of
    columns or a list of mappings): each column less its `feature_means`, over its `feature_stds`, is one pixel of an
    image of height 1.
    """

    valid_kwargs = AutoencoderImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 28, "width": 28}
    num_channels = 1
    pixel_range = [0.0, 1.0]
    do_resize = True
    feature_columns: list[str] | None = None
    feature_means: list[float] | None = None
    feature_stds: list[float] | None = None
    _auto_class = "AutoImageProcessor"

    @classmethod
    def from_config(cls, config: AutoencoderConfig) -> AutoencoderImageProcessor:
        """The processor that fits a model's configuration."""
        size = dict(zip(("height", "width"), config.image_hw))
        fields: dict[str, Any] = {"num_channels": config.num_channels, "pixel_range": list(config.pixel_range)}
        return cls(size=size, **fields)

    def preprocess(
        self, images: Any, return_tensors: str | None = "pt", size: int | dict[str, int] | None = None,
        do_resize: bool | None = None, **kwargs: Any,
    ) -> BatchFeature:  # fmt: skip
        """Images -> BatchFeature with `pixel_values`. Raises ValueError for what is no image or does not fit.

        `size`: a number for height and width or {"height": …, "width": …}, default: that of the processor.
        `do_resize=False` keeps the size (images must then have one size).
        """
        if kwargs:
            known = "images, return_tensors, size and do_resize"
            raise ValueError(f"The image processor takes no {', '.join(kwargs)}: it takes {known}.")
        if self.feature_columns is not None:
            return BatchFeature({"pixel_values": self.standardized(images)}, tensor_type=return_tensors)
        images = images if isinstance(images, list | tuple) else [images]
        if len(images) == 1 and isinstance(images[0], np.ndarray | Tensor) and images[0].ndim == 4:
            images = list(images[0])
        if not images:
            raise ValueError("No image was given.")
        target = self.target_size(size) if (self.do_resize if do_resize is None else do_resize) else None
        pixels = [torch.from_numpy(self.to_array(image, target)) for image in images]
        if len({p.shape for p in pixels}) > 1:
            sizes = sorted({tuple(p.shape[1:]) for p in pixels})
            raise ValueError(f"With do_resize=False all images must have one size, not {sizes}.")
        low, high = self.pixel_range
        values = torch.stack([p.float() / 255 if p.dtype == torch.uint8 else p for p in pixels]) * (high - low) + low
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def standardized(self, rows: Any) -> Tensor:
        """Rows of a table -> (rows, 1, 1, columns). Raises ValueError for missing columns and values that are not
        finite."""
        columns = self.feature_columns or []
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            rows = {name: [row[name] for row in rows] for name in columns if name in rows[0]}
        if isinstance(rows, dict) or hasattr(rows, "columns"):
            missing = ", ".join(name for name in columns if name not in rows)
            if missing:
                raise ValueError(f"The table lacks the columns {missing}.")
            rows = np.stack([np.asarray(rows[name], dtype=np.float64) for name in columns], 1)
        table = torch.from_numpy(np.array(rows, dtype=np.float64))
        if table.ndim != 2 or table.shape[1] != len(columns):
            raise ValueError(f"A table of shape {tuple(table.shape)} has not the columns {', '.join(columns)}.")
        broken = (~table.isfinite()).any(0).tolist()
        if any(broken):
            names = ", ".join(name for name, bad in zip(columns, broken) if bad)
            raise ValueError(
                f"The table holds NaN or infinite values ({names}): fill them in, or leave such rows out."
            )
        means, deviations = (torch.tensor(v, dtype=torch.float64) for v in (self.feature_means, self.feature_stds))
        values = ((table - means) / deviations).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        return values.float()[:, None, None]

    def in_units(self, pixel_values: Tensor) -> NDArray[Any]:
        """(rows, 1, 1, columns) -> rows of the table (rows, columns), in its own units."""
        means, deviations = (torch.tensor(v, dtype=torch.float64) for v in (self.feature_means, self.feature_stds))
        return (pixel_values.detach().double().cpu().flatten(1) * deviations + means).numpy()

    def target_size(self, size: int | dict[str, int] | None = None) -> tuple[int, int]:
        """(height, width) that images are brought to. Raises ValueError for a size that has not both."""
        size = self.size if size is None else size
        if isinstance(size, int):
            return size, size
        try:
            return size["height"], size["width"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"size={size!r} must be one number, or {{'height': …, 'width': …}}.") from error

    def to_array(self, image: Any, target: tuple[int, int] | None) -> NDArray[Any]:
        """One image -> (num_channels, height, width): uint8 from an 8-bit image, float32 in 0…1 from other arrays."""
        if isinstance(image, np.ndarray | Tensor):
            return fit_array(array_to_channels(image, self.num_channels), target)
        image = to_mode(open_image(image), self.num_channels)
        if target is not None and image.size != target[::-1]:
            image = ImageOps.fit(image, target[::-1], Image.Resampling.BICUBIC)
        array = np.array(image)
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def postprocess(self, pixel_values: Tensor, output_type: str = "pil") -> Any:
        """pixel_values in `pixel_range` -> list of PIL images (`pil`), array (batch, height, width, channels) in 0…1
        (`np`), or tensor (batch, channels, height, width) in 0…1 (`pt`). Values out of range are limited. Raises
        ValueError for another output_type, and for PIL images of other than 1, 3 or 4 channels. Of a table always rows
        in its own units, an array (rows, columns)."""
        if self.feature_columns is not None:
            return self.in_units(pixel_values)
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


def open_image(image: Any) -> Image.Image:
    """A path, encoded bytes or a PIL image -> a PIL image, turned as its EXIF entry asks. Raises ValueError."""
    name = "The image"
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str | os.PathLike):
            name = str(image)
            image = Image.open(image)
        elif not isinstance(image, Image.Image):
            known = "a path, bytes, a PIL image, an array or a tensor"
            raise ValueError(f"{type(image).__name__} is not an image: give {known}.")
        image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which copies the image in any case
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist.") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder: give an image file.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image file that Pillow can read.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def to_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """PIL image of any mode -> L, RGB or RGBA. 16-bit gray is scaled to 8 bits; transparency is laid on white. Raises
    ValueError for other than 1, 3 or 4 channels."""
    if num_channels not in MODES:
        message = f"num_channels={num_channels} takes arrays or tensors only: PIL images have 1, 3 or 4 channels."
        raise ValueError(message)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        image = to_8_bits(image)
    if image.has_transparency_data and num_channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[num_channels] else image.convert(MODES[num_channels])


def to_8_bits(image: Image.Image) -> Image.Image:
    """Gray image of 16 or 32 bits or floats -> L. White is 1 (floats up to 1), 255 (values up to 255) or 65535;
    up to a tenth beyond black and white is limited. Raises ValueError for other values."""
    values = np.asarray(image, dtype=np.float32)
    least, most = float(values.min()), float(values.max())
    whites = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(image.mode, (65535.0,))
    white = next((white for white in whites if most <= 1.1 * white), 0.0)  # 0 where none of them fits, or of NaN
    if white == 0 or least < -0.1 * most:
        known = " or ".join(f"0…{white:g}" for white in whites)
        raise ValueError(f"The image holds values from {least:g} to {most:g}: bring them to {known}.")
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


def array_to_channels(array: NDArray[Any] | Tensor, num_channels: int) -> NDArray[Any]:
    """Array or tensor, channels first or last or none -> (num_channels, height, width), uint8 or float32 in 0…1.

    Raises ValueError for another number of channels, and as `to_unit_range`.
    """
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    array = array[None] if array.ndim == 2 else array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif (
        np.issubdtype(array.dtype, np.integer)
        and array.dtype != np.uint16
        and array.size
        and 0 <= array.min() <= array.max() <= 255
    ):
        array = array.astype(np.uint8)
    if array.ndim == 3:
        counts = (num_channels, 1, 3, 4)
        if array.shape[0] not in counts and array.shape[-1] in counts:
            array = array.transpose(2, 0, 1)
        given = array.shape[0]
        if array.dtype == np.uint8 and given in MODES and num_channels in MODES and given != num_channels:
            image = Image.fromarray(array.transpose(1, 2, 0).squeeze(), MODES[given])
            array = np.atleast_3d(np.asarray(to_mode(image, num_channels))).transpose(2, 0, 1)
        if array.shape[0] == 1 and num_channels == 3:
            array = array.repeat(3, axis=0)
    if array.ndim != 3 or array.shape[0] != num_channels:
        shape = f"An image array of shape {array.shape}"
        batch = f"(images, {num_channels}, height, width)"
        raise ValueError(f"{shape} has not {num_channels} channels, which this model takes; a batch has {batch}.")
    return to_unit_range(array)


def to_unit_range(array: NDArray[Any]) -> NDArray[Any]:
    """uint8 stays, uint16 and floats -> float32 in 0…1. Raises ValueError for other types and other ranges."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.uint16:
        return (array / 65535).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"Image arrays hold whole numbers 0…255, uint16 or floats 0…1, not {array.dtype} beyond 255.")
    if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1.001:
        raise ValueError("A float image array must lie in 0…1: divide by its largest value, or pass uint8.")
    return array.astype(np.float32).clip(0, 1)


def fit_array(array: NDArray[Any], target: tuple[int, int] | None) -> NDArray[Any]:
    """Scale (channels, height, width) to cover `target`, and crop to its centre: float32 in 0…1. An array of that size
    stays as it is, as with a `target` of None."""
    if target is None or array.shape[1:] == target:
        return array
    scale = max(t / s for t, s in zip(target, array.shape[1:]))
    size = [max(t, round(s * scale)) for t, s in zip(target, array.shape[1:])]
    pixels = torch.tensor(array).float()[None] / (255 if array.dtype == np.uint8 else 1)
    scaled = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1).numpy()
    top, left = ((s - t) // 2 for s, t in zip(size, target))
    return scaled[:, top : top + target[0], left : left + target[1]]
