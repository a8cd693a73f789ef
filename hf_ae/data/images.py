"""A split of a dataset -> uint8 images in memory, decoded once, and batches of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

    A row that cannot be read raises BrokenImageError with its index and file, or is counted in `skipped` and left out
    where `skip_broken` says so. `keep_size` keeps each image's size; only images smaller than the model's are scaled
    up.
    """

    def __init__(
        self, processor: AutoencoderImageProcessor, skip_broken: bool = False, keep_size: bool = False
    ) -> None:
        self.processor, self.skip_broken, self.skipped = processor, skip_broken, 0
        self.target, self.keep_size = processor.target_size(), keep_size

    def __call__(self, row: tuple[int, Any]) -> np.ndarray | None:
        """(index of the row, its value) -> the image; None where it is left out."""
        index, value = row
        file = f" ({value['path']})" if isinstance(value, dict) and value.get("path") else ""
        try:
            return self._decode(value)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if self.skip_broken:
                self.skipped += 1
                return None
            raise BrokenImageError(
                f"Row {index} of the dataset{file} is no readable image: {error.args[0] if error.args else error} "
                "(hf_ae.train leaves such rows out with --skip_broken_images)"
            ) from error

    def _decode(self, value: Any) -> np.ndarray:
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        elif isinstance(value, list):
            value = np.asarray(value)
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


class ImagesInMemory:
    """All images of a split, decoded once: `pixels` is uint8 (images, num_channels, height, width)."""

    keep_size = False

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    @classmethod
    def load(
        cls, rows: Any, column: str, processor: AutoencoderImageProcessor, skip_broken: bool = False,
        limit: int | None = None, progress: bool = False,
    ) -> Self:  # fmt: skip
        """Decode `column` of `rows` (the first `limit`), with a progress bar where asked for. Raises ValueError."""
        channels, kind = processor.num_channels, str((rows.features or {}).get(column))
        good = channels in MODES or "Image" not in kind
        require(good, f"num_channels={channels} does not fit image files, which have 1, 3 or 4 channels.")
        rows, decode = undecoded(rows, column), Decoder(processor, skip_broken, cls.keep_size)
        if hasattr(rows, "num_rows"):
            rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
            values = (value for chunk in rows.with_format("arrow")[:][column].chunks for value in chunk.to_pylist())
        else:
            values = (row[column] for row in (rows if limit is None else rows.take(limit)))
        bar: dict[str, Any] = dict(
            total=getattr(rows, "num_rows", limit), desc="decoding", mininterval=1.0, leave=False
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            arrays = tqdm(pool.map(decode, enumerate(values), chunksize=256), disable=not progress, **bar)
            kept = [array for array in arrays if array is not None]
        if decode.skipped:
            print(f"Skipped {decode.skipped} of {decode.skipped + len(kept)} images that cannot be read.")
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

    def batches(self, batch_size: int, epoch: int, **where: int) -> Iterator[Tensor]:
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

    def batches(self, batch_size: int, epoch: int, **where: int) -> Iterator[Tensor]:
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
    """Batches of an epoch; rows that do not fill a last batch wait for the next epoch's order."""
    return max(1, rows // (batch_size * processes))


def row_batches(
    rows: int, batch_size: int, epoch: int, seed: int = 0, start: int = 0, rank: int = 0, processes: int = 1
) -> Iterator[Tensor]:
    """Indices of rows, batch by batch, in an order that `seed` and `epoch` fix, from batch `start` on.

    Each process takes its part of the same global batch of `batch_size` × `processes` rows.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    together = batch_size * processes
    for batch in range(start, num_batches(rows, batch_size, processes)):
        yield order[batch * together : (batch + 1) * together][rank::processes]


def batch_for(values: int, most: int = 500) -> int:
    """How many images of so many values to work on at once, so that their feature maps fit into memory."""
    return max(1, min(most, 2**22 // values))


def each_batch(x: Tensor, most: int = 500) -> Iterable[Tensor]:
    """Images (images, channels, height, width) in parts that fit into memory."""
    return x.split(batch_for(x[0].numel(), most))
