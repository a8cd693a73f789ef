"""Several checkpoints on one dataset: one table and one picture."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch

from ..data.images import ImagesInMemory, held_out_name, image_column, open_dataset, pick_split
from .evaluate import load_model, reconstruct
from .feature_network import load_feature_network
from ..diffusion.drawing import load_pipeline
from .generation import (
    IMAGES,
    captions_of,
    drawer_of,
    drawer_of_pipeline,
    find_sampler,
    measure_generation,
    pipeline_processor,
)
from ..metrics import reconstruction_metrics
from ..plots import labelled_rows

COLUMNS = {
    "parameters": "parameters", "code_size": "code", "mse": "MSE", "psnr": "PSNR (dB)", "ssim": "SSIM", "fid": "FID", "kid": "KID × 1000",
    "precision": "precision", "recall": "recall", "coverage": "coverage", "sampler": "sampled from", "ms_per_sample": "ms a sample",
    "images_per_second": "reconstructions/s",
}  # fmt: skip
"""Keys of a row -> titles."""
REAL = "real (training split)"


def compare(models: list[str], dataset_name: str, split: str | None = None, max_images: int | None = None,
            sampler: str | None = None, feature_network: str | None = None) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:  # fmt: skip
    """({model: its row of the table}, rows of the picture). Raises ValueError where a model or the data cannot be loaded.

    A row holds reconstruction errors; FID, KID, precision, recall and coverage of as many samples as there are images; times.
    A model that cannot be sampled has no such figures, and says why in `note`. The row `REAL` is the floor: training
    pictures against the evaluated ones. `sampler` as in `hf-ae evaluate`. A text-to-image pipeline draws the captions, or the
    names of the classes, of the dataset.
    """
    parts = open_dataset(dataset_name)
    dataset = pick_split(parts, split or held_out_name(parts) or next(iter(parts)))
    names, loaded = [Path(m).name if Path(m).is_dir() else m for m in models], [load(m) for m in models]
    names = list(models) if len(set(names)) < len(names) else names
    network = load_feature_network(feature_network)
    rows: dict[str, dict] = {}
    picture: dict[str, torch.Tensor] = {}
    for folder, name, (model, processor) in zip(models, names, loaded):
        real, train = load_pixels(parts, dataset, processor, min(max_images or IMAGES, IMAGES))
        captions = captions_of(dataset) if hasattr(model, "unet") else None
        rows[name], drawn = measure(model, folder, sampler, real, train, network, captions)
        floor = rows[name].pop("floor", None)
        if floor is not None:
            rows.setdefault(REAL, floor)
        picture.setdefault("original", real[:8])
        picture |= {f"{name}\n{kind}": pictures[:8] for kind, pictures in drawn.items()}
    shape = picture["original"].shape[1:]
    same = {title: pixels for title, pixels in picture.items() if pixels.shape[1:] == shape}
    return {name: rows[name] for name in sorted(rows, key=lambda name: name == REAL)}, same


def load_pixels(parts, dataset, processor, limit: int):
    """(evaluated, training) pictures as a model takes them, in 0…1."""
    column = image_column(dataset)
    sets = [dataset] + ([parts["train"]] if "train" in parts else [dataset])
    real, train = (ImagesInMemory.load(rows, column, processor, limit=limit).pixels.float() / 255 for rows in sets)
    return real, train


def load(name: str):
    """(model, image processor), or (text-to-image pipeline, image processor)."""
    if (Path(name) / "model_index.json").is_file():
        pipe = load_pipeline(name)
        return pipe, pipeline_processor(pipe)
    return load_model(name)


def measure(model, folder: str, sampler: str | None, real, train, network, captions=None) -> tuple[dict, dict[str, torch.Tensor]]:
    """(row of the table, pictures) of one model, or of a pipeline that draws `captions`."""
    autoencoder = model.vae if captions else model
    parts = [part for part in model.components.values() if isinstance(part, torch.nn.Module)] if captions else [model]
    row: dict = {"parameters": sum(p.numel() for part in parts for p in part.parameters())}
    drawn = {}
    if hasattr(autoencoder.config, "code_shape"):  # not diffusers' AutoencoderKL
        reconstruct(autoencoder, real[:100])
        started = time.perf_counter()
        rebuilt = drawn["reconstructed"] = reconstruct(autoencoder, real)
        row |= {"images_per_second": len(real) / (time.perf_counter() - started), **reconstruction_metrics(real, rebuilt)}
        row["code_size"] = math.prod(autoencoder.config.code_shape)
    try:
        pixels = (train * 255).round().to(torch.uint8)
        drawer = drawer_of_pipeline(model, captions) if captions else None
        drawer = drawer or drawer_of(model, find_sampler(model, folder, sampler, lambda: pixels))
        found, pictures = measure_generation(drawer, real, train, network)
    except ValueError as error:
        return {**row, "note": str(error)}, drawn
    drawn["sampled"] = pictures
    return {**row, **found, "ms_per_sample": 1000 * found["seconds_per_image"]}, drawn


def to_markdown(rows: dict[str, dict]) -> str:
    """The table; figures that no model has are left out."""
    columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = ["| | " + " | ".join(COLUMNS[c] for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(c)) for c in columns) + " |")
    notes = [f"{name}: {row['note']}" for name, row in rows.items() if "note" in row]
    return "\n".join(lines + [""] * bool(notes) + notes)


def cell(value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value or ""


def check_output(path: Path):
    """Raise ValueError unless the table can be written to `path`."""
    if path.suffix not in (".md", ".json"):
        raise ValueError(f"{path} must end in .md or .json.")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist.")


def write(rows: dict[str, dict], picture: dict[str, torch.Tensor], path: Path) -> list[Path]:
    """Write the table as Markdown or JSON, and the picture beside it; returns both paths."""
    image = path.with_suffix(".png")
    labelled_rows(picture, image)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    else:
        path.write_text(f"{to_markdown(rows)}\n\n![Originals, reconstructions and samples]({image.name})\n")
    return [path, image]
