"""Images <-> latents as the codec computes them: whatever the size, in tiles where it is large; of any autoencoder.

Pixels are uint8 (1, channels, height, width). Models are this family's, or diffusers' AutoencoderKL or
AutoencoderTiny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import require
from ..models.tiling import tiled

WINDOW = 64
"""Positions of the latents, high and wide, that share a hyperprior; larger images are worked on in tiles of this
size."""


def num_channels(model: Any) -> int:
    """1 or 3. Raises ValueError for models of other images."""
    channels = getattr(model.config, "num_channels", None) or model.config.in_channels
    require(channels in (1, 3), f"The codec takes models of 1 or 3 channels, not {channels}.")
    return channels


def pixel_range(model: Any) -> tuple[float, float]:
    """What the model's pixels are in; diffusers' autoencoders take -1…1."""
    low, high = getattr(model.config, "pixel_range", (-1.0, 1.0))
    return low, high


def latent_channels(model: Any) -> int:
    """Channels of spatial latents, or the length of vector latents."""
    return (getattr(model.config, "latent_shape", None) or [model.config.latent_channels])[0]


def stride_of(model: Any) -> int:
    """Pixels to a position of spatial latents; 0 for vector latents."""
    config = model.config
    if getattr(config, "latent_dim", None) is not None:
        return 0
    return 2 ** (len(config.block_out_channels) - 1)


def padded_pixels(model: Any, width: int, height: int, positions: int = 1) -> int:
    """Pixels that the model works on for an image of so many, where it takes whole groups of `positions` × `positions`
    of the latents."""
    unit = positions * max(stride_of(model), 1)
    return -(-width // unit) * -(-height // unit) * unit**2


def check_size(model: Any, size: Sequence[int], error: type[ValueError] = ValueError) -> None:
    """Raise `error` where a model with vector latents does not take images of this height and width."""
    if not stride_of(model) and list(size) != model.config.image_hw:
        height, width = model.config.image_hw
        raise error(
            f"This model has vector latents and takes images of {height}×{width} pixels alone, not {tuple(size)}."
        )


def to_values(model: Any, pixels: Tensor) -> Tensor:
    """uint8 -> pixel_values."""
    low, high = pixel_range(model)
    values = pixels.to(model.device).float() / 255 * (high - low) + low
    return values.to(model.dtype).contiguous(memory_format=torch.channels_last)


def to_pixels(model: Any, sample: Tensor) -> Tensor:
    """A decoder's sample -> uint8, on the CPU."""
    low, high = pixel_range(model)
    return ((sample.float() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def padded(model: Any, pixels: Tensor) -> Tensor:
    """The lower and right border repeated until the stride divides height and width."""
    stride = max(stride_of(model), 1)
    rows, columns = -pixels.shape[2] % stride, -pixels.shape[3] % stride
    return (
        F.pad(pixels.float(), (0, columns, 0, rows), mode="replicate").to(pixels.dtype) if rows or columns else pixels
    )


def encode_tiles(function: Callable[[Tensor], Tensor], model: Any, pixels: Tensor) -> Tensor:
    """`function(pixel_values)` on the padded image, in tiles where it is large: its latents."""
    pixels, stride = padded(model, pixels), stride_of(model)
    tile = WINDOW * max(stride, 1)
    if not stride or max(pixels.shape[2:]) <= tile:
        return function(to_values(model, pixels))
    return tiled(lambda part: function(to_values(model, part)), pixels, tile, stride, down=True)


def encode_latents(model: Any, pixels: Tensor) -> Tensor:
    """The deterministic latents of an image, float32: (1, channels, height, width) or (1, values). Raises
    ValueError."""

    def encode(values: Tensor) -> Tensor:
        encoded = model.encode(values)
        posterior = getattr(encoded, "latent_dist", None)
        return (encoded.latents if posterior is None else posterior.mode()).float()

    check_size(model, pixels.shape[2:])
    return encode_tiles(encode, model, pixels).cpu()


def decode_tiles(model: Any, latents: Tensor) -> Tensor:
    """Latents -> uint8 pixels, in tiles where the image is large."""

    def decode(part: Tensor) -> Tensor:
        part = part.to(model.dtype).contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part
        return model.decode(part).sample

    if latents.ndim == 4 and max(latents.shape[2:]) > WINDOW:
        return to_pixels(model, tiled(decode, latents, WINDOW, stride_of(model), down=False))
    return to_pixels(model, decode(latents))
