"""What a training tells while it runs: loss terms, images a second, sample images, and a loss that is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError
from .arguments import TrainingArguments
from .output_folder import checkpoints


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


def start_trackers(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Tell the tracker, if any, the arguments of the run."""
    if args.report_to != "none":
        values = {
            k: str(v) if isinstance(v, dict) else v for k, v in dataclasses.asdict(args).items() if v is not None
        }
        accelerator.init_trackers("hf_ae", config=values)


def log_step(run: Any, output: Any) -> None:
    """Loss and its terms to the progress bar and the tracker."""
    loss, measures = float(output.loss.detach()), getattr(output, "measures", None) or {}
    run.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
    if run.args.report_to != "none":
        terms = {f"train/{name}": float(term.detach()) for name, term in {**output.losses, **measures}.items()}
        rate = run.schedulers[0].get_last_lr()[0]
        run.accelerator.log({"train/loss": loss, "learning_rate": rate, **terms}, step=run.progress.step)


def log_evaluation(run: Any, totals: dict[str, float], unit: str = "") -> None:
    """Losses on held-out images to the screen and the tracker."""
    tqdm.write(
        f"step {run.progress.step}: " + "  ".join(f"{name} {value:.4f}{unit}" for name, value in totals.items())
    )
    if run.args.report_to != "none":
        run.accelerator.log({f"eval/{name}": value for name, value in totals.items()}, step=run.progress.step)


def show_samples(run: Any, draw: Callable[[Path], Image.Image]) -> None:
    """Write the figure that `draw(path)` makes into the samples of the run, and give it to trackers that take
    images."""
    folder = Path(run.args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    sheet = draw(folder / f"step-{run.progress.step:07d}.png")
    for tracker in run.accelerator.trackers if run.args.report_to != "none" else []:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"eval/samples": np.asarray(sheet)[None]}, step=run.progress.step, **layout)


class FiniteGuard:
    """Stops the run at the first loss that is not finite, naming the step and the term.

    On a CPU each step is checked; elsewhere every 20 steps, so that the device need not wait.
    """

    def __init__(self, device: torch.device, output_dir: str) -> None:
        self.every, self.folder = 1 if device.type == "cpu" else 20, Path(output_dir)
        self.pending: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    def watch(self, step: int, loss: Tensor, losses: dict[str, Tensor]) -> None:
        """Check a step's loss, now or with the next ones."""
        self.pending.append((step, loss.detach(), losses))
        if len(self.pending) >= self.every:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteLossError where a loss that was watched is not finite."""
        pending, self.pending = self.pending, []
        values = torch.stack([loss for _, loss, _ in pending]).tolist() if pending else []
        for (step, _, losses), value in zip(pending, values):
            if not math.isfinite(value):
                terms = " and ".join(name for name, term in losses.items() if not bool(torch.isfinite(term)))
                self.stop(f"At step {step} the loss is {value}: the term {terms or 'sum'} is not finite.")

    def stop(self, reason: str) -> None:
        """Raise NonFiniteLossError with the reason and what to do."""
        good = next(reversed(checkpoints(self.folder)), None)
        found = f"The last good checkpoint is {good}." if good else "No checkpoint was written before."
        raise NonFiniteLossError(f"{reason} {found} Try a lower --learning_rate or --max_grad_norm 1.0.")


class Clock:
    """Counts images and the time that training took, without validation."""

    def __init__(self) -> None:
        self.begun, self.images = time.perf_counter(), 0
        self.first: tuple[float, int] | None = None

    def saw(self, images: int) -> None:
        """Count the images of a batch."""
        self.images += images
        if self.first is None:  # the first step also compiles and allocates
            self.first = (time.perf_counter(), self.images)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        stopped = time.perf_counter()
        yield
        pause = time.perf_counter() - stopped
        self.begun += pause
        if self.first is not None:
            self.first = (self.first[0] + pause, self.first[1])

    def summary(self) -> str:
        """One line for the end of a run."""
        if self.first is None:
            return "Nothing was left to train."
        now = time.perf_counter()
        rate = (self.images - self.first[1]) / max(now - self.first[0], 1e-9)
        took = f"{now - self.begun:.1f} s ({rate:,.0f} images/s after the first step)"
        return f"Trained on {self.images:,} images in {took}."
