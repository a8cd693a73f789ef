"""Measured figures as the Hub reads them: `.eval_results/hf_ae.yaml` beside the card's older `model-index`.

Each entry belongs to a dataset of the Hub, so that figures on a local folder have none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import EvalResult

from ..errors import UserError, require

FOLDER, FILE = ".eval_results", "hf_ae.yaml"
METRIC_NAMES = {
    "mse": "MSE", "squared_error_per_image": "squared error per image", "psnr": "PSNR (dB)", "ssim": "SSIM",
    "log_likelihood_bound": "bound on log p(x) (nats)",
}  # fmt: skip


def hub_id(name: Any) -> bool:
    """Whether a dataset or model is one of the Hub, `owner/name`, and no folder."""
    text = str(name or "")
    local = text.startswith("outputs/") or Path(text).exists()
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text)) and not local


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Metric -> its value, of what metrics.json holds about reconstruction and likelihood."""
    values = {**metrics.get("reconstruction", {})}
    if "likelihood" in metrics:
        values["log_likelihood_bound"] = metrics["likelihood"]["log_likelihood_bound"]
    return {key: round(value, 6) for key, value in values.items() if key in METRIC_NAMES}


def model_index(metrics: dict[str, Any]) -> list[EvalResult]:
    """metrics.json -> the card's model-index."""
    task: dict[str, Any] = dict(task_type="image-reconstruction", task_name="Image reconstruction")
    data, there = metrics["dataset"], hub_id(metrics["dataset"])
    task |= dict(dataset_type=data if there else "imagefolder", dataset_name=data if there else Path(data).name)
    task |= dict(dataset_split=metrics["split"])
    figures = measured(metrics).items()
    return [EvalResult(**task, metric_type=k, metric_name=METRIC_NAMES[k], metric_value=value) for k, value in figures]


def write_eval_results(folder: Path, metrics: dict[str, Any]) -> None:
    """Write the file beside the card, or remove it where there is nothing for it. Files of others stay."""
    path, entries = folder / FOLDER / FILE, []
    if hub_id(metrics.get("dataset")):
        about = f"split {metrics['split']}, {metrics['images']:,} images"
        for key, value in measured(metrics).items():
            dataset = {"id": metrics["dataset"], "task_id": f"image-reconstruction-{key.replace('_', '-')}"}
            entries.append({"dataset": dataset, "value": value, "notes": f"{METRIC_NAMES[key]}, {about}"})
    if entries:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(entries, sort_keys=False))
    elif path.is_file():
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def check_eval_results(folder: Path) -> None:
    """Raise ValueError where a file is not what huggingface_hub reads."""
    for path in sorted((folder / FOLDER).glob("*")):
        try:
            entries = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {error}") from error
        good = isinstance(entries, list) and all(map(is_entry, entries))
        require(good, f"{path} must hold a list of entries, each with dataset: {{id, task_id}} and value.")


def is_entry(entry: Any) -> bool:
    """Whether huggingface_hub can read it."""
    dataset = entry.get("dataset") if isinstance(entry, dict) else None
    return isinstance(dataset, dict) and {"id", "task_id"} <= set(dataset) and "value" in entry
