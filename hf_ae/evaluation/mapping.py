"""A model and a dataset -> a map of the images by their latents, as a page or a figure, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..data import evaluation_split, open_dataset, pick_split, read_labels, read_rows
from ..errors import UserError, require
from ..latents import encode_images
from ..latents.map_page import RUNTIME, write_map
from ..latents.maps import check_method, map_latents, map_quality
from ..loading import load_model, pick_device
from ..plots import new_figure, scatter_of_classes


def map_dataset(
    model: str, dataset_name: str, output: Path, config: str | None = None, image_column: str | None = None,
    label_column: str | None = None, split: str | None = None, method: str | None = None, max_images: int = 4000,
    device: str | None = None,
) -> tuple[dict[str, float], list[Path]]:  # fmt: skip
    """(figures of `hf_ae.latents.maps.map_quality`, files written) of a map of a dataset's first images.

    `output`: .html for a page, .png for a figure. Raises ValueError.
    """
    check_method(method)  # now, and not after the decoding
    loaded, processor = load_model(model, pick_device(device))
    splits = open_dataset(dataset_name, config)
    split = evaluation_split(splits, split)
    rows = pick_split(splits, split)
    require(processor.feature_columns is None, "map shows images, and this model takes a table.")
    images = read_rows(rows, processor, image_column, max_images, progress=True).float() / 255
    labels, names = classes_of(splits, split, label_column)
    labels = None if labels is None else labels[: len(images)]
    found = map_latents(encode_images(loaded, images), method)
    quality = map_quality(images, found.points, labels)
    title = f"{Path(model).resolve().name}: {Path(dataset_name).name}"
    if output.suffix == ".png":
        about = f"{title}, {len(images):,} images, by {found.method}"
        draw_map(found.points, None if labels is None else labels.tolist(), names, about, output)
        return quality, [output]
    decodes = write_map(output, loaded.cpu(), found, images, labels, names, title)
    return quality, [output, *([output.parent / RUNTIME] if decodes else [])]


def classes_of(splits: Any, split: str, column: str | None) -> tuple[torch.Tensor | None, list[str]]:
    """`read_labels`; without a name of a column, those of `label` where it is there and holds classes."""
    try:
        return read_labels(splits, split, column or "label")
    except UserError:
        if column is not None:
            raise
        return None, []


def draw_map(points: Any, labels: list[int] | None, names: list[str], title: str, path: Path) -> None:
    """The figure of a map."""
    figure = new_figure(8 if labels else 6.4, 6.4)
    axis = figure.subplots()
    scatter_of_classes(axis, points, labels, names)
    axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path)
