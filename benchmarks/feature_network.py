"""Train the small classifier in whose features hf-ae evaluate compares generated with real images.

    python benchmarks/feature_network.py [--epochs 6]

Fashion-MNIST (classes 0 to 9) and the first 20,000 of MNIST (10 to 19), each image moved by up to two pixels. Writes
hf_ae/evaluation/feature_network.safetensors in half precision; prints its SHA-256, to be noted in feature_network.py
beside it, and its accuracy on both test splits as it is stored. Five minutes on one core. Done once: new weights mean
new figures everywhere.
"""

import argparse
import hashlib

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from hf_ae import AutoencoderConfig, AutoencoderImageProcessor
from hf_ae.data import open_dataset, read_labels, read_rows, to_pixel_values
from hf_ae.evaluation.feature_network import WEIGHTS, FeatureNetwork
from hf_ae.evaluation.fidelity import accuracy

DATASETS = {"zalando-datasets/fashion_mnist": (0, 60_000), "ylecun/mnist": (10, 20_000)}
"""Name -> (first class, training images)."""
BATCH = 128


def load_split(name: str, split: str) -> tuple[Tensor, Tensor]:
    """(uint8 pixels, labels) of one split."""
    splits = open_dataset(name)
    processor = AutoencoderImageProcessor.from_config(AutoencoderConfig())
    pixels = read_rows(splits[split], processor)
    return pixels, read_labels(splits, split, "label")[0]


def train(network: FeatureNetwork, pixels: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    steps = epochs * (len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(pixels)).split(BATCH)[: len(pixels) // BATCH]:
            x = to_pixel_values(pixels[rows], "cpu", (0.0, 1.0), shift=2)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network.classify(x)
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total * BATCH / len(pixels):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    parts = [(*load_split(name, "train"), first, count) for name, (first, count) in DATASETS.items()]
    pixels, labels = torch.cat([x[:n] for x, _, _, n in parts]), torch.cat([y[:n] + first for _, y, first, n in parts])
    network = FeatureNetwork()
    train(network, pixels, labels, args.epochs)
    state = network.state_dict().items()
    save_file({name: value.half() if value.is_floating_point() else value for name, value in state}, WEIGHTS)
    print(f"SHA256 = {hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()!r}, {WEIGHTS.stat().st_size:,} bytes")
    network = FeatureNetwork().eval()
    network.load_state_dict(load_file(WEIGHTS))
    for name, (first, _) in DATASETS.items():
        pixels, labels = load_split(name, "test")
        print(f"{name}: accuracy {accuracy(network, pixels.float() / 255, labels + first):.4f}")


if __name__ == "__main__":
    main()
