"""Maps: latents in two dimensions, and how well a map keeps who is near whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError, require

Array = NDArray[Any]

METHODS = ("latents", "pca", "tsne", "umap")
FEWEST = 30
"""Images of a map."""
NEIGHBORS = 12
"""Of which trustworthiness and continuity ask whether they stay near."""
MOST_DIMENSIONS = 50
"""Principal components that t-SNE starts from, as its authors do."""


@dataclass
class Map:
    """Points (images, 2) of latents, and how a point of the plane becomes latents where that can be told."""

    method: str
    points: Array
    origin: Array | None = None
    """The flattened latents of the point (0, 0)."""
    axes: Array | None = None
    """(2, size): what one step along each axis adds to them."""

    @property
    def can_decode(self) -> bool:
        """Whether each point of the plane stands for latents."""
        return self.axes is not None


def check_method(method: str | None) -> None:
    """Raise ValueError unless a map can be made by that method; None stands for the default."""
    known = method is None or method in METHODS
    require(known, f"method={method!r} is not known: write one of {', '.join(METHODS)}.")


def map_latents(latents: Tensor, method: str | None = None, seed: int = 0) -> Map:
    """Latents (images, *shape) -> a map of them.

    latents: their own two dimensions (the default where they have two). pca: the plane of most variance (the default
    elsewhere). tsne: van der Maaten and Hinton 2008. umap: McInnes et al. 2018, where umap-learn is installed. Raises
    ValueError.
    """
    values = latents.flatten(1).double().numpy()
    method = method or ("latents" if values.shape[1] == 2 else "pca")
    check_method(method)
    require(len(values) >= FEWEST, f"{len(values)} images are too few for a map: give at least {FEWEST}.")
    require(bool(np.isfinite(values).all()), "The latents hold NaN or infinity: the model does not fit these images.")
    if method == "latents":
        size = f"the latents of this model hold {values.shape[1]} numbers, not 2"
        require(values.shape[1] == 2, f"No map of latents as they are: {size}. Write pca, tsne or umap.")
        return Map(method, values, np.zeros(2), np.eye(2))
    if method == "pca":
        from sklearn.decomposition import PCA

        require(values.shape[1] >= 2, "The latents of this model hold one number: a map has two dimensions.")
        pca = PCA(2, random_state=seed).fit(values)
        return Map(method, pca.transform(values), pca.mean_, pca.components_)
    return Map(method, tsne(values, seed) if method == "tsne" else umap(values, seed))


def tsne(values: Array, seed: int) -> Array:
    """scikit-learn's t-SNE, from the first principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if values.shape[1] > MOST_DIMENSIONS:
        values = PCA(min(MOST_DIMENSIONS, len(values)), random_state=seed).fit_transform(values)
    perplexity = min(30.0, (len(values) - 1) / 3)
    init = "pca" if values.shape[1] >= 2 else "random"
    return TSNE(2, perplexity=perplexity, init=init, random_state=seed).fit_transform(values.astype(np.float32))


def umap(values: Array, seed: int) -> Array:
    """UMAP of umap-learn. Raises UserError where it is not installed."""
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError("The map umap needs umap-learn: pip install umap-learn.") from error
    threads = torch.get_num_threads()
    try:
        return np.asarray(UMAP(n_components=2, random_state=seed, n_jobs=1).fit_transform(values.astype(np.float32)))
    finally:
        torch.set_num_threads(threads)  # which numba sets for the whole process


def map_quality(images: Tensor, points: Array, labels: Tensor | None = None) -> dict[str, float]:
    """How a map keeps neighbours, all in 0…1, higher is better: of images (images, …) and their points (images, 2).

    trustworthiness: are those that are near on the map near as images (Venna and Kaski 2001, 12 neighbours)?
    continuity: the other way round. neighbor_accuracy: the fraction of images whose class most of their 10 nearest on
    the map have. Time and memory grow with the square of the number of images.
    """
    from sklearn.manifold import trustworthiness

    values = images.flatten(1).numpy()
    nearest = min(NEIGHBORS, len(values) // 2 - 1)
    found = {
        "trustworthiness": float(trustworthiness(values, points, n_neighbors=nearest)),
        "continuity": float(trustworthiness(points, values, n_neighbors=nearest)),
    }
    if labels is not None:
        found["neighbor_accuracy"] = neighbor_accuracy(points, labels.numpy())
    return found


def neighbor_accuracy(points: Array, labels: Array, others: tuple[Array, Array] | None = None, k: int = 10) -> float:
    """The fraction of points whose class most of the `k` nearest have: of the other points, or of `others`, (points,
    classes)."""
    from sklearn.neighbors import NearestNeighbors

    where, classes = (points, labels) if others is None else others
    found = NearestNeighbors(n_neighbors=min(k, len(where) - 1)).fit(where)
    near = found.kneighbors(None if others is None else points, return_distance=False)
    return float((majority(classes[near]) == labels).mean())


def majority(classes: Array) -> Array:
    """Whole numbers (rows, votes) -> the one that most of a row's votes are for, the least of several."""
    return np.array([np.bincount(row).argmax() for row in classes])
