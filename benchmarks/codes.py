"""What codes look like: sparse against distributed ones, and whether an overcomplete code copies its input.

    python benchmarks/codes.py FASHION_MNIST [MODEL …] [-o codes.png]            # of the shipped models, by default
    python benchmarks/codes.py FASHION_MNIST --overcomplete [--epochs 5] [--seeds 3]

The first prints, for each model, how well its units tell classes apart, how many units a class needs, and how many
are active in an image, on the test split, and draws all of that. The second trains five autoencoders with 2,048
latents for 784 pixels, which differ in what keeps them from copying, and prints the squared error of test images, of
uniform noise and of test images whose pixels are shuffled, each as a fraction of the error of a black image, how many
latents are active in an image, and how many in any.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ae import train
from hf_ae.data import open_dataset, read_labels, read_rows
from hf_ae.evaluation.representation import selectivity, units
from hf_ae.latents import encode_images, reconstruct
from hf_ae.loading import load_model
from hf_ae.plots import new_figure

SHIPPED = ("fashion-features", "fashion-sparse", "fashion-contractive", "fashion-conv-ae", "fashion-vae")
LATENTS = 2048
CODES = {
    "nothing": ("hf_ae_autoencoder", ""), "L1": ("hf_ae_sparse", "sparsity=l1,sparsity_weight=0.05"),
    "the 32 greatest": ("hf_ae_sparse", "sparsity=topk,k=32"),
    "noise of 0.5": ("hf_ae_denoising", "corruption=gaussian,corruption_level=0.5"),
    "half of the pixels missing": ("hf_ae_denoising", "corruption=masking,corruption_level=0.5"),
}  # fmt: skip
"""What keeps an autoencoder from copying -> model_type, and overrides of the configuration."""


def main() -> None:
    """Print a table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="Hub id or folder, with columns of images and classes")
    parser.add_argument("models", nargs="*", default=[f"model_cards/{name}" for name in SHIPPED])
    parser.add_argument("--overcomplete", action="store_true")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("codes.png"))
    args = parser.parse_args()
    splits = open_dataset(args.dataset_name)
    if args.overcomplete:
        return overcomplete(args, splits)
    labels, found = read_labels(splits, "test", "label")[0].numpy(), {}
    head = ["units", "area of the median unit", "of the best", "F1 ≥ 0.8", "units a class needs", "active"]
    print(f"| | {' | '.join(head)} |\n| --- |{' ---: |' * len(head)}")
    for name in args.models:
        model, processor = load_model(name)
        images = read_rows(splits["test"], processor).float() / 255
        latents = encode_images(model, images).flatten(1).numpy()
        figures = units(latents, labels)
        found[Path(name).name] = (latents, selectivity(latents, labels), figures)
        cells = [f"{v:.3g}" if isinstance(v, float) else f"{v:,}" for v in figures.values()]
        print(f"| {Path(name).name} | {' | '.join(cells)} |", flush=True)
    draw(found, args.output)


def draw(found: dict[str, tuple[Any, Any, dict[str, Any]]], path: Path) -> None:
    """Left how well each unit tells its best class, the best first; right how strongly an image uses its units."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for name, (latents, areas, _) in found.items():
        best = np.sort(areas.max(1))[::-1]
        left.plot(np.linspace(0, 1, len(best)), best)
        strength = np.sort(np.abs(latents), 1)[:, ::-1]
        share = (strength / strength.sum(1, keepdims=True).clip(1e-12)).mean(0).cumsum()
        right.plot(np.arange(1, len(share) + 1) / len(share), share, label=f"{name}, {len(share):,} units")
    left.set(
        xlabel="fraction of the units", ylabel="area under the ROC curve", title="how well a unit tells its best class"
    )
    right.set(
        xlabel="fraction of the units", ylabel="of all activity", title="an image's activity in its strongest units"
    )
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def overcomplete(args: argparse.Namespace, splits: Any) -> None:
    """Print the table of CODES."""
    print("| kept from copying by | error on images | on noise | on shuffled pixels | active in an image | in any |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for title, (kind, overrides) in CODES.items():
        runs = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                shared = f"hidden_sizes=[],latent_dim={LATENTS},latent_activation=relu"
                command = ["--model_type", kind, "--config_overrides", f"{shared},{overrides}".strip(",")]
                command += ["--dataset_name", args.dataset_name, "--output_dir", folder, "--seed", str(seed)]
                command += ["--num_train_epochs", str(args.epochs), "--learning_rate", "0.001"]
                train.main([*command, "--mixed_precision", "bf16", "--validation_epochs", "0"])
                runs.append(measured(*load_model(folder), splits))
        mean = np.mean(runs, 0)
        cells = [f"{value:.2%}" for value in mean[:4]] + [f"{mean[4]:.0%}"]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def measured(model: Any, processor: Any, splits: Any) -> list[float]:
    """The figures of a row of that table, as fractions."""
    rows = splits["test"]
    images = read_rows(rows, processor, limit=2000).float() / 255
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(images.shape, generator=generator)
    order = torch.rand(len(images), images[0].numel(), generator=generator).argsort(1)
    shuffled = images.flatten(1).gather(1, order).view_as(images)

    def error(x: Tensor) -> float:
        return float((reconstruct(model, x) - x).square().sum() / x.square().sum())

    active = encode_images(model, images).flatten(1) > 1e-3
    return [
        error(images),
        error(noise),
        error(shuffled),
        float(active.float().mean()),
        float(active.any(0).float().mean()),
    ]


if __name__ == "__main__":
    main()
