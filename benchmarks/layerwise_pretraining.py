"""What greedy layer-wise pretraining buys a deep sigmoid autoencoder (784-1000-500-250-30) on MNIST.

    python benchmarks/layerwise_pretraining.py MNIST_FOLDER [--epochs 5] [--layer_epochs 2] [--optimizer adamw]

Trains three models, alike but for the start, and prints the squared error per test image:
pretrained (`layer_epochs` for each of the four layers, then `epochs` end to end), the same number of end-to-end epochs
without pretraining, and as many end-to-end epochs as both phases together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_ae.evaluation.evaluate import evaluate


def error(folder: str, epochs: int, layer_epochs: int, optimizer: str, rate: float) -> float:
    """Squared error per test image of a model that is trained now."""
    flags = f"""
        --config_overrides hidden_sizes=[1000,500,250],latent_dim=30,activation=sigmoid --train_batch_size 250
        --num_train_epochs {epochs} --pretrain_layerwise_epochs {layer_epochs} --optimizer {optimizer}
        --learning_rate {rate} --mixed_precision bf16 --validation_epochs 0
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "model")
        where = ["--dataset_name", folder, "--output_dir", str(output)]
        command = [sys.executable, "-m", "hf_ae.train", *where, *flags.split()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        metrics = evaluate(output, folder, tasks="reconstruction", save=False)
    return metrics["reconstruction"]["squared_error_per_image"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--layer_epochs", type=int, default=2)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    args = parser.parse_args()
    total = args.epochs + 4 * args.layer_epochs
    rate = {"adamw": 1e-3, "muon": 3e-3}[args.optimizer]
    rows = [
        (f"pretrained, {args.layer_epochs} epochs a layer, then {args.epochs} epochs", args.epochs, args.layer_epochs),
        (f"not pretrained, {args.epochs} epochs", args.epochs, 0),
        (f"not pretrained, {total} epochs", total, 0),
    ]
    for name, epochs, layer_epochs in rows:
        figure = error(args.folder, epochs, layer_epochs, args.optimizer, rate)
        print(f"{args.optimizer}, {name}: {figure:.2f} per test image", flush=True)


if __name__ == "__main__":
    main()
