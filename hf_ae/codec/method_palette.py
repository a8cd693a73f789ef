"""The method `palette`, of spatial latents: files of version 0.1 hold it; it is read, and not written any more.

1 byte number of groups; mean and standard deviation of each (float16); varint number of colours; the colours, each one
byte a channel (steps of 1/32 standard deviation around the mean); a varint for each colour, how often it occurs; then
the colour of each position.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .container import File, Reader, expect
from .entropy_coder import SymbolDecoder, SymbolTables
from .method_latents import read_moments
from .tiles import decode_tiles

PALETTE_SIZE = 256


def read(model: Any, file: File) -> Tensor:
    """The image (uint8). Raises CorruptFileError."""
    reader = Reader(file.body)
    mean, std, shape = read_moments(model, file, reader)
    size, positions = reader.varint(), math.prod(shape[1:])
    expect(len(shape) == 3 and 0 < size <= PALETTE_SIZE, "The file's palette does not fit this model.")
    colours = np.frombuffer(reader.take(size * shape[0]), np.uint8).reshape(size, -1)
    counts = np.array([reader.varint() for _ in range(size)])
    good = counts.sum() == positions and counts.min() >= 1
    expect(good, "The file's colours do not add up to its positions.")
    index = SymbolDecoder(reader.rest()).decode(positions, 0, SymbolTables([counts], [0]))
    values = (torch.from_numpy(colours[index].T.astype(np.float32)) - 128) / 32 * std[:, None] + mean[:, None]
    return decode_tiles(model, values.reshape(1, *shape).to(model.device))
