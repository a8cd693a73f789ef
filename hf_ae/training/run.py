"""What a training moves forward: the model with its optimizers, schedules and moving average, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm.auto import tqdm

from .arguments import TrainingArguments
from .optimizers import make_ema, make_optimizers, make_schedulers
from .processes import StopRequest
from .tracking import Clock, FiniteGuard, start_trackers


@dataclass
class Progress:
    """Where a run is: optimizer steps done, and the next batch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Run:
    """A training; a checkpoint holds all of it.

    ```
    with run:
        run.open()
        while run.unfinished:
            for batch in batches(args.train_batch_size, run.progress.epoch, **run.place):
                with run.accelerator.accumulate(run.model):
                    output = run.model(batch)
                    run.accelerator.backward(output.loss)
                    run.update_weights()
                if run.step_done(output, len(batch)):
                    ...  # log
                    keep(run)  # a checkpoint, where one is due
                if not run.unfinished: break
            else:
                run.next_epoch()
        run.close()
        ...  # save the model
    ```
    """

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, model: nn.Module, batches: int, data: dict[str, Any]
    ) -> None:
        """`batches` an epoch fix the length of the run, unless `args.max_train_steps` does. `data`: what fixes the
        order of the data; a checkpoint can only go on with the same."""
        self.args, self.accelerator, self.progress = args, accelerator, Progress()
        self.optimizers, self.ema = make_optimizers(model, args), make_ema(model, args)
        steps = args.num_train_epochs * batches // args.gradient_accumulation_steps
        self.total_steps = args.max_train_steps or max(1, steps)
        self.schedulers = make_schedulers(self.optimizers, args, self.total_steps)
        self.model = accelerator.prepare(model)
        # fp16 alone needs accelerate's wrapper of optimizers, which costs 0.2 ms a step (benchmarks/NOTES.md)
        if accelerator.scaler is not None:
            self.optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in self.optimizers]
        self.parameters = list(self.model.parameters())
        opponents = list(getattr(model, "discriminator", nn.Module()).parameters())
        others = {id(parameter) for parameter in opponents}
        self.parts = [[p for p in self.parameters if id(p) not in others], opponents]
        self.data = {name: getattr(args, name) for name in ("train_batch_size", "gradient_accumulation_steps", "seed")}
        self.data |= data
        self.guard, self.clock = FiniteGuard(accelerator.device, args.output_dir), Clock()
        self.bar, self.stop = tqdm(disable=True), StopRequest(accelerator)
        set_seed(args.seed, device_specific=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        """However the run ends: no bar is drawn below what is printed next, and signals are no longer noted."""
        self.bar.close()
        self.stop.ignore()

    @property
    def bare_model(self) -> Any:
        """The model without the wrappers of several processes and of torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def unfinished(self) -> bool:
        """Whether steps are left."""
        return self.progress.step < self.total_steps

    @property
    def place(self) -> dict[str, Any]:
        """What the data need to know for the next batch of an epoch."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return dict(seed=self.args.seed, start=self.progress.batch, rank=rank, processes=processes)

    def open(self) -> None:
        """Begin to take steps."""
        start_trackers(self.args, self.accelerator)
        self.stop.listen()
        hidden = not self.accelerator.is_main_process
        self.bar = tqdm(
            total=self.total_steps, initial=self.progress.step, disable=hidden, mininterval=1.0, desc="training"
        )
        self.clock = Clock()
        self.model.train()

    def update_weights(self) -> None:
        """One step of each optimizer, where all gradients of a step are there. Of a model and its discriminator each
        part has the gradient of its own terms, and is clipped on its own."""
        if self.accelerator.sync_gradients:
            if self.args.max_grad_norm is not None:
                self.accelerator.unscale_gradients()
                for part in self.parts:
                    nn.utils.clip_grad_norm_(part, self.args.max_grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def step_done(self, output: Any, images: int) -> bool:
        """Count a batch of so many images; whether it completed a step, and not just added to its gradients.

        Raises NonFiniteLossError.
        """
        self.progress.batch += 1
        self.clock.saw(images * self.accelerator.num_processes)
        self.guard.watch(self.progress.step + 1, output.loss, output.losses)
        if not self.accelerator.sync_gradients:
            return False
        for scheduler in self.schedulers:
            scheduler.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.progress.step += 1
        self.bar.update()
        return True

    def print(self, message: str) -> None:
        """On the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def every(self, steps: int | None) -> bool:
        """Whether something is due that happens every so many steps."""
        return bool(steps) and self.progress.step % (steps or 1) == 0

    def next_epoch(self) -> None:
        """The data are through."""
        self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    @property
    def validation_due(self) -> bool:
        """Whether the epoch that ended is one to validate after."""
        epochs = self.args.validation_epochs
        return bool(epochs) and (self.progress.epoch % epochs == 0 or not self.unfinished)

    def close(self) -> None:
        """All steps are done."""
        self.guard.check()
        self.bar.close()
        self.accelerator.print(self.clock.summary())

    def end(self) -> None:
        """Close trackers and the process group."""
        self.model = self.bare_model
        self.accelerator.free_memory()  # gloo can hang when the wrapper of several processes outlives its group
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
