"""The method `indices`, of a VQVAEModel or VQVAE2Model.

The indices of each level, the coarsest first, row by row, with tables of 1 + how often the images of the training used
each codeword (the model carries these counts; without them all codewords weigh the same).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .container import CorruptFileError, File
from .entropy_coder import SymbolDecoder, SymbolEncoder, SymbolTables
from .tiles import check_size, decode_tiles, encode_tiles


def index_tables(model: Any) -> SymbolTables:
    """One table for each level of codes."""
    weights = [quantizer.frequencies.cpu().numpy() + 1 for quantizer in model.quantizers]
    return SymbolTables(weights, [0] * len(weights))


def write(model: Any, pixels: Tensor, quality: float | None) -> bytes:
    """The indices of an image (uint8); there is one quality. Only the encoder works on tiles, so that codewords are
    chosen once. Raises ValueError."""
    check_size(model, pixels.shape[2:])
    encoded = encode_tiles(lambda values: model.encoder(values)[0].float(), model, pixels)
    coder, tables = SymbolEncoder(), index_tables(model)
    for level, indices in enumerate(model.levels_of(model.bottleneck(encoded.to(model.dtype)).indices)):
        coder.encode(indices.flatten().cpu().numpy().astype(np.int32), level, tables)
    return coder.finish()


def read(model: Any, file: File) -> Tensor:
    """The image (uint8) of what `write` wrote. Raises CorruptFileError."""
    check_size(model, (file.height, file.width), CorruptFileError)
    decoder, tables, levels = SymbolDecoder(file.body), index_tables(model), []
    for level, shape in enumerate(model.config.level_shapes(file.height, file.width)):
        symbols = decoder.decode(math.prod(shape), level, tables)
        levels.append(torch.from_numpy(symbols).long().view(1, *shape).to(model.device))
    return decode_tiles(model, model.indices_to_latents(model.from_levels(levels)))
