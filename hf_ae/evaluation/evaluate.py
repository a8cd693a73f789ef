"""A checkpoint and a dataset -> metrics.json, figures, and the card that shows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..codec import roundtrip
from ..data import read_labels, to_pixel_values
from ..errors import require
from ..hub.card_parts import read_card
from ..hub.cards import write_card
from ..loading import load_model, load_pipeline, pick_device, pipeline_image_processor
from ..models.image_processing import open_image, to_mode
from ..plots import image_grid, labelled_rows
from ..training.arguments import local_or_id
from .anomaly import anomaly
from .disentanglement import disentanglement
from .feature_network import load_feature_network
from .generation import IMAGES, captions_of, find_sampler, measure_generation, model_generator, pipeline_generator
from .likelihood import LIKELIHOODS, importance_weighted_bound
from .reconstruction import draw_results, measure_reconstruction
from .record import own_random_numbers, save_metrics
from .repair import repair
from .representation import representation
from .request import BY_DEFAULT, Data, Request

QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


def evaluate(
    model: str | Path, dataset_name: str, save: bool = True, device: str | None = None, replace: bool = False,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model (folder or Hub id) on a dataset; `options` are the other fields of `Request`. Raises ValueError.

    reconstruction: error, PSNR and SSIM, beside PCA with as many components; for a denoising model also from damaged
    images. likelihood (VAEs): bounds on log p(x). compression (compressive models): files at five qualities. Where
    asked for: generation (generated images against real ones), representation (what classifiers find in latents),
    anomaly (outliers told from normal images), disentanglement (known factors of the data in single latents) and
    repair (beside methods without learning). Returns what was measured; in a local folder it also writes metrics.json,
    figures and the card. Figures there that were taken on more images stay, unless `replace`. device: see
    `hf_ae.loading.pick_device`.
    """
    request, folder = Request(str(model), local_or_id(dataset_name), **options), Path(model)
    if save and folder.is_dir():
        read_card(folder / "README.md")  # refused now, and not after the measuring
    if (folder / "model_index.json").is_file():
        return evaluate_pipeline(request, save, device, replace)
    loaded, processor = load_model(model, pick_device(device, float64=True))
    table = "evaluate measures images, and this model takes a table: use hf-ae anomaly or hf-ae encode"
    require(processor.feature_columns is None, f"{table}.")
    tasks, data = applicable(loaded, request), Data(request, processor)
    pixels = data.pixels(data.split, request.max_images)
    metrics: dict[str, Any] = {
        "dataset": request.dataset_name, "split": str(data.split), "images": len(pixels),
        "binarized": request.binarize, "code_size": math.prod(loaded.config.latent_shape),
        "command": request.command(),
    }  # fmt: skip
    drawn: dict[str, Any] = {}
    if "reconstruction" in tasks:
        rows = measure_reconstruction(loaded, data, pixels, metrics)
        drawn["reconstruction"] = lambda: draw_results(folder, loaded, rows, data, pixels)
    for task in tasks:
        if task in MEASURES:
            found, figure = MEASURES[task](loaded, data, pixels)
            metrics[task] = {**found, **({} if task in BY_DEFAULT else {"command": request.command()})}
            if figure is not None:
                drawn[task] = partial(draw, figure, folder / FIGURE[task])
    if save and folder.is_dir():
        written = save_metrics(folder, metrics, replace)
        for task in written & set(drawn):
            drawn[task]()
        finish(folder, written)
    return metrics


def draw(figure: Tensor | dict[str, Tensor], path: Path) -> None:
    """Images as a grid, rows of images with their names."""
    if isinstance(figure, dict):
        labelled_rows(figure, path)
    else:
        image_grid(figure[:80], 20, path, cell=48)


def finish(folder: Path, written: set[str]) -> None:
    """Write the card, and say what was written."""
    write_card(folder)
    if written:
        print(f"Written to {folder}: metrics.json, the card README.md and its figures")


def evaluate_pipeline(request: Request, save: bool, device: str | None, replace: bool) -> dict[str, Any]:
    """The task `generation` of a text-to-image pipeline that draws the captions of the evaluated split; its other
    figures in metrics.json stay."""
    require(request.asked == ["generation"], f"{request.model} is a text-to-image pipeline: write --tasks generation.")
    pipe = load_pipeline(request.model, device=pick_device(device))
    data = Data(request, pipeline_image_processor(pipe))
    limit, captions = min(request.max_images or IMAGES, len(data.rows)), captions_of(data.rows)
    real, train = (data.pixels(split, limit).float() / 255 for split in (data.split, request.train_split))
    network = load_feature_network(request.feature_network)
    others = train if request.train_split != data.split else None
    found, images = measure_generation(pipeline_generator(pipe, captions[:limit]), real, others, network)
    features = request.feature_network or "hf_ae"
    metrics = {"generation": {**found, "features": features, "command": request.command()}}
    folder = Path(request.model)
    if save and (written := save_metrics(folder, metrics, replace)):
        image_grid(images[:64], 8, folder / "samples-of-captions.png", cell=64)
        finish(folder, written)
    return metrics


def applicable(model: Any, request: Request) -> list[str]:
    """The tasks that this model and request allow. One that was asked for by name and does not fit is an error."""
    reasons = {}
    if model.codec_method != "hyperprior":
        reasons["compression"] = "it needs a model that was trained for it, hf_ae_compressive"
    if not model.can_sample:
        reasons["likelihood"] = "it needs a variational autoencoder"
    elif model.config.reconstruction_loss == "bce" and not request.binarize:
        reasons["likelihood"] = "a model trained with bce gives probabilities of 0/1 pixels: write --binarize"
    if not model.can_denoise and request.corrupt is None:
        reasons["repair"] = "it needs a model that was trained for it, hf_ae_denoising, or --corrupt gaussian:0.5"
    if request.outliers is None and request.normal_class is None:
        reasons["anomaly"] = "it needs outliers: write --outliers DATASET, or --normal_class CLASS"
    for task in set(request.asked) & set(reasons):
        require(not request.tasks, f"No {task}: {reasons[task]}.")
        if model.can_sample and task == "likelihood":
            print(f"No {task}: {reasons[task]}.")
    return [task for task in request.asked if task not in reasons]


def likelihood(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], None]:
    """Bounds on log p(x), averaged over the images."""
    samples = data.request.samples
    values = to_pixel_values(pixels, model.device, model.config.pixel_range)
    bar = partial(tqdm, desc="likelihood", mininterval=1.0, leave=False)
    with own_random_numbers(model.device):
        elbo, bound = importance_weighted_bound(model, values, samples, bar)
    return {
        "model": LIKELIHOODS[model.config.reconstruction_loss], "elbo": elbo.mean().item(),
        "log_likelihood_bound": bound.mean().item(), "samples": samples, "images": len(pixels),
    }, None  # fmt: skip


def compression(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], None]:
    """Whole files of the first images, at their own size and five qualities: means of bytes, bits per pixel, PSNR."""
    rows, column, count, found = data.rows, data.column, min(data.request.max_images or 500, len(data.rows)), {}
    for quality in tqdm(QUALITIES, desc="compression", mininterval=1.0, leave=False):
        images = (to_mode(open_image(rows[i][column]), model.config.num_channels) for i in range(count))
        files = [
            (size, 8 * size / pixels, psnr) for size, psnr, pixels in (roundtrip(model, x, quality) for x in images)
        ]
        found[f"{quality:g}"] = dict(zip(("bytes", "bpp", "psnr"), torch.tensor(files).double().mean(0).tolist()))
    return {"images": count, "qualities": found}, None


def generation(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The task `generation`: (metrics, generated images). `pixels` are those of the evaluated split."""
    pixels = pixels[:IMAGES]
    request, split = data.request, data.request.train_split
    there = split in data.splits
    require(there, f"generation needs training images to compare with: there is no split {split!r} (--train_split).")
    classes = None if request.label_column is None else read_labels(data.splits, split, request.label_column)[0]
    sampler = find_sampler(model, request.model, request.sampler, lambda: data.pixels(split), classes)
    generator = model_generator(model, sampler)
    labels, train_labels = (data.labels(s, request.label_column or "label") for s in (data.split, split))
    network = load_feature_network(request.feature_network)
    real, train = pixels.float() / 255, data.pixels(split, len(pixels)).float() / 255
    labels = None if labels is None else labels[: len(real)]
    train_labels = None if train_labels is None else train_labels[: len(train)]
    others = train if split != data.split else None  # images beside themselves are no floor
    metrics, images = measure_generation(generator, real, others, network, labels, train_labels)
    return {**metrics, "features": request.feature_network or "hf_ae"}, images


MEASURES: dict[str, Callable[[Any, Data, Tensor], tuple[dict[str, Any], Any]]] = {
    "likelihood": likelihood, "compression": compression, "generation": generation, "representation": representation,
    "anomaly": anomaly, "disentanglement": disentanglement, "repair": repair,
}  # fmt: skip
"""Task -> (model, data, uint8 images of the evaluated split) -> (its figures, what its picture shows)."""
FIGURE = {
    "generation": "samples.png", "anomaly": "outliers.png", "disentanglement": "traversals.png",
    "repair": "repair.png",
}  # fmt: skip
TABLES: dict[str, Callable[[dict[str, Any]], dict[str, dict[str, Any]]]] = {
    "repair": lambda found: {"damaged": found["damaged"], **found["without_learning"], "restored": found["restored"]},
    "representation": lambda found: {**found["values"], "units": found["units"]},
    "anomaly": lambda found: found["detectors"],
    "disentanglement": lambda found: {"scores": found},
}
"""Task -> its figures as rows of a table for the screen."""


def table_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each row: its name, and its numbers by name."""
    width = max(map(len, rows))
    numbers = {name: {key: v for key, v in row.items() if isinstance(v, int | float)} for name, row in rows.items()}
    return [
        f"{name:{width}}" + "".join(f"  {key} {value:.4g}" for key, value in row.items())
        for name, row in numbers.items()
    ]


def summary(metrics: dict[str, Any]) -> str:
    """The figures of an evaluation, a line each, for the screen."""
    titles = {"reconstruction": "model", "pca": f"PCA, {metrics.get('code_size')}"}
    titles |= {"denoising_input": "damaged", "denoising": "restored"}
    lines = []
    for row, title in titles.items():
        if row in metrics:
            lines.append(f"{title:10}" + "".join(f"  {name} {value:.5g}" for name, value in metrics[row].items()))
    lines += [line for task in TABLES if task in metrics for line in table_lines(TABLES[task](metrics[task]))]
    if bounds := metrics.get("likelihood"):
        found = f"elbo {bounds['elbo']:.3f}  bound {bounds['log_likelihood_bound']:.3f} nats"
        lines.append(f"likelihood  {found} ({bounds['model']}, {bounds['samples']} samples)")
    for quality, v in metrics.get("compression", {}).get("qualities", {}).items():
        sizes = f"{v['bytes']:.0f} bytes  {v['bpp']:.4f} bits per pixel"
        lines.append(f"quality {quality:4}  {sizes}  PSNR {v['psnr']:.2f} dB")
    if generated := metrics.get("generation"):
        for title, row in (("generated", generated), ("real", generated.get("floor", {}))):
            figures = "".join(f"  {name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
            lines += [f"{title:10}{figures}"] if figures else []
    return "\n".join(lines)
