"""A streamed split -> batches of uint8 images, in flat memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, require
from ..models.image_processing import AutoencoderImageProcessor
from .images import Decoder, holds_bits, undecoded

Row = TypeVar("Row")
FIRST = 1000
"""Images of a stream that show whether it holds 0 and 1 alone."""


class ImageStream:
    """Images of a streamed split: rows pass through a shuffle buffer of encoded images and are decoded batch by
    batch."""

    def __init__(
        self, rows: Any, column: str, processor: AutoencoderImageProcessor, skip_broken: bool = False,
        limit: int | None = None, buffer_size: int = 1000, advice: str = "",
    ) -> None:  # fmt: skip
        rows = undecoded(rows, column)
        self.rows, self.column, self.buffer_size = rows if limit is None else rows.take(limit), column, buffer_size
        first = itertools.islice((row[column] for row in self.rows), FIRST)
        self.decode = Decoder(processor, skip_broken, bits=holds_bits(first), advice=advice)
        self.last: np.ndarray | None = None
        self.skipped = 0

    def batches(
        self, batch_size: int, epoch: int, seed: int = 0, start: int = 0, rank: int = 0, processes: int = 1,
        full: bool = True,
    ) -> Iterator[Tensor]:  # fmt: skip
        """As `ImagesInMemory.batches`; earlier batches are read again but not decoded. Raises ValueError where the
        stream holds less than one batch, unless `full=False` also asks for what fills none."""
        together: list[tuple[int, Any]] = []
        batch = 0
        rows = ((index, row[self.column]) for index, row in enumerate(self.rows))
        for row in shuffled(rows, self.buffer_size, 1_000_003 * seed + epoch):
            together.append(row)
            if len(together) == batch_size * processes:
                if batch >= start:
                    yield self._batch(together[rank::processes])
                together, batch = [], batch + 1
        if not full and together[rank::processes]:
            yield self._batch(together[rank::processes])
        require(batch or not full, f"The stream holds fewer than {batch_size * processes} images, one batch.")

    def _batch(self, rows: list[tuple[int, Any]]) -> Tensor:
        return torch.from_numpy(np.stack([self._image(row) for row in rows]))

    def _image(self, row: tuple[int, Any]) -> np.ndarray:
        """The row's image, or in place of one that is skipped the last good one: every process gets full batches."""
        image = self.decode(row)
        self.skipped += image is None
        self.last = self.last if image is None else image
        if self.last is None:
            raise UserError("The first image of the stream cannot be read.")
        return self.last


def shuffled(rows: Iterator[Row], buffer_size: int, seed: int) -> Iterator[Row]:
    """Rows in a random order that `seed` fixes, holding `buffer_size` of them at a time."""
    generator = random.Random(seed)
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        index = generator.randrange(buffer_size)
        yield buffer[index]
        buffer[index] = row
    generator.shuffle(buffer)
    yield from buffer
