"""The method `latents`, of an autoencoder without a prior over its latents.

1 byte number of groups; for each group mean and standard deviation (float16 each); 1 byte quality in 1/128; then the
symbols round((value - mean) / step), step = standard deviation · 64^-quality, as of a Gaussian. Spatial latents have a
group for each channel, vector latents are one group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.entropy_models import QUALITY_LEVELS, SCALES
from .container import CorruptFileError, File, Reader, expect
from .entropy_coder import SymbolDecoder, SymbolEncoder
from .method_hyperprior import quality_level, scale_tables
from .tiles import check_size, decode_tiles, encode_latents, latent_channels, stride_of


def write(model: Any, pixels: Tensor, quality: float | None) -> bytes:
    """The latents of an image (uint8), at a quality of 0 to 1 (default ½)."""
    quality = 0.5 if quality is None else quality
    level, latents = round(quality * QUALITY_LEVELS), encode_latents(model, pixels)
    values = latents[0].flatten(1) if latents.ndim == 4 else latents  # (groups, values)
    moments = torch.stack([values.mean(1), values.std(1, correction=0).clamp(1e-4, 6e4)], 1).numpy().astype("<f2")
    mean, std = torch.from_numpy(moments.astype(np.float32)).unbind(1)  # as they will be read
    symbols = ((values - mean[:, None]) / step_of(std, level)[:, None]).round().numpy().astype(np.int32)
    coder = SymbolEncoder()
    coder.encode(symbols.ravel(), table_of(level), scale_tables())
    return bytes([len(moments)]) + moments.tobytes() + bytes([level]) + coder.finish()


def step_of(std: Tensor, level: int) -> Tensor:
    """Quantization steps of groups with these standard deviations."""
    return std * 2.0 ** (-6 * level / QUALITY_LEVELS)


def table_of(level: int) -> int:
    """Which of SCALES is nearest to a standard deviation of 64^quality steps."""
    return int(np.abs(np.log(SCALES) - 6 * level / QUALITY_LEVELS * np.log(2)).argmin())


def read_moments(model: Any, file: File, reader: Reader) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(means, standard deviations, shape of the latents) at the beginning of a file. Raises CorruptFileError."""
    check_size(model, (file.height, file.width), CorruptFileError)
    stride, channels = stride_of(model), latent_channels(model)
    shape = (channels, -(-file.height // stride), -(-file.width // stride)) if stride else (channels,)
    groups = reader.take(1)[0]
    good = groups == (channels if stride else 1)
    expect(good, f"The file holds {groups} groups of latents, which does not fit this model.")
    data = np.frombuffer(reader.take(4 * groups), "<f2").astype(np.float32).reshape(groups, 2)
    finite = np.isfinite(data).all() and (data[:, 1] > 0).all()
    expect(finite, "The file's means and standard deviations are not finite.")
    return torch.from_numpy(data[:, 0]), torch.from_numpy(data[:, 1]), shape


def read(model: Any, file: File) -> Tensor:
    """The image (uint8) of what `write` wrote. Raises CorruptFileError."""
    reader = Reader(file.body)
    mean, std, shape = read_moments(model, file, reader)
    level = quality_level(reader)
    symbols = SymbolDecoder(reader.rest()).decode(math.prod(shape), table_of(level), scale_tables())
    values = torch.from_numpy(symbols).float().view(len(mean), -1) * step_of(std, level)[:, None] + mean[:, None]
    return decode_tiles(model, values.view(1, *shape).to(model.device))
