"""A checkpoint and a dataset -> metrics.json, figures, and the card that shows them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..codec import roundtrip
from ..data import (
    ImagesInMemory,
    binarized_once,
    each_batch,
    evaluation_split,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    read_labels,
    to_pixel_values,
)
from ..errors import UserError, require
from ..hub.card_parts import read_card
from ..hub.cards import write_card
from ..latents import reconstruct
from ..loading import load_model, load_pipeline, pick_device, pipeline_image_processor
from ..metrics import pca_reconstruction, reconstruction_metrics
from ..models.image_processing import open_image, to_mode
from ..models.quantizers import usage_and_perplexity
from ..plots import image_grid, labelled_rows, latent_plane
from ..training.arguments import local_or_id
from .feature_network import load_feature_network
from .generation import IMAGES, captions_of, find_sampler, measure_generation, model_generator, pipeline_generator
from .likelihood import LIKELIHOODS, importance_weighted_bound
from .record import own_random_numbers, save_metrics

TASKS = ("reconstruction", "likelihood", "compression", "generation")
QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


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
    """Split that PCA and samplers are fitted on."""
    tasks: str | None = None
    """Comma-separated: reconstruction, likelihood, compression, generation. Default: all but generation, where they
    apply."""
    samples: int = 100
    """Importance samples an image, for the likelihood."""
    max_images: int | None = None
    """Measure the first images only."""
    binarize: bool = False
    """One fixed Bernoulli draw of each pixel."""
    sampler: str | None = None
    """What latents are drawn from, for generation: saved (beside the model), prior, gaussian or mixture (fitted now).
    Default: the saved one, or the model's own prior, or N(0, I)."""
    label_column: str | None = None
    """Classes to fit the sampler to, one by one, for generation."""
    feature_network: str | None = None
    """Folder or Hub id of a transformers image model, for generation. Default: the small network that ships."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.asked if task not in TASKS]
        require(not unknown, f"The task {''.join(unknown[:1])!r} is not known: write one of {', '.join(TASKS)}.")

    @property
    def asked(self) -> list[str]:
        """The tasks that are asked for by name, or else all but generation."""
        named = [task.strip() for task in (self.tasks or "").split(",") if task.strip()]
        return named or list(TASKS[:-1])

    def command(self) -> str:
        """The command line that measures this."""
        folder = Path(self.model)
        words = ["hf-ae evaluate", folder.resolve().name if folder.is_dir() else self.model]
        words += ["--dataset_name", self.dataset_name]
        for spec in dataclasses.fields(self)[2:]:
            value = getattr(self, spec.name)
            if value != spec.default:
                words += [f"--{spec.name}"] if value is True else [f"--{spec.name}", str(value)]
        return " ".join(words)


@dataclass
class Data:
    """The splits of a dataset, as a model takes their images."""

    request: Request
    processor: Any
    splits: Any = field(init=False)
    split: str = field(init=False)
    """The one to measure on."""
    rows: Any = field(init=False)
    """Those of `split`."""

    def __post_init__(self) -> None:
        self.splits = open_dataset(self.request.dataset_name, self.request.dataset_config_name)
        self.split = evaluation_split(self.splits, self.request.split)
        self.rows = pick_split(self.splits, self.split)
        if self.request.split is None and held_out_name(self.splits) is None:
            print(f"The dataset has no split to test on: measured on its split {self.split!r} (--split).")
        self.column = image_column(self.rows, self.request.image_column)

    def pixels(self, split: str, limit: int | None = None) -> Tensor:
        """uint8 images of a split, the first `limit`."""
        rows = self.rows if split == self.split else pick_split(self.splits, split)
        found = ImagesInMemory.load(rows, self.column, self.processor, limit=limit, progress=True).pixels
        return binarized_once(found) if self.request.binarize else found

    def labels(self, split: str, column: str) -> Tensor | None:
        """Indices of the classes of a split; None where that column is not there or holds no classes."""
        try:
            return read_labels(self.splits, split, column)[0]
        except UserError:
            return None


def evaluate(
    model: str | Path, dataset_name: str, save: bool = True, device: str | None = None, replace: bool = False,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model (folder or Hub id) on a dataset; `options` are the other fields of `Request`. Raises ValueError.

    reconstruction: error, PSNR and SSIM, beside PCA with as many components; for a denoising model also from damaged
    images. likelihood (VAEs): bounds on log p(x). compression (compressive models): files at five qualities.
    generation (only where asked for): generated images against real ones. Returns what was measured; in a local folder
    it also writes metrics.json, figures and the card. Figures there that were taken on more images stay, unless
    `replace`. device: see `hf_ae.loading.pick_device`.
    """
    request, folder = Request(str(model), local_or_id(dataset_name), **options), Path(model)
    if save and folder.is_dir():
        read_card(folder / "README.md")  # refused now, and not after the measuring
    if (folder / "model_index.json").is_file():
        return evaluate_pipeline(request, save, device, replace)
    loaded, processor = load_model(model, pick_device(device, float64=True))
    table = "evaluate measures images, and this model takes a table: use its score_samples, or hf-ae anomaly"
    require(processor.feature_columns is None, f"{table}.")
    tasks, data = applicable(loaded, request), Data(request, processor)
    pixels = data.pixels(data.split, request.max_images)
    metrics: dict[str, Any] = {
        "dataset": request.dataset_name, "split": str(data.split), "images": len(pixels),
        "binarized": request.binarize, "code_size": math.prod(loaded.config.latent_shape),
        "command": request.command(),
    }  # fmt: skip
    rows: dict[str, Tensor] = {}
    if "reconstruction" in tasks:
        rows = measure_reconstruction(loaded, data, pixels, metrics)
    if "likelihood" in tasks:
        metrics["likelihood"] = likelihood(loaded, pixels, request.samples)
    if "compression" in tasks:
        count = min(request.max_images or 500, len(data.rows))
        metrics["compression"] = compression(loaded, data.rows, data.column, count)
    images = None
    if "generation" in tasks:
        found, images = generation(loaded, data, pixels[:IMAGES])
        metrics["generation"] = {**found, "command": request.command()}
    if save and folder.is_dir():
        written = save_metrics(folder, metrics, replace)
        if images is not None and "generation" in written:
            image_grid(images[:80], 20, folder / "samples.png", cell=48)
        if "reconstruction" in written:
            draw_results(folder, loaded, rows, data, pixels)
        finish(folder, written)
    return metrics


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
    for task in set(request.asked) & set(reasons):
        require(not request.tasks, f"No {task}: {reasons[task]}.")
        if model.can_sample and task == "likelihood":
            print(f"No {task}: {reasons[task]}.")
    return [task for task in request.asked if task not in reasons]


def measure_reconstruction(model: Any, data: Data, pixels: Tensor, metrics: dict[str, Any]) -> dict[str, Tensor]:
    """Fill in the figures of the task `reconstruction`; returns the rows of its figure, images in 0…1."""
    images = pixels.float() / 255
    rebuilt = reconstruct(model, images)
    metrics["reconstruction"] = reconstruction_metrics(images, rebuilt)
    rows = {"original": images[:12], "autoencoder": rebuilt[:12]}
    pca, size = principal_components(data, images, metrics["code_size"]), metrics["code_size"]
    if pca is not None:
        metrics["pca"] = reconstruction_metrics(images, pca)
        rows[f"PCA, {size}"] = pca[:12]
    if model.can_denoise:
        low, high = model.config.pixel_range
        damaged = model.corrupt(images * (high - low) + low, torch.Generator().manual_seed(0))
        damaged = (damaged - low) / (high - low)
        restored = reconstruct(model, damaged)
        metrics["denoising_input"] = reconstruction_metrics(images, damaged)
        metrics["denoising"] = reconstruction_metrics(images, restored)
        rows = {"original": images[:12], "damaged": damaged[:12], "restored": restored[:12]}
    if model.has_discrete_codes:
        metrics["codes"] = use_of_codes(model, pixels)
    return rows


def principal_components(data: Data, images: Tensor, size: int) -> Tensor | None:
    """The reconstruction by PCA with `size` components, where the training split allows it."""
    values, split = images[0].numel(), data.request.train_split
    if split not in data.splits:
        print(f"No PCA: the dataset has no split {split!r} to fit it on (--train_split).")
        return None
    train = data.pixels(split, None if values <= 2000 else max(1, 2**26 // values)).float() / 255
    pca = pca_reconstruction(train, images, size)
    if pca is None:
        print(f"No PCA: {size} components need more than {min(values, len(train))} images and values.")
    return pca


@torch.no_grad()
def use_of_codes(model: Any, pixels: Tensor) -> dict[str, dict[str, float]]:
    """Of each level of discrete codes, the coarsest first: how many an image has, usage (the fraction of the codewords
    that occur) and perplexity."""
    values = (to_pixel_values(part, model.device, model.config.pixel_range) for part in each_batch(pixels))
    levels = [torch.cat(level) for level in zip(*(model.levels_of(model.encode(x).indices) for x in values))]
    use: dict[str, dict[str, float]] = {}
    for i, level in enumerate(levels, 1):
        found = usage_and_perplexity(level, model.config.codebook_size)
        use[f"level_{i}"] = {"codes": level[0].numel(), **{name: value.item() for name, value in found.items()}}
    return use


def likelihood(model: Any, pixels: Tensor, samples: int) -> dict[str, Any]:
    """Bounds on log p(x), averaged over the images."""
    values = to_pixel_values(pixels, model.device, model.config.pixel_range)
    bar = partial(tqdm, desc="likelihood", mininterval=1.0, leave=False)
    with own_random_numbers(model.device):
        elbo, bound = importance_weighted_bound(model, values, samples, bar)
    return {
        "model": LIKELIHOODS[model.config.reconstruction_loss], "elbo": elbo.mean().item(),
        "log_likelihood_bound": bound.mean().item(), "samples": samples, "images": len(pixels),
    }  # fmt: skip


def compression(model: Any, rows: Any, column: str, count: int) -> dict[str, Any]:
    """Whole files of the first `count` images, at their own size and five qualities: means of bytes, bits per pixel,
    PSNR."""
    found = {}
    for quality in tqdm(QUALITIES, desc="compression", mininterval=1.0, leave=False):
        images = (to_mode(open_image(rows[i][column]), model.config.num_channels) for i in range(count))
        files = [
            (size, 8 * size / pixels, psnr) for size, psnr, pixels in (roundtrip(model, x, quality) for x in images)
        ]
        found[f"{quality:g}"] = dict(zip(("bytes", "bpp", "psnr"), torch.tensor(files).double().mean(0).tolist()))
    return {"images": count, "qualities": found}


def generation(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The task `generation`: (metrics, generated images). `pixels` are those of the evaluated split."""
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


def draw_results(folder: Path, model: Any, rows: dict[str, Tensor], data: Data, pixels: Tensor) -> None:
    """The figures of the task `reconstruction`, beside the model."""
    labelled_rows(rows, folder / "reconstructions.png")
    if model.config.latent_shape == [2]:
        labels = data.labels(data.split, "label")
        draw_plane(model, pixels.float() / 255, labels, folder / "latent_plane.png")


@torch.no_grad()
def draw_plane(model: Any, images: Tensor, labels: Tensor | None, path: Path, side: int = 25) -> None:
    """The figure of 2-d latents: where test images lie, and what the decoder draws over the same region."""
    low, high = model.config.pixel_range
    values = (x.to(model.device) * (high - low) + low for x in each_batch(images))
    latents = torch.cat([model.encode(x).latents.cpu() for x in values])
    (left, bottom), (right, top) = latents.quantile(0.005, 0).tolist(), latents.quantile(0.995, 0).tolist()
    xs, ys = torch.linspace(left, right, side), torch.linspace(top, bottom, side)
    grid = torch.stack([xs.repeat(side), ys.repeat_interleave(side)], 1)
    decoded = (model.decode(grid.to(model.device)).sample.cpu() - low) / (high - low)
    classes = None if labels is None else labels[: len(latents)].tolist()
    latent_plane(latents.numpy(), classes, decoded, (left, right, bottom, top), path)


def summary(metrics: dict[str, Any]) -> str:
    """The figures of an evaluation, a line each, for the screen."""
    titles = {"reconstruction": "model", "pca": f"PCA, {metrics.get('code_size')}"}
    titles |= {"denoising_input": "damaged", "denoising": "restored"}
    lines = []
    for row, title in titles.items():
        if row in metrics:
            lines.append(f"{title:10}" + "".join(f"  {name} {value:.5g}" for name, value in metrics[row].items()))
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
