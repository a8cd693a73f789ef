"""Three tables that come with scikit-learn: an autoencoder beside PCA, before a classifier and to find outliers.

    python benchmarks/tables.py [--seeds 3]

Accuracy: five folds of a Pipeline of standardisation, as many latents or components, and logistic regression. AUROC:
each class in turn is normal; fitted to two thirds of it, the rest of it is told from all others by the error of its
reconstruction.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_ae.sklearn import AutoencoderTransformer

TABLES: dict[str, tuple[Callable[..., Any], int]] = {
    "breast cancer": (load_breast_cancer, 5), "wine": (load_wine, 4), "digits": (load_digits, 10)
}  # fmt: skip
"""Name -> its loader, and how many latents or components."""
STEPS = 500


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    print("| | rows × columns, latents | accuracy: autoencoder | PCA | all columns | AUROC: autoencoder | PCA |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (load, size) in TABLES.items():
        x, y = load(return_X_y=True)
        ours = [accuracy(AutoencoderTransformer(size, max_steps=STEPS, random_state=s), x, y, s) for s in seeds]
        pca = [accuracy(PCA(size, random_state=s), x, y, s) for s in seeds]
        plain = [accuracy("passthrough", x, y, s) for s in seeds]
        found = np.array([outliers(x, y, size, s) for s in seeds])
        cells = [f"{len(x):,} × {x.shape[1]}, {size}", *map(shown, (ours, pca, plain)), *map(shown, found.T)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def shown(values: Any) -> str:
    """The mean and the range."""
    return f"{np.mean(values):.3f} ({np.min(values):.3f} to {np.max(values):.3f})"


def accuracy(transformer: Any, x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """Of five folds."""
    steps = make_pipeline(StandardScaler(), transformer, StandardScaler(), LogisticRegression(max_iter=2000))
    return float(cross_val_score(steps, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=seed)).mean())


def outliers(x: np.ndarray, y: np.ndarray, size: int, seed: int) -> tuple[float, float]:
    """(AUROC of the autoencoder, of PCA), means over the classes."""
    found = []
    for label in np.unique(y):
        normal = np.random.default_rng(seed).permutation(np.flatnonzero(y == label))
        train, rest = normal[: 2 * len(normal) // 3], normal[2 * len(normal) // 3 :]
        tested = np.concatenate([rest, np.flatnonzero(y != label)])
        scale = StandardScaler().fit(x[train])
        fitted, held = scale.transform(x[train]), scale.transform(x[tested])
        model = AutoencoderTransformer(size, max_steps=STEPS, random_state=seed).fit(x[train])
        pca = PCA(size, random_state=seed).fit(fitted)
        errors = np.square(pca.inverse_transform(pca.transform(held)) - held).sum(1)
        truth = y[tested] == label
        found.append([roc_auc_score(truth, model.score_samples(x[tested])), roc_auc_score(truth, -errors)])
    ours, theirs = np.mean(found, 0)
    return float(ours), float(theirs)


if __name__ == "__main__":
    main()
