"""Hub or local datasets -> batches of uint8 images, from memory (decoded once) or streamed (flat memory)."""

from .augmentation import binarized_once, to_pixel_values
from .images import ImagesInMemory, RandomCrops, batch_for, each_batch, num_batches, row_batches
from .sources import (
    check_column,
    class_columns,
    evaluation_split,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    read_labels,
    read_texts,
    without_bars,
)
from .stream import ImageStream
from .tables import read_rows, read_table, rows_to_values, table_processor

__all__ = [
    "ImageStream", "ImagesInMemory", "RandomCrops", "batch_for", "binarized_once", "check_column", "class_columns",
    "each_batch", "evaluation_split", "held_out_name", "image_column", "num_batches", "open_dataset", "pick_split",
    "read_labels", "read_rows", "read_table", "read_texts", "row_batches", "rows_to_values", "table_processor",
    "to_pixel_values", "without_bars",
]  # fmt: skip
