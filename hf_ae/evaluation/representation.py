"""The task `representation`: what classifiers find in latents, beside pixels and PCA, and what units stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import require
from ..latents import encode_images
from ..latents.maps import majority
from .request import Data

Array = NDArray[Any]

FEW, DRAWS = 10, 5
"""Labelled images of a class, where few are given, and how many times they are drawn."""
STRENGTHS = (1e-3, 1e-4, 1e-5)
"""Weights of the squared coefficients of a probe beside the mean loss of a row; of these the best on a fifth of the
training images is taken."""
FEW_STRENGTH = 0.05
"""That of a probe of few rows."""
PCA_SIZE = 32
"""Principal components beside larger latents."""
NEIGHBORS = 10
MOST_TRAIN = 20_000
"""Training images that strengths are chosen on."""
MOST_SPREAD = 60_000
"""Training images that labels are handed on over: time grows with the square."""
GRANDMOTHER = 0.8
"""F1 from which on a single unit counts as the detector of a class."""


def representation(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], None]:
    """Figures of latents, pixels and PCA of images whose classes are known, and of the units of the latents.

    The classifiers see the latents of the training split. Raises ValueError.
    """
    column, split = data.request.label_column or "label", data.request.train_split
    there = split in data.splits and split != data.split
    advice = "--split and --train_split name two of the dataset's"
    require(there, f"Probes need two splits, and there is no other split {split!r} than the measured one: {advice}.")
    test_labels = data.classes(data.split, column)[: len(pixels)].numpy()
    train_labels = data.classes(split, column).numpy()
    kinds = len(np.unique(train_labels))
    require(kinds > 1, f"The column {column!r} holds one class only: a probe tells several apart.")
    images, train = pixels.float() / 255, data.pixels(split).float() / 255
    x, y = (encode_images(model, part).flatten(1).numpy() for part in (train, images))
    flat, size = (train.flatten(1).numpy(), images.flatten(1).numpy()), min(PCA_SIZE, x.shape[1])
    seen = {"latents": (x, y), "pixels": flat, f"PCA, {size}": components(flat[0], flat[1], size)}
    found: dict[str, Any] = {"images": len(pixels), "classes": kinds}
    bar = tqdm(seen.items(), desc="fitting probes", leave=False)
    found["values"] = {name: probes(a, train_labels, b, test_labels) for name, (a, b) in bar}
    return found | {"units": units(y, test_labels)}, None


def components(train: Array, test: Array, size: int) -> tuple[Array, Array]:
    """Both by the first principal components of `train`. Raises ValueError."""
    from sklearn.decomposition import PCA

    advice = "give more training images"
    require(size <= min(train.shape), f"{size} components need as many rows and values, not {train.shape}: {advice}.")
    pca = PCA(size, random_state=0).fit(train)
    return pca.transform(train), pca.transform(test)


def probes(train: Array, train_labels: Array, test: Array, test_labels: Array) -> dict[str, Any]:
    """Accuracies on `test`, (rows, values) with labels (rows,), of what is fitted to `train`.

    linear_probe: logistic regression of standardised values, with a 95% interval (Wilson). neighbors: the class that
    most of the 10 nearest have. precision: the fraction of these that have the class. few_labels: a linear probe of 10
    labelled rows of each class, the mean and 95% interval over 5 draws of these; spread: these labels handed on along
    a graph of nearest neighbours of all rows of `train` first.
    """
    x, y = standardized(train, test)
    accuracy = fitted(x, train_labels, best_strength(x, train_labels)).score(y, test_labels)
    near = nearest(train, test, NEIGHBORS)
    draws = [few_rows(train_labels, seed) for seed in range(DRAWS)]
    few = [fitted(x[rows], train_labels[rows], FEW_STRENGTH).score(y, test_labels) for rows in draws]
    spread = list(spread_labels(train, train_labels, test, test_labels, draws))
    return {
        "linear_probe": accuracy, "linear_probe_interval": wilson(accuracy, len(test)),
        "neighbors": float((majority(train_labels[near]) == test_labels).mean()),
        "precision": float((train_labels[near] == test_labels[:, None]).mean()),
        "few_labels": float(np.mean(few)), "few_labels_interval": of_draws(few),
        "spread": float(np.mean(spread)), "spread_interval": of_draws(spread),
    }  # fmt: skip


def standardized(train: Array, test: Array) -> tuple[Array, Array]:
    """Both with the mean and standard deviation of `train` taken out, value by value."""
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(deviation > 1e-6, deviation, 1.0)
    return (train - mean) / scale, (test - mean) / scale


def fitted(x: Array, labels: Array, strength: float) -> Any:
    """Logistic regression: the mean loss of a row, and `strength` times the squares of the coefficients."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (2 * strength * len(x)), max_iter=300, tol=1e-3).fit(x, labels)


def best_strength(x: Array, labels: Array) -> float:
    """The best of STRENGTHS on a fifth of the rows, fitted to the others."""
    rows = np.random.default_rng(0).permutation(len(x))[:MOST_TRAIN]
    held, kept = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    return max(STRENGTHS, key=lambda s: fitted(x[kept], labels[kept], s).score(x[held], labels[held]))


def nearest(train: Array, test: Array, count: int) -> Array:
    """Indices (rows of test, count) of the nearest rows of `train`, the nearest first."""
    middle = train.mean(0)  # far from it, the squares below would lose their last digits
    rows, others = (torch.from_numpy(values - middle).float() for values in (train, test))
    squares, count = rows.square().sum(1), min(count, len(rows))
    blocks = others.split(1000)  # products: a third of the time of scikit-learn's brute search
    return torch.cat([(squares - 2 * x @ rows.T).topk(count, 1, largest=False).indices for x in blocks]).numpy()


def few_rows(labels: Array, seed: int) -> Array:
    """FEW rows of each class, drawn at random. Raises ValueError where a class has fewer."""
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    require(min(map(len, groups)) >= FEW, f"A class has fewer than {FEW} training images: probes need more.")
    return np.concatenate([generator.choice(group, FEW, replace=False) for group in groups])


def spread_labels(
    train: Array, train_labels: Array, test: Array, test_labels: Array, draws: list[Array], most: int = MOST_SPREAD
) -> Iterator[float]:
    """Accuracy on `test` of labels that spread from each of `draws`, rows of `train`, over the graph of the 10 nearest
    neighbours of rows of both (Zhou et al. 2004), whose classes play no part."""
    from scipy.sparse import coo_matrix, diags

    others = np.random.default_rng(0).permutation(len(train))[:most]
    used = np.unique(np.concatenate([*draws, others]))
    rows = np.concatenate([train[used], test])
    near = nearest(rows, rows, NEIGHBORS + 1)[:, 1:]
    edges = (np.repeat(np.arange(len(rows)), near.shape[1]), near.ravel())
    graph = coo_matrix((np.ones(near.size), edges), (len(rows), len(rows))).tocsr()
    graph = graph.maximum(graph.T)
    degree = diags(1 / np.sqrt(np.asarray(graph.sum(1)).ravel()))
    step = 0.99 * degree @ graph @ degree
    for labelled in draws:
        start = np.zeros((len(rows), train_labels.max() + 1))
        start[np.searchsorted(used, labelled), train_labels[labelled]] = 1
        state = start
        for _ in range(100):
            state = step @ state + start
        state = state / state.sum(0)  # classes weigh the same
        yield float((state[len(used) :].argmax(1) == test_labels).mean())


def wilson(accuracy: float, count: int, z: float = 1.96) -> list[float]:
    """The 95% interval of an accuracy on `count` rows (Wilson 1927)."""
    middle = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return [float(middle - half), float(middle + half)]


def of_draws(values: list[float]) -> list[float]:
    """The 95% interval of a mean of draws, by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def units(latents: Array, labels: Array) -> dict[str, Any]:
    """What single units of `latents` (images, units) stand for, by the classes (images,) of the images.

    selectivity: of each unit how well it tells its best class from all others, as the area under the ROC curve, 0.5…1;
    the median and the greatest. grandmother_units: how many have an F1 of at least 0.8 for a class, at their best
    threshold. units_a_class_needs: the fewest units, the most selective first, whose linear probe finds a class with
    nearly the area that all have (99%), averaged over classes. active: the fraction of units that an image makes
    different from zero by more than a hundredth of the greatest.
    """
    areas = selectivity(latents, labels)
    best = areas.max(1)
    size = np.abs(latents).max() if latents.size else 1.0
    return {
        "count": latents.shape[1], "selectivity": float(np.median(best)), "greatest_selectivity": float(best.max()),
        "grandmother_units": int((best_f1(latents, labels).max(1) >= GRANDMOTHER).sum()),
        "units_a_class_needs": units_needed(latents, labels, areas),
        "active": float((np.abs(latents) > 0.01 * max(size, 1e-12)).mean()),
    }  # fmt: skip


def selectivity(latents: Array, labels: Array) -> Array:
    """(units, classes): the area under the ROC curve of each unit for each class, of the unit or its negative."""
    from scipy.stats import rankdata

    ranks = rankdata(latents, axis=0)
    areas = []
    for label in np.unique(labels):
        inside = labels == label
        count, others = inside.sum(), (~inside).sum()
        areas.append((ranks[inside].sum(0) - count * (count + 1) / 2) / (count * others))
    found = np.stack(areas, 1)
    return np.maximum(found, 1 - found)


def best_f1(latents: Array, labels: Array) -> Array:
    """(units, classes): the greatest F1 of a threshold on each unit, from above or below, for each class."""
    found = []
    for values in (latents, -latents):
        order = np.argsort(-values, axis=0)
        ordered = np.take_along_axis(values, order, 0)
        ends = np.concatenate([ordered[1:] < ordered[:-1], np.ones((1, values.shape[1]), bool)])  # ties stay together
        chosen = np.arange(1, len(values) + 1)[:, None]
        scores = []
        for label in np.unique(labels):
            inside = (labels == label)[order].cumsum(0)
            scores.append(np.where(ends, 2 * inside / (chosen + inside[-1]), 0).max(0))
        found.append(np.stack(scores, 1))
    return np.maximum(*found)


def units_needed(latents: Array, labels: Array, areas: Array) -> float:
    """See `units`: found by doubling the number of units, on half of the rows, from probes fitted to the others."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split

    x, _ = standardized(latents, latents)
    fit, held = train_test_split(np.arange(len(x)), test_size=0.5, random_state=0, stratify=labels)
    needed = []
    for column, label in enumerate(np.unique(labels)):
        order, inside = np.argsort(-areas[:, column]), labels == label

        def area(count: int, order: Array = order, inside: Array = inside) -> float:
            chosen = x[:, order[:count]]
            probe = fitted(chosen[fit], inside[fit], STRENGTHS[0])
            return float(roc_auc_score(inside[held], probe.decision_function(chosen[held])))

        counts = [2**i for i in range(20) if 2**i < latents.shape[1]]
        enough = 0.99 * area(latents.shape[1])
        needed.append(next((count for count in counts if area(count) >= enough), latents.shape[1]))
    return float(np.mean(needed))
