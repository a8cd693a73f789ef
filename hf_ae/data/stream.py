"""A streamed split -> batches of uint8 images, in flat memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, require
from ..models.image_processing import AutoencoderImageProcessor
from .images import Decoder, undecoded

Row = TypeVar("Row")


class ImageStream:
    """Images of a streamed split: rows pass through a shuffle buffer of encoded images and are decoded batch by
    batch."""

    def __init__(
        self, rows: Any, column: str, processor: AutoencoderImageProcessor, skip_broken: bool = False,
        limit: int | None = None, buffer_size: int = 1000,
    ) -> None:  # fmt: skip
        rows = undecoded(rows, column)
        self.rows, self.column, self.buffer_size = rows if limit is None else rows.take(limit), column, buffer_size
        self.decode = Decoder(processor, skip_broken)
        self.last: np.ndarray | None = None

    def batches(
        self, batch_size: int, epoch: int, seed: int = 0, start: int = 0, rank: int = 0, processes: int = 1
    ) -> Iterator[Tensor]:
        """As `ImagesInMemory.batches`; earlier batches are read again but not decoded. Raises ValueError where the
        stream holds less than one batch."""
        together: list[tuple[int, Any]] = []
        batch = 0
        rows = ((index, row[self.column]) for index, row in enumerate(self.rows))
        for row in shuffled(rows, self.buffer_size, 1_000_003 * seed + epoch):
            together.append(row)
            if len(together) == batch_size * processes:
                if batch >= start:
                    yield torch.from_numpy(np.stack([self._image(row) for row in together[rank::processes]]))
                together, batch = [], batch + 1
        require(batch, f"The stream holds fewer than {batch_size * processes} images, one batch.")

    def _image(self, row: tuple[int, Any]) -> np.ndarray:
        """The row's image, or in place of one that is skipped the last good one: every process gets full batches."""
        image = self.decode(row)
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
