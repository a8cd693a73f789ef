"""Encoding a dataset into parquet files beside a bare loop, in turn, and whether it survives being stopped.

    python benchmarks/encoding.py DATASET [--model model_cards/fashion-vae] [--pairs 5] [--images 70000]

Prints images per second of `hf_ae.encode_dataset` with an output folder, of a loop that reads the same rows, decodes
them by Pillow one by one and encodes batches of 500, and of the forward passes of that loop alone, with all images
decoded in memory; and the ratios of each pair, median and range. The splits of DATASET are taken together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_ae import encode_dataset
from hf_ae.data import open_dataset
from hf_ae.loading import load_model


def main() -> None:
    """Print the table."""
    import datasets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="Hub id or folder, with gray images of the model's size")
    parser.add_argument("--model", default="model_cards/fashion-vae")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=70_000)
    args = parser.parse_args()
    model, _ = load_model(args.model)
    splits = open_dataset(args.dataset_name)
    rows = datasets.concatenate_datasets([splits[name].select_columns("image") for name in splits])
    rows = rows.select(range(min(args.images, len(rows))))
    pixels = decoded(rows, range(len(rows)))
    ways: dict[str, Callable[[], Any]] = {
        "encode_dataset": lambda: ours(model, rows), "loop that decodes": lambda: loop(model, rows, None),
        "forward passes alone": lambda: loop(model, rows, pixels),
    }  # fmt: skip
    for way in ways.values():  # once to warm up
        way()
    times = np.array([[timed(way) for way in ways.values()] for _ in range(args.pairs)])
    for name, seconds in zip(ways, times.T):
        print(f"{name}: {len(rows) / np.median(seconds):,.0f} images per second")
    for name, ratios in zip(list(ways)[1:], (times[:, 1:] / times[:, :1]).T):
        spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
        print(f"encode_dataset, of the speed of the {name}: {np.median(ratios):.2f} ({spread})")


def timed(way: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def ours(model: Any, rows: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        encode_dataset(model, rows, output_dir=folder)


@torch.inference_mode()
def loop(model: Any, rows: Any, pixels: torch.Tensor | None, batch: int = 500) -> list[torch.Tensor]:
    """Latents, batch by batch."""
    low, high = model.config.pixel_range
    found = []
    for start in range(0, len(rows), batch):
        part = (
            decoded(rows, range(start, min(start + batch, len(rows))))
            if pixels is None
            else pixels[start : start + batch]
        )
        found.append(model.encode(part.float() / 255 * (high - low) + low).latents)
    return found


def decoded(rows: Any, where: range) -> torch.Tensor:
    """uint8 images (images, 1, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in rows[where.start : where.stop]["image"]]))[
        :, None
    ]


if __name__ == "__main__":
    main()
