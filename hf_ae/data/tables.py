"""Rows of a dataset as a model takes them: images, or tables of numbers, of which a row is an image of height 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import require, user_input
from ..models.image_processing import AutoencoderImageProcessor
from .images import ImagesInMemory
from .sources import image_column as find_image_column


def table_processor(table: NDArray[Any], columns: Sequence[str]) -> AutoencoderImageProcessor:
    """The processor that brings each column of a table (rows, columns) to mean 0 and standard deviation 1; constant
    columns become 0."""
    deviations = table.std(0, dtype=np.float64)
    fields: dict[str, Any] = dict(num_channels=1, pixel_range=[-1.0, 1.0], feature_columns=list(columns))
    fields |= dict(feature_means=table.mean(0, dtype=np.float64).tolist())
    fields |= dict(feature_stds=np.where(deviations > 0, deviations, 1.0).tolist())
    return AutoencoderImageProcessor(size={"height": 1, "width": len(columns)}, **fields)


def check_columns(rows: Any, columns: Sequence[str]) -> None:
    """Raise ValueError, naming those that are missing, unless the columns of a table are all there."""
    missing = [name for name in columns if name not in rows.column_names]
    there = ", ".join(rows.column_names)
    require(not missing, f"There is no column {', '.join(missing)}, which the model takes: the dataset has {there}.")


def read_table(rows: Any, columns: Sequence[str]) -> NDArray[Any]:
    """Columns of a dataset -> (rows, columns). Raises ValueError for columns that are missing or hold no numbers."""
    import datasets

    check_columns(rows, columns)
    for name in columns:
        kind = rows.features[name]
        number = isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "float", "bool", "double"))
        require(number, f"The column {name!r} holds no numbers: leave it out of --feature_columns.")
    return np.stack([np.asarray(rows[name], dtype=np.float64) for name in columns], 1)


def rows_to_values(rows: Any, processor: AutoencoderImageProcessor) -> Tensor:
    """Rows of a dataset -> pixel values (rows, 1, 1, columns). Raises ValueError, naming the columns, for values that
    are not finite."""
    with user_input():
        return processor.standardized(read_table(rows, processor.feature_columns or []))


def read_rows(
    rows: Any, processor: AutoencoderImageProcessor, image_column: str | None = None, limit: int | None = None,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """The first `limit` rows of a dataset: uint8 images (rows, channels, height, width), or the pixel values of those
    of a table, where the processor is that of one. Raises ValueError."""
    if processor.feature_columns is not None:
        return rows_to_values(rows if limit is None else rows.select(range(min(limit, len(rows)))), processor)
    column = find_image_column(rows, image_column)
    return ImagesInMemory.load(rows, column, processor, limit=limit, progress=progress).pixels
