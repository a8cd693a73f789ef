"""What to measure, and the data to measure it on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import (
    binarized_once,
    evaluation_split,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    read_labels,
    read_rows,
)
from ..errors import UserError, require
from .record import TASKS

BY_DEFAULT = TASKS[:3]


@dataclass
class Request:
    """What to measure, on which data."""

    model: str
    """Folder or Hub id."""
    dataset_name: str
    """Hub id or folder."""
    dataset_config_name: str | None = None
    image_column: str | None = None
    """Default: the only column of images."""
    split: str | None = None
    """Split to measure on. Default: test or validation, or the only one."""
    train_split: str = "train"
    """Split that PCA and samplers are fitted on."""
    tasks: str | None = None
    """Comma-separated, of TASKS. Default: reconstruction, likelihood and compression, where they apply."""
    samples: int = 100
    """Importance samples an image, for the likelihood."""
    max_images: int | None = None
    """Measure the first images only."""
    binarize: bool = False
    """One fixed Bernoulli draw of each pixel."""
    sampler: str | None = None
    """What latents are drawn from, for generation: saved (beside the model), prior, gaussian or mixture (fitted now).
    Default: the saved one, or the model's own prior, or N(0, I)."""
    label_column: str | None = None
    """Column of classes. For generation: to fit the sampler to, one by one. Default of other tasks: label."""
    feature_network: str | None = None
    """Folder or Hub id of a transformers image model, for generation. Default: the small network that ships."""
    corrupt: str | None = None
    """What to repair, as gaussian:0.5. Default: what the model was trained to repair."""
    outliers: str | None = None
    """For anomaly: Hub id or folder of a dataset, whose images are outliers."""
    normal_class: str | None = None
    """For anomaly: the class of the normal images, by its name; those of other classes are outliers."""
    factor_columns: str | None = None
    """Comma-separated columns of the factors, for disentanglement. Default: all columns of whole numbers."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.asked if task not in TASKS]
        require(not unknown, f"The task {''.join(unknown[:1])!r} is not known: write one of {', '.join(TASKS)}.")

    @property
    def asked(self) -> list[str]:
        """The tasks that are asked for by name, or else those of BY_DEFAULT."""
        return names(self.tasks) or list(BY_DEFAULT)

    def command(self) -> str:
        """The command line that measures this."""
        folder = Path(self.model)
        words = ["hf-ae evaluate", folder.resolve().name if folder.is_dir() else self.model]
        words += ["--dataset_name", self.dataset_name]
        for spec in dataclasses.fields(self)[2:]:
            value = getattr(self, spec.name)
            if value != spec.default:
                words += [f"--{spec.name}"] if value is True else [f"--{spec.name}", str(value)]
        return " ".join(words)


def names(text: str | None) -> list[str]:
    """The names in a text that separates them by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@dataclass
class Data:
    """The splits of a dataset, as a model takes their images."""

    request: Request
    processor: Any
    splits: Any = field(init=False)
    split: str = field(init=False)
    """The one to measure on."""
    rows: Any = field(init=False)
    """Those of `split`."""

    def __post_init__(self) -> None:
        self.splits = open_dataset(self.request.dataset_name, self.request.dataset_config_name)
        self.split = evaluation_split(self.splits, self.request.split)
        self.rows = pick_split(self.splits, self.split)
        if self.request.split is None and held_out_name(self.splits) is None:
            print(f"The dataset has no split to test on: measured on its split {self.split!r} (--split).")
        self.column = image_column(self.rows, self.request.image_column)

    def pixels(self, split: str, limit: int | None = None) -> Tensor:
        """uint8 images of a split, the first `limit`."""
        rows = self.rows if split == self.split else pick_split(self.splits, split)
        found = read_rows(rows, self.processor, self.column, limit, progress=True)
        return binarized_once(found) if self.request.binarize else found

    def labels(self, split: str, column: str) -> Tensor | None:
        """Indices of the classes of a split; None where that column is not there or holds no classes."""
        try:
            return read_labels(self.splits, split, column)[0]
        except UserError:
            return None

    def classes(self, split: str, column: str) -> Tensor:
        """Indices of the classes of a split. Raises ValueError."""
        return read_labels(self.splits, split, column)[0]
