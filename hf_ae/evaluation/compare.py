"""Several checkpoints on one dataset: one table and one figure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import ImagesInMemory, evaluation_split, image_column, open_dataset, pick_split
from ..errors import UserError, require
from ..latents import reconstruct
from ..loading import load_model, load_pipeline, pick_device, pipeline_image_processor
from ..metrics import reconstruction_metrics
from ..plots import labelled_rows
from .feature_network import load_feature_network
from .generation import (
    IMAGES,
    captions_of,
    check_sampler,
    find_sampler,
    measure_generation,
    model_generator,
    pipeline_generator,
)

COLUMNS = {
    "parameters": "parameters", "code_size": "latents", "mse": "MSE", "psnr": "PSNR (dB)", "ssim": "SSIM",
    "fid": "FID", "kid": "KID × 1000", "precision": "precision", "recall": "recall", "coverage": "coverage",
    "sampler": "sampled from", "ms_per_sample": "ms a sample", "images_per_second": "reconstructions/s",
}  # fmt: skip
"""Keys of a row -> titles."""
REAL = "real (training split)"
Row = dict[str, Any]


def compare(
    models: Sequence[str], dataset_name: str, split: str | None = None, max_images: int | None = None,
    sampler: str | None = None, feature_network: str | None = None, device: str | None = None,
) -> tuple[dict[str, Row], dict[str, Tensor]]:  # fmt: skip
    """({model: its row of the table}, rows of the figure). Raises ValueError where a model or the data cannot be
    loaded.

    A row holds reconstruction errors; FID, KID, precision, recall and coverage of as many samples as there are images;
    times. A model that cannot be sampled has no such figures, and says why in `note`. The row `REAL` is the floor:
    images of the split `train` against the evaluated ones; it is left out where there is no other split. `sampler` as
    in `hf-ae evaluate`. A text-to-image pipeline draws the captions, or the names of the classes, of the dataset.
    """
    check_sampler(sampler)
    splits = open_dataset(dataset_name)
    evaluated = evaluation_split(splits, split)
    rows = pick_split(splits, evaluated)
    loaded = [load(m, pick_device(device)) for m in models]
    names = [Path(m).name if Path(m).is_dir() else m for m in models]
    names = list(models) if len(set(names)) < len(names) else names
    network = load_feature_network(feature_network)
    table: dict[str, Row] = {}
    figure: dict[str, Tensor] = {}
    for folder, name, (model, processor, is_pipeline) in zip(models, names, loaded):
        column, limit = image_column(rows), min(max_images or IMAGES, IMAGES)
        real = ImagesInMemory.load(rows, column, processor, limit=limit).pixels.float() / 255
        train = None
        if "train" in splits:
            same = evaluated == "train"
            part = None if same else ImagesInMemory.load(splits["train"], column, processor, limit=limit)
            train = real if part is None else part.pixels.float() / 255
        captions = captions_of(rows) if is_pipeline else None
        table[name], images = measure(model, folder, sampler, real, train, network, captions)
        floor = table[name].pop("floor", None)
        if floor is not None:
            table.setdefault(REAL, floor)
        figure.setdefault("original", real[:8])
        figure |= {f"{name}\n{kind}": found[:8] for kind, found in images.items()}
    if REAL in table:
        table[REAL] = table.pop(REAL)  # last
    shape = figure["original"].shape[1:]
    return table, {title: images for title, images in figure.items() if images.shape[1:] == shape}


def load(name: str, device: torch.device | str = "cpu") -> tuple[Any, Any, bool]:
    """(model or text-to-image pipeline, its image processor, whether it is a pipeline)."""
    if (Path(name) / "model_index.json").is_file():
        pipe = load_pipeline(name, device=device)
        return pipe, pipeline_image_processor(pipe), True
    return *load_model(name, device), False


def measure(
    model: Any, folder: str, sampler: str | None, real: Tensor, train: Tensor | None, network: torch.nn.Module,
    captions: Sequence[str] | None = None,
) -> tuple[Row, dict[str, Tensor]]:  # fmt: skip
    """(row of the table, images) of one model, or of a pipeline that draws `captions`."""
    autoencoder = model if captions is None else model.vae
    parts = [model] if captions is None else [c for c in model.components.values() if isinstance(c, torch.nn.Module)]
    row: Row = {"parameters": sum(p.numel() for part in parts for p in part.parameters())}
    images = {}
    if hasattr(autoencoder.config, "latent_shape"):  # not diffusers' AutoencoderKL
        reconstruct(autoencoder, real[:100])
        started = time.perf_counter()
        rebuilt = images["reconstructed"] = reconstruct(autoencoder, real)
        row |= {
            "images_per_second": len(real) / (time.perf_counter() - started),
            **reconstruction_metrics(real, rebuilt),
        }
        row["code_size"] = math.prod(autoencoder.config.latent_shape)
    try:
        if captions is None:
            generator = model_generator(model, find_sampler(model, folder, sampler, lambda: eight_bit_pixels(train)))
        else:
            generator = pipeline_generator(model, captions)
        found, images["sampled"] = measure_generation(generator, real, None if train is real else train, network)
    except UserError as error:
        return {**row, "note": str(error)}, images
    return {**row, **found, "ms_per_sample": 1000 * found["seconds_per_image"]}, images


def eight_bit_pixels(train: Tensor | None) -> Tensor:
    """Training images in 0…1 as uint8. Raises ValueError where there are none."""
    if train is None:
        raise UserError("The dataset has no split 'train' to fit a sampler on.")
    return (train * 255).round().to(torch.uint8)


def to_markdown(table: dict[str, Row]) -> str:
    """The table; figures that no model has are left out."""
    columns = [key for key in COLUMNS if any(key in row for row in table.values())]
    lines = ["| | " + " | ".join(COLUMNS[c] for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(c)) for c in columns) + " |")
    notes = [f"{name}: {row['note']}" for name, row in table.items() if "note" in row]
    return "\n".join([*lines, "", *notes] if notes else lines)


def cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value or ""


def check_output(path: Path) -> None:
    """Raise ValueError unless the table can be written to `path`."""
    require(path.suffix in (".md", ".json"), f"{path} must end in .md or .json.")
    require(not path.is_dir() and path.resolve().parent.is_dir(), f"The folder of {path} does not exist.")


def write(table: dict[str, Row], figure: dict[str, Tensor], path: Path) -> list[Path]:
    """Write the table as Markdown or JSON, and the figure beside it; returns both paths."""
    image = path.with_suffix(".png")
    labelled_rows(figure, image)
    if path.suffix == ".json":
        path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    else:
        path.write_text(f"{to_markdown(table)}\n\n![Originals, reconstructions and samples]({image.name})\n")
    return [path, image]
