"""How far single latents stand for single factors of the data: five scores from latents and known factors.

Each takes `latents` (n, d) and `factors` (n, f), arrays or tensors, a row for each image; a factor is a column of
classes, such as whole numbers, and constant columns are left out. Settings are those of disentanglement_lib (Locatello
et al. 2019). All raise ValueError for what does not fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import require

Array = NDArray[Any]

ROWS = (10_000, 5_000)
"""At most so many rows are fitted and tested on, where a classifier is fitted to single images."""
VOTES = (10_000, 5_000)
"""Batches that are fitted and tested on, where an example is a batch of images."""
BATCH = 64
"""Images, or pairs of images, of such a batch."""


def mig(latents: Any, factors: Any, bins: int = 20) -> float:
    """Mutual information gap, 0…1 (Chen et al. 2018, equation 6): of each factor the largest mutual information with a
    latent, less the second largest, in units of the factor's entropy; averaged. Latents are discretised into `bins`
    of equal width."""
    z, v = checked(latents, factors)
    information = mutual_information(z, v, bins)
    entropies = np.array([entropy(np.bincount(column) / len(column)) for column in v.T])
    return float(np.mean(gap(information) / entropies))


def sap(latents: Any, factors: Any) -> float:
    """Separated attribute predictability, 0…1 (Kumar et al. 2018, section 3): of each factor the squared correlation
    with the best latent, less that with the second best; averaged. Factors are taken as numbers here, in the order of
    their values."""
    z, v = checked(latents, factors)
    z, v = z - z.mean(0), v - v.mean(0)
    scores = np.square(z.T @ v / len(z)) / np.maximum(np.outer(z.var(0), v.var(0)), 1e-12)
    return float(np.mean(gap(scores)))


def dci(latents: Any, factors: Any, seed: int = 0) -> float:
    """Disentanglement, 0…1, of [`dci_scores`]."""
    return dci_scores(latents, factors, seed)["disentanglement"]


def dci_scores(latents: Any, factors: Any, seed: int = 0) -> dict[str, float]:
    """disentanglement (each latent matters to one factor), completeness (each factor to one latent) and
    informativeness (accuracy on rows not fitted to), each 0…1 (Eastwood and Williams 2018, section 2), with the
    importances of gradient-boosted trees that predict a factor from all latents."""
    from sklearn.ensemble import GradientBoostingClassifier

    z, v = checked(latents, factors, 2)
    train, test = split_rows(len(z), seed)
    importance, accuracies = np.zeros((z.shape[1], v.shape[1])), []
    for j, factor in enumerate(v.T):
        trees = GradientBoostingClassifier(random_state=seed).fit(z[train], factor[train])
        importance[:, j] = trees.feature_importances_
        accuracies.append(float(np.mean(trees.predict(z[test]) == factor[test])))
    return {
        "disentanglement": concentration(importance), "completeness": concentration(importance.T),
        "informativeness": float(np.mean(accuracies)),
    }  # fmt: skip


def factor_vae_score(latents: Any, factors: Any, seed: int = 0, least_variance: float = 0.05) -> float:
    """Accuracy, 0…1, of telling which factor all images of a batch share from the latent that varies least among them
    (Kim and Mnih 2018, algorithm 3). Variances are relative to those over all rows; latents whose variance over all
    rows is below `least_variance` have no vote."""
    z, v = checked(latents, factors, 2)
    variances = z.var(0)
    z = z[:, variances >= least_variance] / np.sqrt(variances[variances >= least_variance])
    if z.shape[1] == 0:
        return 0.0
    groups, rng = [Groups(column) for column in v.T], np.random.default_rng(seed)
    counts = [np.zeros((z.shape[1], v.shape[1])) for _ in VOTES]
    for votes, table in zip(VOTES, counts):
        for factor, group in enumerate(groups):
            for rows in np.array_split(group.batches(share(votes, len(groups), factor), rng), 20):
                np.add.at(table[:, factor], z[rows].var(1).argmin(1), 1)
    fitted, tested = counts
    return float(tested[np.arange(z.shape[1]), fitted.argmax(1)].sum() / tested.sum())


def beta_vae_score(latents: Any, factors: Any, seed: int = 0) -> float:
    """Accuracy, 0…1, of a linear classifier that tells which factor the two images of each pair share, from the mean
    absolute difference of their latents over a batch of pairs (Higgins et al. 2017, section 3)."""
    from sklearn.linear_model import LogisticRegression

    z, v = checked(latents, factors, 2)
    groups, rng = [Groups(column) for column in v.T], np.random.default_rng(seed)
    parts = []
    for pairs in VOTES:
        counts = [share(pairs, len(groups), factor) for factor in range(len(groups))]
        parts.append(np.concatenate([group.differences(z, count, rng) for group, count in zip(groups, counts)]))
        parts.append(np.repeat(np.arange(len(groups)), counts))
    train, train_labels, test, test_labels = parts
    scale = train.std(0) + 1e-12
    machine = LogisticRegression(max_iter=1000, random_state=seed).fit(train / scale, train_labels)
    return float(np.mean(machine.predict(test / scale) == test_labels))


class Groups:
    """The rows of a dataset by the value of one factor."""

    def __init__(self, factor: Array) -> None:
        self.factor, self.order = factor, factor.argsort(kind="stable")
        self.sizes = np.bincount(factor)
        self.starts = self.sizes.cumsum() - self.sizes

    def rows(self, values: Array, rng: np.random.Generator) -> Array:
        """For each value a random row that has it."""
        return self.order[self.starts[values] + (rng.random(values.shape) * self.sizes[values]).astype(int)]

    def batches(self, count: int, rng: np.random.Generator) -> Array:
        """(count, BATCH) rows; those of a batch share the value of the factor."""
        values = self.factor[rng.integers(len(self.factor), size=(count, 1))]
        return self.rows(values.repeat(BATCH, 1), rng)

    def differences(self, z: Array, count: int, rng: np.random.Generator) -> Array:
        """(count, d): the mean over BATCH pairs, each of which shares the value of the factor, of |z - z'|."""
        first = rng.integers(len(self.factor), size=(count, BATCH))
        second = self.rows(self.factor[first], rng)
        parts = zip(np.array_split(first, 20), np.array_split(second, 20))
        return np.concatenate([np.abs(z[a] - z[b]).mean(1) for a, b in parts])


def checked(latents: Any, factors: Any, least: int = 1) -> tuple[Array, Array]:
    """Latents as float64, and the factors that vary, at least so many, as whole numbers from 0."""
    z, v = np.asarray(latents, dtype=np.float64), np.asarray(factors)
    shapes = f"{z.shape} and {v.shape}"
    good = z.ndim == v.ndim == 2 and len(z) == len(v) > 0 and z.shape[1] > 0
    require(good, f"latents and factors have shapes {shapes}: write (rows, latents) and (rows, factors).")
    require(np.isfinite(z).all(), "latents hold values that are not finite.")
    columns = [np.unique(column, return_inverse=True) for column in v.T]
    for number, (values, _) in enumerate(columns):
        classes = len(values) <= max(2, len(v) // 2)
        require(classes, f"Factor {number} has {len(values)} values in {len(v)} rows: give it in classes.")
    varying = [index for values, index in columns if len(values) > 1]
    require(varying, "No factor varies: each column holds one value only.")
    few = "Of the factors only one varies: this score tells how far several come apart."
    require(len(varying) >= least, few)
    return z, np.stack(varying, 1)


def split_rows(count: int, seed: int) -> tuple[Array, Array]:
    """Random rows to fit and to test on, two to one."""
    require(count >= 3, f"{count} rows are too few to fit and test on.")
    order, fitted = np.random.default_rng(seed).permutation(count), min(ROWS[0], -(-2 * count // 3))
    return order[:fitted], order[fitted : fitted + ROWS[1]]


def share(count: int, parts: int, index: int) -> int:
    """How many of `count` fall to one of several parts."""
    return count // parts + (index < count % parts)


def mutual_information(z: Array, v: Array, bins: int) -> Array:
    """(d, f): mutual information in nats of each latent, in `bins` of equal width, with each factor."""
    edges = [np.histogram_bin_edges(latent, bins) for latent in z.T]
    classes = [np.digitize(latent, edge[:-1]) - 1 for latent, edge in zip(z.T, edges)]
    found = np.zeros((z.shape[1], v.shape[1]))
    for i, latent in enumerate(classes):
        for j, factor in enumerate(v.T):
            joint = np.bincount(latent * (factor.max() + 1) + factor, minlength=bins * (factor.max() + 1))
            p = joint.reshape(bins, -1) / len(latent)
            found[i, j] = entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p)
    return found


def entropy(p: Array) -> float:
    """Of probabilities, in nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def gap(scores: Array) -> Array:
    """(latents, factors) -> the largest of each column less the second largest."""
    ordered = np.sort(scores, 0)[::-1]
    return ordered[0] - (ordered[1] if len(ordered) > 1 else 0.0)


def concentration(importance: Array) -> float:
    """1 - the entropy of each row in units of its largest possible, averaged with the rows' sums as weights."""
    total = importance.sum()
    if total == 0:
        return 0.0
    rows = importance[importance.sum(1) > 0]
    shares = rows / rows.sum(1, keepdims=True)
    most = np.log(importance.shape[1]) or 1.0
    each = np.array([1.0 - entropy(row) / most for row in shares])
    return float((each * rows.sum(1)).sum() / total)
