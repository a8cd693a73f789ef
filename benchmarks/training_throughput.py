"""Images per second when training the same VAE on the same images: hf_ae, a bare PyTorch loop, and pythae, in turn.

    python benchmarks/training_throughput.py MNIST_FOLDER [--rounds 5] [--pythae PYTHON]

The network is 784-512-16-512-784, batch 128, Adam, five epochs of 20,000 images held in memory, evaluation and
tracking off. hf_ae is measured through its training script, its loop after the first step (what "Trained on …" says),
the bare loop likewise (torch.compile works in the first step). PYTHON is the interpreter of an environment with pythae
(`pip install torch==2.13.0 pythae pyarrow pillow`), timed by a callback from the end of its first step to the end of
its last epoch. Prints each round, and of the ratios within a round the median and the range.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BATCH, EPOCHS, IMAGES = 128, 5, 20_000


def load(folder: str) -> Tensor:
    """The first training images (images, 1, height, width) in 0…1."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    rows = pq.read_table(next(Path(folder, "data").glob("train-*.parquet")), columns=["image"]).slice(0, IMAGES)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(r["bytes"]))) for r in rows["image"].to_pylist()])
    return torch.tensor(pixels, dtype=torch.float32)[:, None] / 255


def bare(folder: str, bf16: bool, compiled: bool) -> float:
    """The least a training loop can do."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 32))
            self.decoder = nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 784), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            mean, logvar = self.encoder(x).chunk(2, 1)
            reconstruction = self.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
            kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1).mean()
            return F.mse_loss(reconstruction.float(), x, reduction="sum") / len(x) + kl

    x, model = load(folder), VAE()
    step = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    start, seen = 0.0, -BATCH  # the clock starts after the first step, as in hf_ae
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = step(x[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            start, seen = start or time.perf_counter(), seen + len(index)
    return seen / (time.perf_counter() - start)


def pythae(folder: str) -> float:
    """pythae's own training loop."""
    from pythae.models import VAE, VAEConfig
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Clock(TrainingCallback):
        first = last = 0.0

        def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
            self.first = self.first or time.perf_counter()

        def on_epoch_end(self, training_config: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

    x, clock = load(folder), Clock()
    fields = dict(num_epochs=EPOCHS, learning_rate=1e-3, per_device_train_batch_size=BATCH, no_cuda=True)
    config = BaseTrainerConfig(output_dir=tempfile.mkdtemp(), **fields)
    pipeline = TrainingPipeline(model=VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=16)), training_config=config)
    pipeline(train_data=x, callbacks=[clock])
    return (EPOCHS * len(x) - BATCH) / (clock.last - clock.first)


def ours(folder: str, precision: str, compiled: bool) -> float:
    """hf_ae's training script."""
    flags = f"""
        --model_type hf_ae_vae --config_overrides hidden_sizes=[512],latent_dim=16,activation=relu
        --max_train_samples {IMAGES} --train_batch_size {BATCH} --num_train_epochs {EPOCHS} --validation_epochs 0
        --mixed_precision {precision}
    """
    with tempfile.TemporaryDirectory() as output:
        where = ["--dataset_name", folder, "--output_dir", output]
        command = [sys.executable, "-m", "hf_ae.train", *where, *flags.split()]
        env = {**os.environ, "ACCELERATE_DYNAMO_BACKEND": "inductor" if compiled else "no"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(re.search(r"\(([\d,]+) images/s after", done.stdout).group(1).replace(",", ""))


def in_a_new_process(python: str, *arguments: str) -> float:
    """What this script prints with these arguments."""
    done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pythae", help="interpreter of an environment with pythae")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        how = {"bf16": "bf16" in args.only, "compiled": "compiled" in args.only}
        print(pythae(args.folder) if args.only == "pythae" else bare(args.folder, **how))
        return
    runs: dict[str, Callable[[], float]] = {
        "hf_ae": lambda: ours(args.folder, "no", False),
        "bare": lambda: in_a_new_process(sys.executable, args.folder, "--only", "bare"),
        "hf_ae bf16": lambda: ours(args.folder, "bf16", False),
        "bare bf16": lambda: in_a_new_process(sys.executable, args.folder, "--only", "bare bf16"),
        "hf_ae compiled": lambda: ours(args.folder, "no", True),
    }
    if args.pythae:
        runs["pythae"] = lambda: in_a_new_process(args.pythae, args.folder, "--only", "pythae")
    results: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.rounds):
        for name, run in runs.items():
            results[name].append(run())
        found = ", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in results.items())
        print(f"round {index + 1}: {found} images/s", flush=True)
    pairs = [("hf_ae", "pythae"), ("hf_ae", "bare"), ("hf_ae bf16", "bare bf16"), ("hf_ae bf16", "hf_ae")]
    for a, b in [*pairs, ("hf_ae compiled", "hf_ae")]:
        if b in results:
            ratios = [x / y for x, y in zip(results[a], results[b])]
            print(f"{a} / {b}: median {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
