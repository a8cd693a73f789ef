"""The task `disentanglement`: how far single latents stand for single factors of the data, and traversals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import check_column, read_rows
from ..disentanglement import beta_vae_score, dci_scores, factor_vae_score, mig, sap
from ..errors import require
from ..latents import encode_images
from ..latents.walks import traversal
from .request import Data, names

IMAGES = 10_000
"""Rows that the scores are measured on, drawn at random: as many as disentanglement_lib takes."""
LEAST_IMAGES = 100
"""With fewer, scores of classifiers mean nothing."""
DCI_IMAGES = 2_000
"""Of IMAGES those that boosted trees see, which takes a minute; ten times as long with all."""


def disentanglement(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Five scores of a dataset whose factors are known, columns of whole numbers, and the rows of a figure: what each
    latent changes, the one that varies most first. Raises ValueError."""
    require(
        model.config.latent_dim is not None, "disentanglement asks for vector latents: this model has a map of them."
    )
    columns = factor_columns(data)
    count = min(data.request.max_images or IMAGES, len(data.rows))
    require(count >= LEAST_IMAGES, f"{count} images are too few to tell factors apart: give {LEAST_IMAGES} or more.")
    chosen = data.rows.select(np.random.default_rng(0).permutation(len(data.rows))[:count])
    images = read_rows(chosen, data.processor, data.column, progress=True).float() / 255
    factors = np.stack([np.asarray(chosen[name]) for name in columns], 1)
    latents = encode_images(model, images)
    return {"images": count, "factors": columns, **all_scores(latents.numpy(), factors)}, traversals(model, latents)


def factor_columns(data: Data) -> list[str]:
    """The columns that are asked for, or all of whole numbers. Raises ValueError."""
    features = data.rows.features
    if asked := names(data.request.factor_columns):
        for name in asked:
            check_column(data.rows, name, "factor_columns")
        return asked
    whole = [name for name, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
    require(whole, "The dataset has no columns of whole numbers: name its factors by --factor_columns a,b.")
    require(len(whole) > 1, f"Only {whole[0]} is a column of whole numbers: name two or more by --factor_columns a,b.")
    return whole


def all_scores(latents: NDArray[Any], factors: NDArray[Any], seed: int = 0) -> dict[str, float]:
    """The scores of `hf_ae.disentanglement`, each 0…1, of (n, d) latents and (n, f) factors."""
    return {
        "mig": mig(latents, factors), "sap": sap(latents, factors),
        **dci_scores(latents[:DCI_IMAGES], factors[:DCI_IMAGES], seed),
        "factor_vae_score": factor_vae_score(latents, factors, seed),
        "beta_vae_score": beta_vae_score(latents, factors, seed),
    }  # fmt: skip


def traversals(model: Any, latents: Tensor, steps: int = 12, most: int = 10) -> dict[str, Tensor]:
    """Name -> images (steps, channels, height, width) in 0…1: from the middle of the latents (images, size), each of
    those that vary most set to values from its 2nd to its 98th hundredth. Latents that hardly vary are left out."""
    low, high = model.config.pixel_range
    middle, variances, found = latents.median(0).values, latents.var(0), {}
    order = [i for i in variances.argsort(descending=True).tolist() if variances[i] >= 0.1 * variances.max()]
    for i in order[:most]:
        first, last = latents[:, i].quantile(torch.tensor([0.02, 0.98])).tolist()
        walk = traversal(model, middle, i, torch.linspace(first, last, steps))
        found[f"latent {i}"] = ((walk - low) / (high - low)).clamp(0, 1)
    return found
