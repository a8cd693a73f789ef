"""How well outliers are told from normal images: an autoencoder beside what people use without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..anomaly import FILE, PARTS, AnomalyDetector
from ..data import evaluation_split, open_dataset, pick_split, read_labels, read_rows, without_bars
from ..data import image_column as find_image_column
from ..data.images import undecoded
from ..errors import require
from ..latents import reconstruct
from ..latents.sampling import file_beside
from ..loading import load_model, pick_device
from ..plots import labelled_rows
from .request import Data

Array = NDArray[Any]


def detection_metrics(scores: Array, normal: Array) -> dict[str, float]:
    """Scores (images,), higher is more normal, and which images are normal -> auroc, the probability that an outlier
    scores less than a normal image, and aupr, the average precision of finding outliers. Raises ValueError where there
    is only one kind."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    check_both_kinds(normal)
    outlier = ~np.asarray(normal, dtype=bool)
    return {
        "auroc": float(roc_auc_score(outlier, -scores)), "aupr": float(average_precision_score(outlier, -scores))
    }  # fmt: skip


def check_both_kinds(normal: Array) -> None:
    """Raise ValueError where there are only normal images, or only outliers."""
    both = np.any(normal) and not np.all(normal)
    require(both, "Outliers can only be told from normal images where both are there: this split has only one kind.")


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
        """Log density of the components, and of what they leave as noise of one variance in each other direction."""
        pca, fitted, codes = components(30)
        density = GaussianMixture(min(10, len(x)), reg_covar=1e-3, random_state=seed).fit(fitted).score_samples(codes)
        left = np.square(pca.inverse_transform(codes) - y).sum(1)
        return density - 0.5 * left / max(float(pca.noise_variance_), 1e-12)

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
        "PCA, error": error, "PCA, mixture and error": mixture, "PCA, nearest neighbours": neighbors,
        "isolation forest": forest, "one-class SVM": machine,
    }  # fmt: skip
    for name, method in methods.items():
        yield name, method()


def detector_of(
    name: str, splits: Any, judged: str, train_split: str | None, image_column: str | None, refit: bool,
    options: dict[str, Any], device: str | None = None,
) -> AnomalyDetector:  # fmt: skip
    """The detector beside a model, or one that is fitted to `train_split` (default: train) of a dataset and saved
    there, where the model is in a folder and the fitted split is not the one to be judged. Raises ValueError."""
    if file_beside(name, FILE) is not None and not refit:
        require(
            not options and train_split is None,
            f"{name} has a detector: write --refit to fit one with other options or rows.",
        )
        detector = AnomalyDetector.from_pretrained(name)
        detector.model.to(pick_device(device))
        return detector
    split = train_split or "train"
    normal = pick_split(splits, split)
    model, processor = load_model(name, pick_device(device))
    detector = AnomalyDetector(model, processor=processor, **options)
    detector.fit(normal, image_column=image_column)
    if split == judged:
        print(f"Fitted to the rows it judges, of the split {split!r}: what is odd there passes for normal. Not saved.")
    elif Path(name).is_dir():
        print(f"Fitted and saved: {detector.save_detector(name)}")
    return detector


def score_table(detector: AnomalyDetector, rows: Any, image_column: str | None, figure: Path) -> Any:
    """A `datasets.Dataset` with `row`, `score` (higher is more normal), `outlier`, the `file` of an image that has
    one, and the columns of `rows` that hold numbers, classes and names; and a figure of the most unusual images,
    which a table has not."""
    import datasets

    pixels = read_rows(rows, detector.processor, image_column, progress=True)
    scores = detector.score_samples(pixels)
    plain = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Value | datasets.ClassLabel)]
    table: dict[str, Any] = {"row": np.arange(len(scores)), "score": scores, "outlier": scores < detector.offset_}
    if detector.processor.feature_columns is None:
        labelled_rows(unusual(detector, pixels[torch.from_numpy(scores).argsort()[:12]]), figure)
        files = image_files(rows, find_image_column(rows, image_column))
        table |= {"file": files} if any(files) else {}
    kept = [name for name in plain if name not in table]
    with without_bars():
        found = datasets.Dataset.from_dict(table)
        others = rows.select_columns(kept).flatten_indices()
        return datasets.concatenate_datasets([found, others], axis=1) if kept else found


def image_files(rows: Any, column: str) -> list[str | None]:
    """The file that each image came from, where that is known; nothing of a column of arrays."""
    import datasets
    import pyarrow.compute

    if not isinstance(rows.features[column], datasets.Image):
        return []
    parts = undecoded(rows, column).with_format("arrow").iter(1000)  # the bytes stay where they are
    return [file for part in parts for file in pyarrow.compute.struct_field(part[column], "path").to_pylist()]


def anomaly(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The task `anomaly`: outliers told from normal images of the evaluated split, by the detector beside the model or
    one fitted to the training split, by each of its parts, and by detectors without an autoencoder; and the rows of a
    figure. Raises ValueError."""
    images, is_normal = labelled_images(data, pixels)
    check_both_kinds(is_normal)
    train = normal_images(data, data.request.train_split)
    if file_beside(data.request.model, FILE) is not None:
        detector = AnomalyDetector.from_pretrained(data.request.model)
        detector.model.to(model.device)
    else:
        detector = AnomalyDetector(model, processor=data.processor).fit(train)
    scores = detector.score_samples(images)
    flagged = scores < detector.offset_
    found: dict[str, Any] = {
        "images": len(images), "outliers": data.request.outliers or f"not {data.request.normal_class}",
        "flagged_normal": float(flagged[is_normal].mean()), "flagged_outliers": float(flagged[~is_normal].mean()),
        "score": "+".join(detector.parts), "detectors": {"this model": detection_metrics(scores, is_normal)},
    }  # fmt: skip
    parts = "+".join(name for name in PARTS if name != "bound" or model.can_sample)
    alone = AnomalyDetector(model, processor=data.processor, score=parts).fit(train).score_parts(images)
    found["detectors"] |= {f"this model, {part}": detection_metrics(v, is_normal) for part, v in alone.items()}
    for name, values in rivals(train.float() / 255, images.float() / 255):
        found["detectors"][name] = detection_metrics(values, is_normal)
    return found, unusual(detector, images[torch.from_numpy(scores).argsort()[:12]])


def labelled_images(data: Data, pixels: Tensor) -> tuple[Tensor, Array]:
    """(uint8 images, which of them are normal) of the evaluated split and of what the request calls outliers."""
    request = data.request
    if request.outliers is not None:
        others = open_dataset(request.outliers)
        rows = pick_split(others, evaluation_split(others, None))
        odd = read_rows(rows, data.processor, limit=len(pixels), progress=True)
        return torch.cat([pixels, odd]), np.arange(len(pixels) + len(odd)) < len(pixels)
    return pixels, is_normal_class(data, data.split)[: len(pixels)]


def normal_images(data: Data, split: str) -> Tensor:
    """The uint8 images of a split that are normal."""
    pixels = data.pixels(split)
    return pixels if data.request.outliers is not None else pixels[torch.from_numpy(is_normal_class(data, split))]


def is_normal_class(data: Data, split: str) -> Array:
    """Which rows of a split are of the request's normal class. Raises ValueError."""
    column, wanted = data.request.label_column or "label", str(data.request.normal_class)
    labels, names = read_labels(data.splits, split, column)
    require(wanted in names, f"There is no class {wanted!r}: write --normal_class with one of {', '.join(names)}.")
    return (labels == names.index(wanted)).numpy()


def unusual(detector: AnomalyDetector, pixels: Tensor) -> dict[str, Tensor]:
    """uint8 images beside what the model makes of them, and where it errs: brighter is farther off."""
    images = pixels.float() / 255
    rebuilt = reconstruct(detector.model, images)
    maps = torch.from_numpy(detector.anomaly_map(pixels)).sqrt()[:, None]
    return {"most unusual": images, "reconstruction": rebuilt, "difference": maps / maps.max().clamp(min=1e-6)}
