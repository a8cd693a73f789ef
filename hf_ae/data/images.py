"""Hub or local datasets -> batches of uint8 images: from memory (decoded once) or streamed (flat memory)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..models.image_processing import MODES, fit_array

HELD_OUT = ("test", "validation", "valid", "val", "eval")
"""Names of the split that models are measured on, where none is asked for."""


def open_dataset(name: str, config_name: str | None = None, streaming: bool = False):
    """All splits of a Hub dataset id or of a local folder. Raises ValueError.

    A machine without the Hub reads `owner/name` from the folder `$HF_AE_DATASETS/name`, where that exists.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    copy = Path(os.environ.get("HF_AE_DATASETS", "/nonexistent"), name.split("/")[-1])
    try:
        return datasets.load_dataset(str(copy) if copy.is_dir() and not Path(name).exists() else name, config_name, streaming=streaming)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"The dataset {name!r} cannot be opened: {reason}") from None


def pick_split(parts, name: str):
    """One split of an opened dataset, or several as `train+test`. Raises ValueError that says what is there instead."""
    if "+" in name and name not in parts:
        import datasets

        return datasets.concatenate_datasets([pick_split(parts, part.strip()) for part in name.split("+")])
    if name not in parts:
        raise ValueError(f"The dataset has no split {name!r}: it has {', '.join(map(str, parts))}.")
    if hasattr(parts[name], "num_rows") and len(parts[name]) == 0:
        raise ValueError(f"The split {name!r} of the dataset is empty.")
    return parts[name]


def held_out_name(parts) -> str | None:
    """The split to measure on: the first of HELD_OUT that is there."""
    return next((name for name in HELD_OUT if name in parts), None)


def image_column(dataset, name: str | None = None) -> str:
    """The column that holds the images: `name`, or the only one of type Image. Raises ValueError."""
    import datasets

    if dataset.features is None:  # a stream that has not said yet
        first = next(iter(dataset))
        columns, images = list(first), [c for c in first if hasattr(first[c], "convert")]
    else:
        columns = list(dataset.features)
        images = [c for c in columns if isinstance(dataset.features[c], datasets.Image)]
    if name is not None:
        if name not in columns:
            raise ValueError(f"There is no column {name!r}: write --image_column with one of {', '.join(columns)}.")
        if dataset.features is not None and isinstance(dataset.features[name], datasets.Value | datasets.ClassLabel):
            raise ValueError(f"The column {name!r} holds no images: write --image_column with one of {', '.join(images or columns)}.")
        return name
    if len(images) != 1:
        raise ValueError(f"Which column holds the images? Write --image_column with one of {', '.join(images or columns)}.")
    return images[0]


def read_texts(dataset, column: str) -> list:
    """The captions of a column: a string, or a list of strings, a row; of a column of classes, their names. Raises ValueError."""
    import datasets

    if column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r}: write --caption_columns with some of {', '.join(dataset.column_names)}.")
    kind, values = dataset.features[column], list(dataset[column])
    return [kind.names[value] for value in values] if isinstance(kind, datasets.ClassLabel) else values


class BrokenImageError(ValueError):
    """An image of the dataset that cannot be read."""


class Decoder:
    """Rows of a dataset -> uint8 (num_channels, height, width), by the model's image processor.

    A row that cannot be read raises BrokenImageError with its number and file, or is counted in `skipped` and left out
    where `skip_broken` says so. `keep_size` keeps each image's size; only images smaller than the model's are scaled up.
    """

    def __init__(self, processor, skip_broken: bool = False, keep_size: bool = False):
        self.processor, self.skip_broken, self.skipped = processor, skip_broken, 0
        self.target, self.keep_size = processor.target_size(), keep_size

    def __call__(self, numbered) -> np.ndarray | None:
        number, value = numbered
        file = f" ({value['path']})" if isinstance(value, dict) and value.get("path") else ""
        try:
            if isinstance(value, dict):
                value = value["bytes"] if value.get("bytes") is not None else value["path"]
            elif isinstance(value, list):
                value = np.asarray(value)
            array = self.processor.to_array(value, None if self.keep_size else self.target)
            if self.keep_size:
                array = fit_array(array, (max(self.target[0], array.shape[1]), max(self.target[1], array.shape[2])))
            return array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if self.skip_broken:
                self.skipped += 1
                return None
            raise BrokenImageError(
                f"Row {number} of the dataset{file} is no readable image: {error.args[0] if error.args else error} "
                "(hf_ae.train leaves such rows out with --skip_broken_images)"
            ) from None


def undecoded(dataset, column: str):
    """The dataset with `column` alone, as encoded bytes where it holds images."""
    import datasets

    if dataset.features and isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset.select_columns([column])


class ImagesInMemory:
    """All images of a split, decoded once: `pixels` is uint8 (images, num_channels, height, width)."""

    keep_size = False

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels

    @classmethod
    def load(cls, dataset, column: str, processor, skip_broken: bool = False, limit: int | None = None, progress=None):
        """Decode `column` of `dataset` (the first `limit` rows). `progress` wraps the iterator, as tqdm does."""
        if processor.num_channels not in MODES and "Image" in str((dataset.features or {}).get(column)):
            raise ValueError(f"num_channels={processor.num_channels} does not fit image files, which have 1, 3 or 4 channels.")
        dataset = undecoded(dataset, column)
        decode = Decoder(processor, skip_broken, cls.keep_size)
        if hasattr(dataset, "num_rows"):
            dataset = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
            values = (value for chunk in dataset.with_format("arrow")[:][column].chunks for value in chunk.to_pylist())
        else:
            values = (row[column] for row in (dataset if limit is None else dataset.take(limit)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            arrays = pool.map(decode, enumerate(values), chunksize=256)
            arrays = arrays if progress is None else progress(arrays, total=getattr(dataset, "num_rows", limit))
            kept = [array for array in arrays if array is not None]
        if decode.skipped:
            print(f"Skipped {decode.skipped} of {decode.skipped + len(kept)} images that cannot be read.")
        if not kept:
            raise ValueError("No image of this split can be read.")
        return cls.collect(kept, decode.target)

    @classmethod
    def collect(cls, arrays: list[np.ndarray], target: tuple[int, int]):
        return cls(torch.from_numpy(np.stack(arrays)))

    def __len__(self) -> int:
        return len(self.pixels)

    def num_batches(self, batch_size: int, processes: int = 1) -> int:
        """Batches of an epoch."""
        return num_batches(len(self), batch_size, processes)

    def batches(self, batch_size: int, epoch: int, **where) -> Iterator[torch.Tensor]:
        """uint8 batches of one epoch, in the order of `row_batches`."""
        for rows in row_batches(len(self), batch_size, epoch, **where):
            yield self.pixels[rows]


class RandomCrops(ImagesInMemory):
    """All images of a split at their own size; in each epoch one window of each, at a random place."""

    keep_size = True

    def __init__(self, images: list[torch.Tensor], size: tuple[int, int]):
        self.images, self.size = images, size

    @classmethod
    def collect(cls, arrays, target):
        return cls([torch.from_numpy(array) for array in arrays], target)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, epoch: int, **where) -> Iterator[torch.Tensor]:
        """uint8 batches of windows; the place of a window is fixed by the seed, the epoch and the image."""
        draw = torch.Generator().manual_seed(1_000_003 * where.get("seed", 0) + epoch)
        places = torch.rand(len(self), 2, generator=draw).tolist()
        for rows in row_batches(len(self), batch_size, epoch, **where):
            yield torch.stack([self._window(self.images[row], *places[row]) for row in rows.tolist()])

    def _window(self, image: torch.Tensor, down: float, right: float) -> torch.Tensor:
        height, width = self.size
        top, left = int(down * (image.shape[1] - height + 1)), int(right * (image.shape[2] - width + 1))
        return image[:, top : top + height, left : left + width]


def num_batches(rows: int, batch_size: int, processes: int = 1) -> int:
    """Batches of an epoch; rows that do not fill a last batch wait for the next epoch's order."""
    return max(1, rows // (batch_size * processes))


def row_batches(rows: int, batch_size: int, epoch: int, seed: int = 0, start: int = 0, rank: int = 0, processes: int = 1):
    """Numbers of rows, batch by batch, in an order that `seed` and `epoch` fix, from batch `start` on.

    Each process takes its part of the same global batch of `batch_size` × `processes` rows.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
    together = batch_size * processes
    for batch in range(start, num_batches(rows, batch_size, processes)):
        yield order[batch * together : (batch + 1) * together][rank::processes]


class ImageStream:
    """Images of a streamed split: rows pass through a shuffle buffer of encoded images and are decoded batch by batch."""

    def __init__(self, dataset, column: str, processor, skip_broken: bool = False, limit: int | None = None, buffer_size: int = 1000):
        rows = undecoded(dataset, column)
        self.rows, self.column, self.buffer_size = rows if limit is None else rows.take(limit), column, buffer_size
        self.decode = Decoder(processor, skip_broken)
        self.last: np.ndarray | None = None

    def batches(self, batch_size: int, epoch: int, seed: int = 0, start: int = 0, rank: int = 0, processes: int = 1):
        """As `ImagesInMemory.batches`; earlier batches are read again but not decoded."""
        together: list = []
        batch = 0
        for row in shuffled(self._numbered(), self.buffer_size, 1_000_003 * seed + epoch):
            together.append(row)
            if len(together) == batch_size * processes:
                if batch >= start:
                    yield torch.from_numpy(np.stack([self._image(row) for row in together[rank::processes]]))
                together, batch = [], batch + 1
        if batch == 0:
            raise ValueError(f"The stream holds fewer than {batch_size * processes} images, one batch.")

    def _image(self, row) -> np.ndarray:
        """The row's image, or in place of one that is skipped the last good one: every process gets full batches."""
        image = self.decode(row)
        self.last = self.last if image is None else image
        if self.last is None:
            raise ValueError("The first image of the stream cannot be read.")
        return self.last

    def _numbered(self):
        return ((number, row[self.column]) for number, row in enumerate(self.rows))


def shuffled(rows: Iterator, buffer_size: int, seed: int) -> Iterator:
    """Rows in a random order that `seed` fixes, holding `buffer_size` of them at a time."""
    dice = random.Random(seed)
    buffer: list = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        at = dice.randrange(buffer_size)
        yield buffer[at]
        buffer[at] = row
    dice.shuffle(buffer)
    yield from buffer


def batch_for(values: int, most: int = 500) -> int:
    """How many images of so many values to work on at once, so that their feature maps fit into memory."""
    return max(1, min(most, 2**22 // values))


def to_pixel_values(
    pixels: torch.Tensor, device, pixel_range, flip=False, symmetry=False, colors=False, shift: int = 0, binarize=False
) -> torch.Tensor:
    """uint8 batch -> float `pixel_values` in `pixel_range` on `device`.

    flip: mirror half of the images. symmetry: one of the eight symmetries of the square for each image.
    colors: shuffle the channels of two images in three. shift: move each by up to `shift` pixels, filling with its border.
    binarize: draw each pixel from a Bernoulli with its gray value as probability.
    """
    x = pixels.to(device, non_blocking=True).float().div_(255)
    if symmetry:
        upright, flip = len(x) // 2, True
        x = torch.cat([x[:upright], x[upright:].transpose(2, 3)])  # batches are in random order
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-2), x)
    if colors:
        order = torch.rand(x.shape[:2], device=device).argsort(1)
        order = torch.where(torch.rand(len(x), 1, device=device) < 1 / 3, torch.arange(x.shape[1], device=device), order)
        x = x.gather(1, order[:, :, None, None].expand_as(x))
    if flip:
        mirrored = torch.rand(len(x), device=device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if shift:
        x = shift_randomly(x, shift)
    if binarize:
        x = torch.bernoulli(x)
    low, high = pixel_range
    return x if (low, high) == (0.0, 1.0) else x * (high - low) + low


def shift_randomly(x: torch.Tensor, most: int) -> torch.Tensor:
    """Move each image by a whole number of pixels from -most to most, down and right, repeating its border."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (most,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2, batch, 1), device=x.device)
    rows = (top + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=x.device))[:, None, None, :]
    images = torch.arange(batch, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


def binarized_once(pixels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """One fixed Bernoulli draw of uint8 images, as 0 and 255: the test set of binarised MNIST."""
    dice = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (dice < pixels.float() / 255).to(torch.uint8) * 255
