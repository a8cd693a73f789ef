"""How well outliers are told from normal images: an autoencoder beside what people use without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import require

Array = NDArray[Any]


def detection_metrics(scores: Array, normal: Array) -> dict[str, float]:
    """Scores (images,), higher is more normal, and which images are normal -> auroc, the probability that an outlier
    scores less than a normal image, and aupr, the average precision of finding outliers. Raises ValueError where there
    is only one kind."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    outlier = ~np.asarray(normal, dtype=bool)
    both = outlier.any() and not outlier.all()
    require(both, "Outliers can only be told from normal images where both are there: this split has only one kind.")
    return {
        "auroc": float(roc_auc_score(outlier, -scores)), "aupr": float(average_precision_score(outlier, -scores))
    }  # fmt: skip


def rivals(train: Tensor, test: Tensor, seed: int = 0) -> Iterator[tuple[str, Array]]:
    """(name, scores of `test`, higher is more normal) of detectors fitted to `train`, normal images alone.

    Both (images, channels, height, width) in 0…1. Settings are those of the usual comparisons: 30 components and ten
    Gaussians, the fifth neighbour in 50 components, a forest of 200 trees, a radial kernel on 2,000 images.
    """
    from sklearn.decomposition import PCA
    from sklearn.ensemble import IsolationForest
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import NearestNeighbors
    from sklearn.svm import OneClassSVM

    x, y = (images.flatten(1).numpy() for images in (train, test))

    def components(count: int) -> tuple[Any, Array, Array]:
        pca = PCA(min(count, *x.shape), random_state=seed).fit(x)
        return pca, pca.transform(x), pca.transform(y)

    def error() -> Array:
        pca, _, codes = components(30)
        return -np.square(pca.inverse_transform(codes) - y).sum(1)

    def mixture() -> Array:
        _, fitted, codes = components(30)
        return GaussianMixture(min(10, len(x)), reg_covar=1e-3, random_state=seed).fit(fitted).score_samples(codes)

    def neighbors() -> Array:
        _, fitted, codes = components(50)
        return -NearestNeighbors(n_neighbors=min(5, len(x))).fit(fitted).kneighbors(codes)[0][:, -1]

    def forest() -> Array:
        return IsolationForest(n_estimators=200, random_state=seed).fit(x).score_samples(y)

    def machine() -> Array:
        chosen = np.random.default_rng(seed).permutation(len(x))[:2000]
        pca = PCA(min(50, len(chosen), x.shape[1]), whiten=True, random_state=seed).fit(x[chosen])
        return OneClassSVM(nu=0.1, gamma="scale").fit(pca.transform(x[chosen])).score_samples(pca.transform(y))

    methods: dict[str, Callable[[], Array]] = {
        "PCA, error": error, "PCA, mixture": mixture, "PCA, nearest neighbours": neighbors,
        "isolation forest": forest, "one-class SVM": machine,
    }  # fmt: skip
    for name, method in methods.items():
        yield name, method()
