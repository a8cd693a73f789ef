"""A checkpoint and a dataset -> metrics.json, a picture, and the card that shows them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .data import ImagesInMemory, binarized_once, image_column, open_split, to_pixel_values
from .hub import write_card
from .metrics import importance_weighted_bound, pca_reconstruction, reconstruction_metrics
from .plots import labelled_rows, latent_plane

TASKS = ("reconstruction", "likelihood")


def load_model(name):
    """(model in eval mode, image processor) of a folder or Hub id, one of this family. Raises ValueError."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if str(name).count("/") != 1 and not Path(name).is_dir():
        raise ValueError(f"The model {name} is neither a folder nor a Hub id (owner/name).")
    try:
        config = AutoConfig.from_pretrained(name)
        if not str(config.model_type).startswith("hf_ae_"):
            raise ValueError(f"{name} is a {config.model_type!r} model, not one of hf_ae's.")
        return AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:  # safetensors has its own exceptions for damaged files
        raise ValueError(f"The model {name} is damaged: {type(error).__name__}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def reconstruct(model, images: torch.Tensor, batch_size: int = 500, **forward_options) -> torch.Tensor:
    """Images in 0…1 (images, channels, height, width) -> their reconstructions in 0…1, on the CPU."""
    low, high = model.config.pixel_range
    parts = []
    for batch in images.split(batch_size):
        values = batch.to(model.device) * (high - low) + low
        parts.append((model(values, **forward_options).reconstruction.float().cpu() - low) / (high - low))
    return torch.cat(parts).clamp(0, 1)


def evaluate(
    name,
    dataset_name: str,
    dataset_config_name: str | None = None,
    image_column_name: str | None = None,
    split: str = "test",
    train_split: str = "train",
    tasks: tuple[str, ...] = TASKS,
    samples: int = 100,
    max_images: int | None = None,
    binarize: bool = False,
    save: bool = True,
) -> dict:
    """Measure a model (folder or Hub id) on `split`; PCA is fitted on `train_split`. Returns what metrics.json holds.

    tasks: `reconstruction` (error, PSNR, SSIM, beside PCA with as many components; for a denoising model also from
    damaged images) and `likelihood` (VAEs: bounds on log p(x) with `samples` draws an image). binarize: one fixed
    Bernoulli draw of each pixel. In a local folder it also writes metrics.json, pictures and the card.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"The task {unknown[0]!r} is not known: write one of {', '.join(TASKS)}.")
    model, processor = load_model(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    test_set = open_split(dataset_name, dataset_config_name, split)
    column = image_column(test_set, image_column_name)
    pixels = ImagesInMemory.load(test_set, column, processor, limit=max_images, progress=decoding_bar).pixels
    pixels = binarized_once(pixels) if binarize else pixels
    images = pixels.float() / 255
    code_size = math.prod(model.config.code_shape)
    metrics: dict = {
        "dataset": dataset_name,
        "split": split,
        "images": len(images),
        "binarized": binarize,
        "code_size": code_size,
    }
    rows = {"original": images[:12]}
    if "reconstruction" in tasks:
        rebuilt = reconstruct(model, images)
        metrics["reconstruction"] = reconstruction_metrics(images, rebuilt)
        if hasattr(model.config, "corruption"):
            add_denoising(model, images, metrics, rows)
        rows["autoencoder"] = rebuilt[:12]
        train_set = open_split(dataset_name, dataset_config_name, train_split)
        limit = None if images[0].numel() <= 2000 else 5000
        train = ImagesInMemory.load(train_set, column, processor, limit=limit, progress=decoding_bar).pixels
        train = (binarized_once(train) if binarize else train).float() / 255
        pca = pca_reconstruction(train, images, code_size)
        if pca is not None:
            metrics["pca"] = reconstruction_metrics(images, pca)
            rows[f"PCA, {code_size}"] = pca[:12]
    if "likelihood" in tasks and hasattr(model.config, "kl_weight"):
        metrics["likelihood"] = likelihood(model, pixels, samples)
    options = f" --tasks {','.join(tasks)}" if tuple(tasks) != TASKS else ""
    options += f" --samples {samples}" if "likelihood" in metrics and samples != 100 else ""
    options += f" --max_images {max_images}" if max_images else ""
    options += " --binarize" if binarize else ""
    metrics["command"] = f"hf-ae evaluate {Path(name).name} --dataset_name {dataset_name}{options}"
    if save and Path(name).is_dir():
        save_results(Path(name), model, processor, metrics, rows, test_set, images)
    return metrics


def decoding_bar(iterator, total):
    return tqdm(iterator, total=total, desc="decoding", mininterval=1.0, leave=False)


def add_denoising(model, images, metrics: dict, rows: dict):
    """Measure from damaged images too; the damage is the same at every call."""
    low, high = model.config.pixel_range
    damaged = model.corrupt(images * (high - low) + low, torch.Generator().manual_seed(0))
    damaged = (damaged - low) / (high - low)
    restored = reconstruct(model, damaged)
    metrics["denoising_input"] = reconstruction_metrics(images, damaged)
    metrics["denoising"] = reconstruction_metrics(images, restored)
    rows["damaged"], rows["restored"] = damaged[:12], restored[:12]


def likelihood(model, pixels: torch.Tensor, samples: int) -> dict:
    """Bounds on log p(x), averaged over the images."""
    kind = {"bce": "Bernoulli", "mse": "N(x̂, ½)", "l1": "Laplace(x̂, 1)"}[model.config.reconstruction_loss]
    if kind == "Bernoulli" and not bool(((pixels == 0) | (pixels == 255)).all()):
        raise ValueError("A model trained with bce gives probabilities of 0/1 pixels: write --binarize, or --tasks reconstruction.")
    torch.manual_seed(0)
    values = to_pixel_values(pixels, model.device, tuple(model.config.pixel_range))

    def bar(images):
        return tqdm(images, desc="likelihood", mininterval=1.0, leave=False)

    elbo, bound = importance_weighted_bound(model, values, samples, progress=bar)
    return {
        "model": kind,
        "elbo": elbo.mean().item(),
        "log_likelihood_bound": bound.mean().item(),
        "samples": samples,
        "images": len(pixels),
    }


def save_results(folder: Path, model, processor, metrics: dict, rows: dict, dataset, images):
    """metrics.json, pictures and the card. A task that was not asked for keeps its earlier result."""
    old_path = folder / "metrics.json"
    old = json.loads(old_path.read_text()) if old_path.is_file() else {}
    if all(old.get(k) == metrics[k] for k in ("dataset", "split", "images", "binarized")):
        metrics = {**old, **metrics}
    old_path.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    if len(rows) > 1:
        labelled_rows(rows, folder / "reconstructions.png")
    if model.config.code_shape == [2] and "label" in (dataset.column_names or []):
        draw_plane(model, images, dataset["label"][: len(images)], folder / "latent_plane.png")
    if "reconstruction" in metrics:
        write_card(folder)


@torch.no_grad()
def draw_plane(model, images, labels, path: Path, side: int = 25):
    """The picture of a 2-d code: where test images lie, and what the decoder draws over the same region."""
    low, high = model.config.pixel_range
    codes = torch.cat([model.encode(x.to(model.device) * (high - low) + low).latents.cpu() for x in images.split(1000)])
    (x_low, y_low), (x_high, y_high) = codes.quantile(0.005, 0).tolist(), codes.quantile(0.995, 0).tolist()
    xs, ys = torch.linspace(x_low, x_high, side), torch.linspace(y_high, y_low, side)
    grid = torch.stack([xs.repeat(side), ys.repeat_interleave(side)], 1)
    decoded = (model.decode(grid.to(model.device)).sample.cpu() - low) / (high - low)
    latent_plane(codes.numpy(), labels, decoded, (x_low, x_high, y_low, y_high), path)
