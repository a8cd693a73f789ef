"""What is kept of a measurement in metrics.json: never fewer images in the place of more, unless asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..hub.files import read_json

COUNTED = ("likelihood", "compression", "generation", "representation", "anomaly", "disentanglement", "repair")
"""Tasks that say themselves on how many images they were measured; the others share one number."""
TASKS = ("reconstruction", *COUNTED)
DATA = ("dataset", "split", "binarized")
SHARED = (
    "images", "code_size", "command", "reconstruction", "pca", "denoising_input", "denoising", "codes",
)  # fmt: skip


@contextlib.contextmanager
def own_random_numbers(device: torch.device | str = "cpu", seed: int = 0) -> Iterator[None]:
    """Random numbers from this seed inside; afterwards those of the caller go on as if nothing had been drawn."""
    device = torch.device(device)
    on_gpu = device.type in ("cuda", "xpu")
    with torch.random.fork_rng(devices=[device] if on_gpu else [], device_type=device.type if on_gpu else "cuda"):
        torch.manual_seed(seed)
        yield


def save_metrics(folder: Path, found: dict[str, Any], replace: bool = False) -> set[str]:
    """Put what was measured into `folder`/metrics.json; the tasks whose figures were written, and not kept."""
    path = folder / "metrics.json"
    old = read_json(path)
    content, kept = combined(old, found, replace)
    if kept:
        counts = ", ".join(f"{task} of {images:,} images" for task, images in kept.items())
        print(f"metrics.json keeps what was measured on more images ({counts}): write --replace to replace it.")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return {task for task in TASKS if task in found and task not in kept}


def combined(old: dict[str, Any], new: dict[str, Any], replace: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """(content of metrics.json, task -> images of what stays in it although it was measured again).

    Figures of other tasks stay where they are of the same data.
    """
    others = {key: value for key, value in old.items() if key not in (*DATA, *SHARED, *COUNTED)}
    if "dataset" not in new:  # a text-to-image pipeline: generation alone
        kept = {} if replace else fuller(old, new)
        return {**old, **{key: value for key, value in new.items() if key not in kept}}, kept
    same = all(old.get(key) == new[key] for key in DATA)
    if not same:
        most = max((images_of(old, task) for task in TASKS), default=0)
        stays = most > new["images"] and not replace
        return (old, {task: most for task in TASKS if task in new}) if stays else ({**others, **new}, {})
    kept = {} if replace else fuller(old, new)
    content = {**old, **{key: new[key] for key in (*DATA, *COUNTED) if key in new and key not in kept}}
    shared_stays = "reconstruction" in old and ("reconstruction" in kept or "reconstruction" not in new)
    if not shared_stays:
        content = {key: value for key, value in content.items() if key not in SHARED}
        content |= {key: new[key] for key in SHARED if key in new}
    return content, kept


def fuller(old: dict[str, Any], new: dict[str, Any]) -> dict[str, int]:
    """Tasks of which the old figures are of more images -> of how many."""
    tasks = [task for task in TASKS if task in new]
    return {task: images_of(old, task) for task in tasks if images_of(old, task) > images_of(new, task)}


def images_of(metrics: dict[str, Any], task: str) -> int:
    """On how many images a task was measured; 0 where it was not."""
    if task not in metrics:
        return 0
    return int(metrics[task].get("images", 0) if task in COUNTED else metrics.get("images", 0))
