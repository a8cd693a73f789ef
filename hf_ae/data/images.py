"""A split of a dataset -> uint8 images in memory, decoded once, and batches of them."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError, require
from ..models.image_processing import MODES, AutoencoderImageProcessor, fit_array


class BrokenImageError(UserError):
    """An image of the dataset that cannot be read."""


class Decoder:
    """Rows of a dataset -> uint8 (num_channels, height, width), by the model's image processor.

    A row that cannot be read raises BrokenImageError with its index and file, and with `advice`; where `skip_broken`
    says so it becomes None. `keep_size` keeps each image's size; only images smaller than the model's are scaled up.
    `bits`: whole numbers are 0 for black and 1 for white.
    """

    def __init__(
        self, processor: AutoencoderImageProcessor, skip_broken: bool = False, keep_size: bool = False,
        bits: bool = False, advice: str = "",
    ) -> None:  # fmt: skip
        self.processor, self.skip_broken, self.bits, self.advice = processor, skip_broken, bits, advice
        self.target, self.keep_size = processor.target_size(), keep_size

    def __call__(self, row: tuple[int, Any]) -> np.ndarray | None:
        """(index of the row, its value) -> the image; None where it is left out."""
        index, value = row
        file = f" ({value['path']})" if isinstance(value, dict) and value.get("path") else ""
        try:
            return self._decode(value)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if self.skip_broken:
                return None
            reason = str(error.args[0] if error.args else error).rstrip(".")
            advice = f" {self.advice}" if self.advice else ""
            raise BrokenImageError(
                f"Row {index} of the dataset{file} is no readable image: {reason}.{advice}"
            ) from error

    def _decode(self, value: Any) -> np.ndarray:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        elif isinstance(value, list):
            value = np.asarray(value)
        if self.bits and isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
            require(value.max() <= 1, f"it holds {value.max()}, and the first images hold 0 and 1 alone")
            value = value.astype(bool)
        array = self.processor.to_array(value, None if self.keep_size else self.target)
        if self.keep_size:
            array = fit_array(array, (max(self.target[0], array.shape[1]), max(self.target[1], array.shape[2])))
        return array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8)


def undecoded(rows: Any, column: str) -> Any:
    """The dataset with `column` alone, as encoded bytes where it holds images."""
    import datasets

    if rows.features and isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.select_columns([column])


def holds_bits(values: Iterable[Any]) -> bool:
    """Whether images are arrays of the whole numbers 0 and 1 alone: these are black and white, not 0 and 1 of 255."""
    found = False
    for value in values:
        array = np.asarray(value) if isinstance(value, list | np.ndarray) else np.zeros(0)
        if not np.issubdtype(array.dtype, np.integer) or not array.size or array.max() > 1 or array.min() < 0:
            return False
        found = found or bool(array.max() == 1)
    return found


SMALL_FILE = 4096
"""Bytes of an encoded image below which opening it, which is Python, takes longer than decoding it."""


def is_small(value: Any) -> bool:
    """Whether threads that decode such values only wait for each other."""
    data = value.get("bytes") if isinstance(value, dict) else None
    return data is not None and len(data) < SMALL_FILE


def decoded(decode: Decoder, rows: Iterable[tuple[int, Any]]) -> Iterator[np.ndarray | None]:
    """Each row (index, value), decoded, in order, by threads unless the first is small."""
    rows = iter(rows)
    first = list(itertools.islice(rows, 1))
    rows = itertools.chain(first, rows)
    return map(decode, rows) if first and is_small(first[0][1]) else in_threads(decode, rows)


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], chunk: int = 64) -> Iterator[Any]:
    """`work` of each item, in order, by as many threads as there are CPUs. Items are taken as they are needed."""
    items, threads = iter(items), os.cpu_count() or 1
    waiting: deque[Future[list[Any]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while some := list(itertools.islice(items, chunk)):
                waiting.append(pool.submit(lambda part: [work(item) for item in part], some))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def values_of(rows: Any, column: str) -> Iterator[Any]:
    """The values of a column, a part of the dataset at a time."""
    if not hasattr(rows, "num_rows"):
        yield from (row[column] for row in rows)
        return
    for table in rows.with_format("arrow").iter(1000):
        yield from table[column].to_pylist()


class ImagesInMemory:
    """All images of a split, decoded once: `pixels` is uint8 (images, num_channels, height, width)."""

    keep_size = False

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    @classmethod
    def load(
        cls, rows: Any, column: str, processor: AutoencoderImageProcessor, skip_broken: bool = False,
        limit: int | None = None, progress: bool = False, advice: str = "",
    ) -> Self:  # fmt: skip
        """Decode `column` of `rows` (the first `limit`), with a progress bar where asked for. Raises ValueError, with
        `advice` where an image is broken."""
        channels, kind = processor.num_channels, str((rows.features or {}).get(column))
        good = channels in MODES or "Image" not in kind
        require(good, f"num_channels={channels} does not fit image files, which have 1, 3 or 4 channels.")
        rows = undecoded(rows, column)
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows)))) if hasattr(rows, "num_rows") else rows.take(limit)
        decode = Decoder(processor, skip_broken, cls.keep_size, holds_bits(values_of(rows, column)), advice)
        bar: dict[str, Any] = dict(
            total=getattr(rows, "num_rows", limit), desc="decoding", mininterval=1.0, leave=False
        )
        kept, skipped = [], 0
        with tqdm(decoded(decode, enumerate(values_of(rows, column))), disable=not progress, **bar) as arrays:
            for array in arrays:
                if array is None:
                    skipped += 1
                else:
                    kept.append(array)
        if skipped:
            print(f"Skipped {skipped} of {skipped + len(kept)} images that cannot be read.")
        require(kept, "No image of this split can be read.")
        return cls.collect(kept, decode.target)

    @classmethod
    def collect(cls, arrays: list[np.ndarray], target: tuple[int, int]) -> Self:
        """Decoded images (num_channels, height, width) -> the set; `target` is the (height, width) of the model's."""
        return cls(torch.from_numpy(np.stack(arrays)))

    def __len__(self) -> int:
        return len(self.pixels)

    def num_batches(self, batch_size: int, processes: int = 1) -> int:
        """Batches of an epoch."""
        return num_batches(len(self), batch_size, processes)

    def batches(self, batch_size: int, epoch: int, **where: Any) -> Iterator[Tensor]:
        """uint8 batches of one epoch, in the order of `row_batches`."""
        for rows in row_batches(len(self), batch_size, epoch, **where):
            yield self.pixels[rows]


class RandomCrops(ImagesInMemory):
    """All images of a split at their own size; in each epoch one window of each, at a random place."""

    keep_size = True

    def __init__(self, images: list[Tensor], size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    @classmethod
    def collect(cls, arrays: list[np.ndarray], target: tuple[int, int]) -> Self:
        return cls([torch.from_numpy(array) for array in arrays], target)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, epoch: int, **where: Any) -> Iterator[Tensor]:
        """uint8 batches of windows; the place of a window is fixed by the seed, the epoch and the image."""
        generator = torch.Generator().manual_seed(1_000_003 * where.get("seed", 0) + epoch)
        places = torch.rand(len(self), 2, generator=generator).tolist()
        for rows in row_batches(len(self), batch_size, epoch, **where):
            yield torch.stack([self._window(self.images[row], *places[row]) for row in rows.tolist()])

    def _window(self, image: Tensor, down: float, right: float) -> Tensor:
        height, width = self.size
        top, left = int(down * (image.shape[1] - height + 1)), int(right * (image.shape[2] - width + 1))
        return image[:, top : top + height, left : left + width]


def num_batches(rows: int, batch_size: int, processes: int = 1) -> int:
    """Batches of an epoch; rows that do not fill a last batch wait for the next epoch's order. Raises ValueError for
    fewer rows than processes."""
    require(rows >= processes, f"{rows} images are too few for {processes} processes: start fewer processes.")
    return max(1, rows // (batch_size * processes))


def row_batches(
    rows: int, batch_size: int, epoch: int, seed: int = 0, start: int = 0, rank: int = 0, processes: int = 1,
    full: bool = True,
) -> Iterator[Tensor]:  # fmt: skip
    """Indices of rows, batch by batch, in an order that `seed` and `epoch` fix, from batch `start` on.

    Each process takes its part of the same global batch of `batch_size` × `processes` rows. `full=False` also gives
    the rows that do not fill a last batch.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    together = batch_size * processes
    for batch in range(start, num_batches(rows, batch_size, processes) if full else -(-rows // together)):
        yield order[batch * together : (batch + 1) * together][rank::processes]


def batch_for(values: int, most: int = 500) -> int:
    """How many images of so many values to work on at once, so that their feature maps fit into memory."""
    return max(1, min(most, 2**22 // values))


def each_batch(x: Tensor, most: int = 500) -> Iterable[Tensor]:
    """Images (images, channels, height, width) in parts that fit into memory."""
    return x.split(batch_for(x[0].numel(), most))
