"""Hub or local datasets: their splits and columns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line, require

HELD_OUT = ("test", "validation", "valid", "val", "eval")
"""Names of the split that models are measured on, where none is asked for."""
Splits = Mapping[str, Any]
"""An opened dataset: split name -> its rows."""


def open_dataset(name: str, config_name: str | None = None, streaming: bool = False) -> Splits:
    """All splits of a Hub dataset id or of a local folder. Raises ValueError.

    A machine without the Hub reads `owner/name` from the folder `$HF_AE_DATASETS/name`, where that exists.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    require(not Path(name).is_file(), f"The dataset {name!r} is a file: write the folder that holds it.")
    copy = Path(os.environ.get("HF_AE_DATASETS", "/nonexistent"), name.split("/")[-1])
    place = str(copy) if copy.is_dir() and not Path(name).exists() else name
    place = os.path.join(".", place) if Path(place).is_dir() else place  # a folder "csv" is no kind of dataset
    try:
        with without_bars():
            return datasets.load_dataset(place, config_name, streaming=streaming)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError, ValueError) as error:
        raise UserError(f"The dataset {name!r} cannot be opened: {first_line(error)}") from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of datasets, which show again afterwards where they did before."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def pick_split(splits: Splits, name: str) -> Any:
    """One split of an opened dataset, or several as `train+test`. Raises ValueError that says what is there
    instead."""
    if "+" in name and name not in splits:
        import datasets

        return datasets.concatenate_datasets([pick_split(splits, part.strip()) for part in name.split("+")])
    require(name in splits, f"The dataset has no split {name!r}: it has {', '.join(map(str, splits))}.")
    rows = splits[name]
    require(not hasattr(rows, "num_rows") or len(rows), f"The split {name!r} of the dataset is empty.")
    return rows


def held_out_name(splits: Iterable[str]) -> str | None:
    """The split to measure on: the first of HELD_OUT that is there."""
    return next((name for name in HELD_OUT if name in splits), None)


def evaluation_split(splits: Splits, wanted: str | None) -> str:
    """`wanted`, or the split to measure on, or the only one."""
    return wanted or held_out_name(splits) or next(iter(splits))


def image_column(rows: Any, name: str | None = None) -> str:
    """The column that holds the images: `name`, or the only one of type Image. Raises ValueError."""
    import datasets

    if rows.features is None:  # a stream that has not said yet
        first = next(iter(rows))
        columns, images = list(first), [c for c in first if hasattr(first[c], "convert")]
    else:
        columns = list(rows.features)
        images = [c for c in columns if isinstance(rows.features[c], datasets.Image)]
    scalar = datasets.Value | datasets.ClassLabel
    able = [c for c in columns if rows.features is None or not isinstance(rows.features[c], scalar)]
    require(able, f"The dataset has no column of images: it has {', '.join(columns)}.")
    choice = f"--image_column with one of {', '.join(images or able)}."
    if name is None:
        require(len(images) == 1, f"Which column holds the images? Write {choice}")
        return images[0]
    require(name in columns, f"There is no column {name!r}: write --image_column with one of {', '.join(columns)}.")
    wrong = rows.features is not None and isinstance(rows.features[name], scalar)
    require(not wrong, f"The column {name!r} holds no images: write {choice}")
    return name


def check_column(rows: Any, name: str, flag: str) -> None:
    """Raise ValueError, naming the flag to change, unless the column is there."""
    choice = ", ".join(rows.column_names)
    require(name in rows.column_names, f"There is no column {name!r}: write --{flag} with one of {choice}.")


def read_texts(rows: Any, column: str) -> list[Any]:
    """The captions of a column: a string, or a list of strings, a row; of a column of classes, their names.

    Raises ValueError where there is no such column.
    """
    import datasets

    check_column(rows, column, "caption_columns")
    kind, values = rows.features[column], list(rows[column])
    return [kind.names[value] for value in values] if isinstance(kind, datasets.ClassLabel) else values


def class_columns(rows: Any) -> list[str]:
    """The columns of type ClassLabel."""
    import datasets

    return [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]


def read_labels(splits: Splits, split: str, column: str) -> tuple[torch.Tensor, list[str]]:
    """(index of each row's class (rows,), names of the classes), of a column of classes, whole numbers or names.

    One mapping holds for all splits of the dataset: that of a ClassLabel, or the sorted values of all splits. Raises
    ValueError where the column is missing or holds something else.
    """
    import datasets

    rows = pick_split(splits, split)
    check_column(rows, column, "label_column")
    own, feature = list(rows[column]), rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        labelled = all(value is not None and value >= 0 for value in own)
        require(labelled, f"The column {column!r} has rows without a class: leave these out.")
        return torch.tensor(own), list(feature.names)
    good = {type(value) for value in own} in ({int}, {str}, {bool})
    require(
        good, f"The column {column!r} holds no classes: write --label_column with a column of whole numbers or names."
    )
    found = [set(part[column]) for part in splits.values() if column in part.column_names]
    with_classes = [values for values in found if values != {-1}]  # what a split without labels holds
    index = {
        value: i for i, value in enumerate(sorted(v for v in set().union(*with_classes) if type(v) is type(own[0])))
    }
    require(set(own) <= set(index), f"The column {column!r} of {split!r} has rows without a class: leave these out.")
    return torch.tensor([index[value] for value in own]), [str(value) for value in index]
