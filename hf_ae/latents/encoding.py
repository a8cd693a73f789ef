"""A dataset of images -> a dataset of their latents: in shards, by one task or many, to go on with after a stop."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import batch_for, check_column, image_column, open_dataset, rows_to_values, to_pixel_values, without_bars
from ..data.images import Decoder, decoded, holds_bits, undecoded, values_of
from ..data.tables import check_columns
from ..errors import UserError, require
from ..export import named
from ..loading import eval_mode, image_processor_for, load_model

MANIFEST = ".encoding.json"
"""What the shards of a folder were made of; hidden, so that `load_dataset` leaves it alone."""
MOST_ROWS, MOST_VALUES = 10_000, 2**24
"""Of a shard: rows, and values of their latents."""


def encode_dataset(
    model: Any, dataset: Any, keep_columns: Sequence[str] = (), image_column: str | None = None,
    output_dir: str | Path | None = None, split: str = "train", task: int = 0, num_tasks: int = 1,
    skip_broken_images: bool = False, progress: bool = False, processor: Any = None,
) -> Any:  # fmt: skip
    """Images -> a `datasets.Dataset` with a column `latents`, and `keep_columns`, in the order of the rows.

    `model`: one of this family, or its folder or Hub id. `dataset`: a `datasets.Dataset`; of a DatasetDict, or a
    folder or Hub id, all splits are encoded to a DatasetDict. Latents are float32, what `model.decode` takes, a VAE's
    the means; discrete codes also give `indices` (`indices_1`, the coarsest, `indices_2`, … of several levels).

    With `output_dir` the rows are written as `data/{split}-00000-of-00007.parquet`, …, which `load_dataset` reads.
    Memory stays flat; shards that are there from an earlier call are kept, and one appears only when it is whole. With
    `num_tasks` as many calls share the work, each with its `task` from 0 on; whoever ends last gets the whole dataset,
    the others what is there. Raises ValueError for what does not fit, and for an `output_dir` that holds latents of
    another model or of other rows.
    """
    if isinstance(model, str | Path):
        model, processor = load_model(model)
    dataset = open_dataset(str(dataset)) if isinstance(dataset, str | Path) else dataset
    if isinstance(dataset, Mapping):
        import datasets

        how: dict[str, Any] = dict(task=task, num_tasks=num_tasks, progress=progress)
        how |= dict(skip_broken_images=skip_broken_images, image_column=image_column, output_dir=output_dir)
        how |= dict(processor=processor)
        return datasets.DatasetDict(
            {name: encode_dataset(model, rows, keep_columns, split=name, **how) for name, rows in dataset.items()}
        )
    advice = "give a datasets.Dataset (Dataset.from_list makes one)."
    require(hasattr(dataset, "num_rows"), f"Rows of no known length: {advice}")
    require(0 <= task < num_tasks, f"task={task} must lie between 0 and num_tasks - 1, {num_tasks - 1}.")
    processor = processor or image_processor_for(model)
    keep = [keep_columns] if isinstance(keep_columns, str) else list(keep_columns)
    encoding = Encoding(model, processor, dataset, keep, image_column, skip_broken_images)
    bar = tqdm(total=len(dataset), desc="encoding", mininterval=1.0, disable=not progress, leave=False)
    with bar, without_bars():
        if output_dir is None:
            import datasets

            return datasets.concatenate_datasets([encoding.shard(i, bar) for i in range(encoding.num_shards)])
        return encoding.write(Path(output_dir), split, range(task, encoding.num_shards, num_tasks), bar)


@dataclass
class Encoding:
    """The rows of a dataset, cut into shards, and the model that they go through."""

    model: Any
    processor: Any
    rows: Any
    keep: list[str]
    column: str | None
    skip_broken: bool

    def __post_init__(self) -> None:
        require(len(self.rows), "The dataset is empty.")
        self.is_table = self.processor.feature_columns is not None
        if not self.is_table:
            self.column = image_column(self.rows, self.column)
        for name in self.keep:
            check_column(self.rows, name, "keep_columns")
            good = not name.startswith(("latents", "indices"))
            require(good, f"The column {name!r} has a name that the codes need: rename it first.")
        columns = self.processor.feature_columns
        check_columns(self.rows, columns or [])
        self.images = self.rows.select_columns(columns) if self.is_table else undecoded(self.rows, str(self.column))
        self.size = max(1, min(MOST_ROWS, MOST_VALUES // math.prod(self.model.config.latent_shape)))
        self.bits: bool | None = None

    @property
    def num_shards(self) -> int:
        """How many shards the rows are cut into: that does not depend on the tasks."""
        return -(-len(self.rows) // self.size)

    def write(self, folder: Path, split: str, shards: Sequence[int], bar: Any) -> Any:
        """Write those of the shards that are not there yet; returns all that are."""
        import datasets

        place = folder / "data"
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error
        self.claim(folder, split)
        files = [place / f"{split}-{i:05}-of-{self.num_shards:05}.parquet" for i in range(self.num_shards)]
        for i in shards:
            if files[i].is_file():
                bar.update(len(self.shard_range(i)))
                continue
            part = place / f".{files[i].name}"
            self.shard(i, bar).to_parquet(part)
            self.claim(folder, split, write=True)  # only now: a folder without codes belongs to nobody
            os.replace(part, files[i])
        there = [str(file) for file in files if file.is_file()]
        if not there:  # more tasks than shards
            return datasets.Dataset.from_dict({}, split=split)
        return datasets.Dataset.from_parquet(there, split=split)

    def claim(self, folder: Path, split: str, write: bool = False) -> None:
        """Raise ValueError where the folder holds other shards; with `write`, say what these are made of."""
        path = folder / MANIFEST
        mine = {split: self.origin}
        there = json.loads(path.read_text()) if path.is_file() else {}
        advice = "choose another folder, or empty this one."
        same = there.get(split, mine[split]) == mine[split]
        require(same, f"{folder} holds latents of another model, of other rows or with other columns: {advice}")
        foreign = split not in there and any((folder / "data").glob(f"{split}-*"))
        require(not foreign, f"{folder} holds files of the split {split!r} that are not ours: {advice}")
        if write and split not in there:
            part = folder / f"{MANIFEST}.{os.getpid()}"
            part.write_text(json.dumps({**there, **mine}, indent=1))
            os.replace(part, path)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What the latents depend on: a hash of all weights among it, so it is found once."""
        ends = [str(self.images[i])[:10_000] for i in (0, len(self.rows) - 1)]
        kept = {name: str(self.rows.features[name]) for name in self.keep}
        rows = {"rows": len(self.rows), "ends": hashlib.sha256("".join(ends).encode()).hexdigest(), "kept": kept}
        return {"model": fingerprint(self.model), "skip_broken": self.skip_broken, "shard_size": self.size, **rows}

    def shard_range(self, index: int) -> range:
        """The rows of a shard."""
        return range(index * self.size, min((index + 1) * self.size, len(self.rows)))

    def shard(self, index: int, bar: Any) -> Any:
        """The rows of a shard, encoded."""
        import datasets

        where = self.shard_range(index)
        kept: list[int] = []
        columns: dict[str, list[np.ndarray]] = {}
        for part in self.batches(where, kept, bar):
            for name, values in encode(self.model, part).items():
                columns.setdefault(name, []).append(values.numpy())
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        features = {name: feature_of(array) for name, array in arrays.items()}
        flat = {name: list(array) if array.ndim > 2 else array for name, array in arrays.items()}
        codes = datasets.Dataset.from_dict(flat, features=datasets.Features(features))
        if not self.keep:
            return codes
        others = self.rows.select_columns(self.keep).select(kept).flatten_indices()
        return datasets.concatenate_datasets([codes, others], axis=1)

    def batches(self, where: range, kept: list[int], bar: Any) -> Iterator[Tensor]:
        """uint8 images of the rows, batch by batch; `kept` gets the rows that could be read."""
        if self.is_table:
            kept.extend(where)
            bar.update(len(where))
            yield from rows_to_values(self.images.select(where), self.processor).split(MOST_ROWS)
            return
        if self.bits is None:  # one answer for all shards
            self.bits = holds_bits(values_of(self.images, str(self.column)))
        advice = "Leave such rows out with --skip_broken_images."
        decode = Decoder(self.processor, self.skip_broken, bits=self.bits, advice=advice)
        rows = self.images.select(where) if len(where) < len(self.images) else self.images
        arrays = zip(where, decoded(decode, zip(where, values_of(rows, str(self.column)))))
        most = batch_for(self.model.config.num_pixels)
        while some := list(itertools.islice(arrays, most)):
            good = [(row, array) for row, array in some if array is not None]
            bar.update(len(some))
            if good:
                kept.extend(row for row, _ in good)
                yield torch.from_numpy(np.stack([array for _, array in good]))


@torch.inference_mode()
def encode(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """uint8 images (images, channels, height, width), or pixel values of a table's rows -> `latents`, and `indices` of
    discrete codes, on the CPU."""
    with eval_mode(model):
        encoded = model.encode(to_pixel_values(pixels, model.device, model.config.pixel_range))
    found = {"latents": encoded.latents.float().cpu()}
    if model.has_discrete_codes:
        levels = named(model.levels_of(encoded.indices))
        found |= {name: level.int().cpu() for name, level in levels.items()}
    return found


def feature_of(array: np.ndarray) -> Any:
    """The feature of a column: a vector, or an array of two or more dimensions."""
    import datasets

    kind, shape = str(array.dtype), array.shape[1:]
    if len(shape) == 1:
        return datasets.List(datasets.Value(kind), length=shape[0])
    return {2: datasets.Array2D, 3: datasets.Array3D}[len(shape)](shape, kind)


def fingerprint(model: Any) -> str:
    """Of a model's configuration and weights."""
    state = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether all shards of each split in the folder are there."""
    names = [file.name for file in (folder / "data").glob("*.parquet")]
    splits = {re.sub(r"-\d{5}-of-", "-#-of-", name) for name in names}
    return sum(int(name[-13:-8]) for name in splits) == len(names) > 0


def write_card(folder: Path, model: str, dataset: str) -> None:
    """A card for the folder of encoded rows, unless it has one. Of a model in a folder it tells only the name."""
    path = folder / "README.md"
    if path.is_file():
        return
    name = Path(model).resolve().name if Path(model).is_dir() else model
    fields = ["tags:", "- hf_ae", "- latents", *([] if Path(model).is_dir() else ["base_model:", f"- {model}"])]
    load = 'from datasets import load_dataset\n\nrows = load_dataset("owner/name").with_format("torch")'
    text = f"The column `latents` holds what the autoencoder {name} makes of the images of {Path(dataset).name}:"
    lines = ["---", *fields, "---", f"# Latents of {Path(dataset).name}", "", f"{text} `model.decode` takes it.", ""]
    path.write_text("\n".join([*lines, "```python", load, "```", ""]))
