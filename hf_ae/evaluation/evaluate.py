"""A checkpoint and a dataset -> metrics.json, a picture, and the card that shows them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..hub.cards import write_card
from ..data.images import (
    ImagesInMemory,
    batch_for,
    binarized_once,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    to_pixel_values,
)
from ..models.image_processing import open_image, to_mode
from ..metrics import importance_weighted_bound, pca_reconstruction, reconstruction_metrics
from ..hub.pipeline_folder import read_json
from ..plots import image_grid, labelled_rows, latent_plane
from ..models.quantizers import usage_and_perplexity

TASKS = ("reconstruction", "likelihood", "compression", "generation")
QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


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
        return AutoModel.from_pretrained(name, dtype=torch.float32).eval(), AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    except Exception as error:  # safetensors has its own exceptions for damaged files
        raise ValueError(f"The model {name} is damaged: {type(error).__name__}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def reconstruct(model, images: torch.Tensor) -> torch.Tensor:
    """Images in 0…1 (images, channels, height, width) -> their reconstructions in 0…1, on the CPU."""
    low, high = model.config.pixel_range
    parts = []
    for batch in images.split(batch_for(images[0].numel())):
        values = batch.to(model.device) * (high - low) + low
        parts.append((model(values).reconstruction.float().cpu() - low) / (high - low))
    return torch.cat(parts).clamp(0, 1)


@dataclass
class Request:
    """What to measure, on which data."""

    model: str
    """Folder or Hub id."""
    dataset_name: str
    """Hub id or folder."""
    dataset_config_name: str | None = None
    image_column: str | None = None
    """Default: the only column of images."""
    split: str | None = None
    """Split to measure on. Default: test or validation, or the only one."""
    train_split: str = "train"
    """Split that PCA is fitted on."""
    tasks: str | None = None
    """Comma-separated: reconstruction, likelihood, compression, generation. Default: all but generation, where they apply."""
    samples: int = 100
    """Importance samples an image, for the likelihood."""
    max_images: int | None = None
    """Measure the first images only."""
    binarize: bool = False
    """One fixed Bernoulli draw of each pixel."""
    sampler: str | None = None
    """What codes are drawn from, for generation: saved (beside the model), prior, gaussian or mixture (fitted now). Default: the
    saved one, or the model's own prior, or N(0, I)."""
    label_column: str | None = None
    """Classes to fit the sampler to, one by one, for generation."""
    feature_network: str | None = None
    """Folder or Hub id of a transformers image model, for generation. Default: the small network that ships."""

    def command(self) -> str:
        """The command line that measures this."""
        words = ["hf-ae evaluate", Path(self.model).name, "--dataset_name", self.dataset_name]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
        return " ".join(words)


def evaluate(model, dataset_name: str, save: bool = True, **options) -> dict:
    """Measure a model (folder or Hub id) on a dataset; `options` are the other fields of `Request`.

    reconstruction: error, PSNR and SSIM, beside PCA with as many components; for a denoising model also from damaged
    images. likelihood (VAEs): bounds on log p(x). compression (compressive models): files at five qualities. generation (only
    where asked for): drawn pictures against real ones. Returns what metrics.json holds; in a local folder it also writes
    metrics.json, pictures and the card.
    """
    request = Request(str(model), str(dataset_name), **options)
    asked = [t.strip() for t in request.tasks.split(",") if t.strip()] if request.tasks else list(TASKS[:-1])
    unknown = [task for task in asked if task not in TASKS]
    if unknown:
        raise ValueError(f"The task {unknown[0]!r} is not known: write one of {', '.join(TASKS)}.")
    if (Path(model) / "model_index.json").is_file():
        return evaluate_pipeline_folder(request, asked, save)
    loaded, processor = load_model(model)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = applicable(loaded, request, asked)
    parts = open_dataset(request.dataset_name, request.dataset_config_name)
    split = request.split or held_out_name(parts) or next(iter(parts))
    dataset = pick_split(parts, split)
    column = image_column(dataset, request.image_column)
    pixels = ImagesInMemory.load(dataset, column, processor, limit=request.max_images, progress=decoding_bar).pixels
    pixels = binarized_once(pixels) if request.binarize else pixels
    images = pixels.float() / 255
    metrics: dict = {
        "dataset": request.dataset_name,
        "split": str(split),
        "images": len(images),
        "binarized": request.binarize,
        "code_size": math.prod(loaded.config.code_shape),
        "command": request.command(),
    }
    rows = {"original": images[:12]}
    if "reconstruction" in tasks:
        rebuilt = reconstruct(loaded, images)
        metrics["reconstruction"] = reconstruction_metrics(images, rebuilt)
        rows["autoencoder"] = rebuilt[:12]
        add_pca(request, parts, column, processor, images, metrics, rows)
        if hasattr(loaded.config, "corruption"):
            rows = {"original": images[:12], **denoised(loaded, images, metrics)}
    if "reconstruction" in tasks and hasattr(loaded, "quantizers"):
        metrics["codes"] = use_of_codes(loaded, pixels)
    if "likelihood" in tasks:
        metrics["likelihood"] = likelihood(loaded, pixels, request.samples)
    if "compression" in tasks:
        metrics["compression"] = compression(loaded, dataset, column, min(request.max_images or 500, len(dataset)))
    if "generation" in tasks:
        from .generation import evaluate_generation

        found, pictures = evaluate_generation(request, loaded, processor, parts, dataset, column, pixels)
        metrics["generation"] = {**found, "command": request.command()}
        if save and Path(model).is_dir():
            image_grid(pictures[:80], 20, Path(model) / "samples.png", cell=48)
    if save and Path(model).is_dir():
        save_results(Path(model), loaded, metrics, rows, dataset, images)
    return metrics


def evaluate_pipeline_folder(request: Request, asked: list[str], save: bool) -> dict:
    """The task `generation` of a text-to-image pipeline; its other figures in metrics.json stay."""
    from ..diffusion.drawing import load_pipeline
    from .generation import evaluate_pipeline

    if asked != ["generation"]:
        raise ValueError(f"{request.model} is a text-to-image pipeline: write --tasks generation.")
    parts = open_dataset(request.dataset_name, request.dataset_config_name)
    found, pictures = evaluate_pipeline(request, load_pipeline(request.model), parts)
    metrics = {"generation": {**found, "command": request.command()}}
    if save:
        path = Path(request.model) / "metrics.json"
        path.write_text(json.dumps({**read_json(path), **metrics}, indent=2, ensure_ascii=False) + "\n")
        image_grid(pictures[:64], 8, path.with_name("samples-of-captions.png"), cell=64)
        write_card(request.model)
    return metrics


def applicable(model, request: Request, asked: list[str]) -> list[str]:
    """The tasks that this model and request allow. One that was asked for by name and does not fit is an error."""
    if not hasattr(model.config, "lambda_range"):
        if request.tasks and "compression" in asked:
            raise ValueError("No compression: it needs a model that was trained for it, hf_ae_compressive.")
        asked = [task for task in asked if task != "compression"]
    reason = None
    if not hasattr(model.config, "kl_weight"):
        reason = "it needs a variational autoencoder"
    elif model.config.reconstruction_loss == "bce" and not request.binarize:
        reason = "a model trained with bce gives probabilities of 0/1 pixels: write --binarize"
    if reason is None or "likelihood" not in asked:
        return asked
    if request.tasks:
        raise ValueError(f"No likelihood: {reason}.")
    if hasattr(model.config, "kl_weight"):
        print(f"No likelihood: {reason}.")
    return [task for task in asked if task != "likelihood"]


def add_pca(request: Request, parts, column: str, processor, images, metrics: dict, rows: dict):
    """PCA with as many components as the code has values, where the training split allows it."""
    size = metrics["code_size"]
    if request.train_split not in parts:
        print(f"No PCA: the dataset has no split {request.train_split!r} to fit it on (--train_split).")
        return
    limit = None if images[0].numel() <= 2000 else max(1, 2**26 // images[0].numel())
    train = ImagesInMemory.load(pick_split(parts, request.train_split), column, processor, limit=limit, progress=decoding_bar).pixels
    train = (binarized_once(train) if request.binarize else train).float() / 255
    pca = pca_reconstruction(train, images, size)
    if pca is None:
        print(f"No PCA: {size} components need more than {min(images[0].numel(), len(train))} images and values.")
        return
    metrics["pca"] = reconstruction_metrics(images, pca)
    rows[f"PCA, {size}"] = pca[:12]


def decoding_bar(iterator, total):
    return tqdm(iterator, total=total, desc="decoding", mininterval=1.0, leave=False)


def denoised(model, images, metrics: dict) -> dict:
    """Measure from damaged images too, the same at every call; returns the rows of the picture."""
    low, high = model.config.pixel_range
    damaged = model.corrupt(images * (high - low) + low, torch.Generator().manual_seed(0))
    damaged = (damaged - low) / (high - low)
    restored = reconstruct(model, damaged)
    metrics["denoising_input"] = reconstruction_metrics(images, damaged)
    metrics["denoising"] = reconstruction_metrics(images, restored)
    return {"damaged": damaged[:12], "restored": restored[:12]}


def likelihood(model, pixels: torch.Tensor, samples: int) -> dict:
    """Bounds on log p(x), averaged over the images."""
    kind = {"bce": "Bernoulli", "mse": "N(x̂, ½)", "l1": "Laplace(x̂, 1)"}[model.config.reconstruction_loss]
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


@torch.no_grad()
def use_of_codes(model, pixels: torch.Tensor) -> dict:
    """Of each level of discrete codes, the coarsest first: how many an image has, usage (the share of the codewords that occur)
    and perplexity."""
    parts = (to_pixel_values(part, model.device, model.config.pixel_range) for part in pixels.split(batch_for(pixels[0].numel())))
    levels = [torch.cat(level) for level in zip(*(model.levels_of(model.encode(part).indices) for part in parts))]
    return {
        f"level_{number}": {
            "codes": level[0].numel(),
            **{name: value.item() for name, value in usage_and_perplexity(level, model.config.codebook_size).items()},
        }
        for number, level in enumerate(levels, 1)
    }


def compression(model, dataset, column: str, count: int) -> dict:
    """Whole files of the first `count` pictures, at their own size and five qualities: means of bytes, bits per pixel, PSNR."""
    from ..codec.compression import roundtrip

    rows = {}
    for quality in tqdm(QUALITIES, desc="compression", mininterval=1.0, leave=False):
        pictures = (to_mode(open_image(dataset[i][column]), model.config.num_channels) for i in range(count))
        results = torch.tensor([(size, 8 * size / pixels, psnr) for size, psnr, pixels in (roundtrip(model, p, quality) for p in pictures)])
        rows[f"{quality:g}"] = dict(zip(("bytes", "bpp", "psnr"), results.double().mean(0).tolist()))
    return {"images": count, "qualities": rows}


def save_results(folder: Path, model, metrics: dict, rows: dict, dataset, images):
    """metrics.json, pictures and the card. A task that was not asked for keeps its earlier result."""
    old_path = folder / "metrics.json"
    old = read_json(old_path)
    if all(old.get(k) == metrics[k] for k in ("dataset", "split", "images", "binarized")):
        alone = "generation" in metrics and not any(task in metrics for task in TASKS[:-1])
        metrics = {**old, **metrics, **({"command": old["command"]} if alone and "command" in old else {})}
    old_path.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    if len(rows) > 1:
        labelled_rows(rows, folder / "reconstructions.png")
    if model.config.code_shape == [2]:
        labels = dataset["label"][: len(images)] if "label" in dataset.column_names else []
        labels = list(labels) if len(labels) == len(images) and all(isinstance(v, int) for v in labels) else None
        draw_plane(model, images, labels, folder / "latent_plane.png")
    write_card(folder)


@torch.no_grad()
def draw_plane(model, images, labels: list[int] | None, path: Path, side: int = 25):
    """The picture of a 2-d code: where test images lie, and what the decoder draws over the same region."""
    low, high = model.config.pixel_range
    batches = images.split(batch_for(images[0].numel()))
    codes = torch.cat([model.encode(x.to(model.device) * (high - low) + low).latents.cpu() for x in batches])
    (x_low, y_low), (x_high, y_high) = codes.quantile(0.005, 0).tolist(), codes.quantile(0.995, 0).tolist()
    xs, ys = torch.linspace(x_low, x_high, side), torch.linspace(y_high, y_low, side)
    grid = torch.stack([xs.repeat(side), ys.repeat_interleave(side)], 1)
    decoded = (model.decode(grid.to(model.device)).sample.cpu() - low) / (high - low)
    latent_plane(codes.numpy(), labels, decoded, (x_low, x_high, y_low, y_high), path)
