"""The task `reconstruction`: error, PSNR and SSIM, beside PCA, and its figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import each_batch, to_pixel_values
from ..latents import encode_images, reconstruct
from ..metrics import pca_reconstruction, reconstruction_metrics
from ..models.quantizers import usage_and_perplexity
from ..plots import labelled_rows, latent_plane
from .request import Data


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
    """Of each level of discrete codes, the coarsest first: how many an image has, the bits of these as numbers of one
    length, usage (the fraction of the codewords that occur) and perplexity."""
    values = (to_pixel_values(part, model.device, model.config.pixel_range) for part in each_batch(pixels))
    levels = [torch.cat(level) for level in zip(*(model.levels_of(model.encode(x).indices) for x in values))]
    use: dict[str, dict[str, float]] = {}
    for i, level in enumerate(levels, 1):
        found = usage_and_perplexity(level, model.config.codebook_size)
        codes, each = level[0].numel(), math.log2(model.config.codebook_size)
        use[f"level_{i}"] = {
            "codes": codes,
            "bits": codes * each,
            **{key: value.item() for key, value in found.items()},
        }
    return use


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
    latents = encode_images(model, images)
    (left, bottom), (right, top) = latents.quantile(0.005, 0).tolist(), latents.quantile(0.995, 0).tolist()
    xs, ys = torch.linspace(left, right, side), torch.linspace(top, bottom, side)
    grid = torch.stack([xs.repeat(side), ys.repeat_interleave(side)], 1)
    decoded = (model.decode(grid.to(model.device)).sample.cpu() - low) / (high - low)
    classes = None if labels is None else labels[: len(latents)].tolist()
    latent_plane(latents.numpy(), classes, decoded, (left, right, bottom, top), path)
