"""The method `hyperprior`, of a CompressiveAutoencoderModel.

1 byte quality in 1/128; then for each window of 64×64 positions of the latents, row by row, the hyper-latents, then
the symbols in three steps: even rows and columns, odd rows and columns, the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import require
from ..models.entropy_models import HYPER_LIMIT, QUALITY_LEVELS, SCALES, STEPS, gaussian_weights, positions_of
from . import tiles
from .container import File, Reader, expect
from .entropy_coder import SymbolDecoder, SymbolEncoder, SymbolTables


def hyper_tables(model: Any) -> SymbolTables:
    """Of the hyper-latents: one table for each channel."""
    table = model.hyperprior.prior.table.cpu().numpy()
    return SymbolTables(list(table), [-HYPER_LIMIT] * len(table))


@functools.cache
def scale_tables() -> SymbolTables:
    """Of Gaussians of the standard deviations SCALES."""
    return SymbolTables.symmetric([np.array(gaussian_weights(scale)) for scale in SCALES])


def windows(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the latents, row by row."""
    for top in range(0, height, tiles.WINDOW):
        for left in range(0, width, tiles.WINDOW):
            yield slice(top, min(top + tiles.WINDOW, height)), slice(left, min(left + tiles.WINDOW, width))


def quality_level(reader: Reader) -> int:
    """Quality in 1/128, as a file holds it."""
    level = reader.take(1)[0]
    expect(level <= QUALITY_LEVELS, f"The file claims quality {level}/{QUALITY_LEVELS}.")
    return level


def write(model: Any, pixels: Tensor, quality: float | None) -> bytes:
    """Quality and symbols of an image (uint8)."""
    level = model.levels(quality, 1)
    latents = tiles.encode_tiles(model.analyse, model, pixels)
    require(latents.isfinite().all(), "The encoder gives values that are not finite: the model is broken.")
    z_tables, y_tables = hyper_tables(model), scale_tables()
    coder = SymbolEncoder()
    for rows, columns in windows(*latents.shape[2:]):
        quantized = model.quantize(latents[..., rows, columns], level)
        z = quantized.hyper_symbols[0].cpu().numpy().astype(np.int32)
        coder.encode(z.ravel(), np.arange(len(z)).repeat(z[0].size), z_tables)
        for step in range(STEPS):
            mask = positions_of(rows.stop - rows.start, columns.stop - columns.start, step, latents.device)
            parts = (part[0][:, mask].cpu().numpy() for part in (quantized.symbols, quantized.scale_index))
            symbols, index = (part.ravel().astype(np.int32) for part in parts)
            coder.encode(symbols, index, y_tables)
    return bytes([int(level)]) + coder.finish()


def read(model: Any, file: File) -> Tensor:
    """The image (uint8) of what `write` wrote. Raises CorruptFileError."""
    reader, stride = Reader(file.body), tiles.stride_of(model)
    level = torch.tensor([quality_level(reader)], device=model.device)
    height, width = -(-file.height // stride), -(-file.width // stride)
    prior, channels = model.hyperprior, model.config.latent_channels
    decoder, z_tables, y_tables = SymbolDecoder(reader.rest()), hyper_tables(model), scale_tables()
    latents = torch.empty(1, channels, height, width, device=model.device)
    for rows, columns in windows(height, width):
        size = rows.stop - rows.start, columns.stop - columns.start
        shape = model.config.hyper_channels[1], -(-size[0] // 4), -(-size[1] // 4)
        z = decoder.decode(int(np.prod(shape)), np.arange(shape[0]).repeat(shape[1] * shape[2]), z_tables)
        features = prior.features(torch.from_numpy(z.reshape(1, *shape)).to(model.device).double(), level, *size)
        values = torch.zeros(1, channels, *size, dtype=torch.float64, device=model.device)
        for step in range(STEPS):
            mask = positions_of(*size, step, model.device)
            mean, index = (part[0][:, mask] for part in prior.parameters_of(features, values, step))
            symbols = decoder.decode(index.numel(), index.cpu().numpy().ravel().astype(np.int32), y_tables)
            values[0, :, mask] = mean + torch.from_numpy(symbols).to(mean).view_as(mean)
        latents[..., rows, columns] = model.to_latents(values, level)
    return tiles.decode_tiles(model, latents)
