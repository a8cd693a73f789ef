"""One class against nine: ten autoencoders, each of one class of the training split, on the whole test split.

    python benchmarks/anomaly.py DATASET [--seeds 3] [--classes 0,1] [--choose] [--overrides …] [--max_train_steps N]

    python benchmarks/anomaly.py DATASET --model FOLDER --outliers DATASET

Prints the AUROC and AUPR of each class and their means, beside detectors without an autoencoder. `--choose` leaves the
test split alone: it trains on five sixths of a class, and tells the other sixth from other classes of the training
split. The recipe below was chosen with it. With `--outliers` a trained model is fitted to the whole training split,
and tells the test split from that of another dataset.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_ae import AnomalyDetector, train
from hf_ae.anomaly import PARTS
from hf_ae.data import open_dataset, read_labels, read_rows
from hf_ae.evaluation.anomaly import detection_metrics, rivals

OVERRIDES = "network=conv,hidden_sizes=[32,64],latent_dim=32"
RECIPE = ["--model_type", "hf_ae_autoencoder", "--train_batch_size", "128", "--learning_rate", "0.002"]
RECIPE += ["--lr_scheduler", "cosine", "--lr_warmup_steps", "100", "--mixed_precision", "bf16"]
RECIPE += ["--validation_epochs", "0"]


def main() -> None:
    """Print a line for each class, and the table of means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="Hub id or folder, with columns of images and classes")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--classes", default="0,1,2,3,4,5,6,7,8,9")
    parser.add_argument("--choose", action="store_true", help="measure on held-out images of the training split")
    parser.add_argument("--overrides", default=OVERRIDES)
    parser.add_argument("--model", help="of --outliers: a trained model")
    parser.add_argument("--outliers", help="another dataset, whose test split holds the outliers")
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument(
        "--score", action="append", help="scores of AnomalyDetector; default: the default and its parts"
    )
    args = parser.parse_args()
    splits = open_dataset(args.dataset_name)
    if args.outliers:
        return against_another(splits, open_dataset(args.outliers), args.model)
    found: dict[str, list[dict[str, float]]] = {}
    for label in (int(c) for c in args.classes.split(",")):
        normal, test_rows, is_normal = split_of(splits, label, args.choose)
        for seed in range(args.seeds):
            start, scores = time.perf_counter(), {}
            with tempfile.TemporaryDirectory() as place:
                fit_and_score(Path(place), normal, test_rows, seed, args, scores)
            for name, values in scores.items():
                found.setdefault(name, []).append(detection_metrics(values, is_normal))
            line = "  ".join(f"{name} {found[name][-1]['auroc']:.3f}" for name in scores)
            print(f"class {label}, seed {seed}, {time.perf_counter() - start:.0f} s: {line}", flush=True)
    print("\n| | AUROC, mean over the classes | AUPR |\n| --- | ---: | ---: |")
    for name, values in found.items():
        by_seed = np.array([[v["auroc"], v["aupr"]] for v in values]).reshape(
            -1, args.seeds if name in own(args) else 1, 2
        )
        auroc, aupr = by_seed.mean(0).T
        spread = f" ({auroc.min():.4f} to {auroc.max():.4f})" if len(auroc) > 1 else ""
        print(f"| {name} | {auroc.mean():.4f}{spread} | {aupr.mean():.4f} |")


def against_another(splits: Any, others: Any, model: str) -> None:
    """Print how well a model tells the test split from that of another dataset, and what it flags of both."""
    detector = AnomalyDetector(model).fit(splits["train"])
    normal, odd = (detector.score_samples(part["test"]) for part in (splits, others))
    found = detection_metrics(np.concatenate([normal, odd]), np.arange(len(normal) + len(odd)) < len(normal))
    flagged = [f"{np.mean(scores < detector.offset_):.2%}" for scores in (normal, odd)]
    print(f"{Path(model).name}: AUROC {found['auroc']:.4f}, AUPR {found['aupr']:.4f}; {' and '.join(flagged)} flagged")


def own(args: argparse.Namespace) -> list[str]:
    """The scores of our detector that are compared."""
    return args.score or ["mixture+neighbors", *PARTS[:1], *PARTS[2:]]


def split_of(splits: Any, label: int, choose: bool) -> tuple[Any, Any, np.ndarray]:
    """(rows of the class to train on, rows to score, which of these are of the class)."""
    labels = read_labels(splits, "train", "label")[0].numpy()
    normal = np.flatnonzero(labels == label)
    if not choose:
        return splits["train"].select(normal), splits["test"], read_labels(splits, "test", "label")[0].numpy() == label
    cut = len(normal) * 5 // 6
    others = np.random.default_rng(label).permutation(np.flatnonzero(labels != label))[:3000]
    scored = np.concatenate([normal[cut:], others])
    return splits["train"].select(normal[:cut]), splits["train"].select(scored), labels[scored] == label


def fit_and_score(
    place: Path, normal: Any, test_rows: Any, seed: int, args: argparse.Namespace, scores: dict[str, np.ndarray]
) -> None:
    """Train a model and fill in the scores of its detectors and, for the first seed, of the others."""
    (place / "data").mkdir()
    normal.to_parquet(place / "data" / "train-00000-of-00001.parquet")
    where = ["--dataset_name", str(place / "data"), "--output_dir", str(place / "model"), "--seed", str(seed)]
    steps = ["--max_train_steps", str(args.max_train_steps), "--config_overrides", args.overrides]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*RECIPE, *where, *steps])
    for score in own(args):
        detector = AnomalyDetector(place / "model", score=score, seed=seed).fit(normal)
        scores[score] = detector.score_samples(test_rows)
    if seed == 0:
        pixels = (read_rows(rows, detector.processor) for rows in (normal, test_rows))
        scores |= dict(rivals(*(p.float() / 255 for p in pixels)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
