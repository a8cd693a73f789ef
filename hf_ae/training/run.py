"""What the training scripts share: optimizers, steps, checkpoints and exact resume, guards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.utils import logging

from .arguments import TrainingArguments, checkpoints, trackable

STATE_FORMAT = 1


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


# The run


@dataclass
class Progress:
    """Where a run is: optimizer steps done, and the next batch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


@dataclass
class Run:
    """What a training script moves forward, and a checkpoint holds."""

    accelerator: Any
    model: Any
    optimizers: list
    schedulers: list
    ema: Any
    progress: Progress
    total_steps: int
    data: dict
    """What fixes the order of the data: a checkpoint can only go on with the same."""

    @property
    def bare_model(self):
        """The model without the wrappers of several processes and of torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def clear_output(output: Path, everything: bool):
    """Mark the folder as a run's; remove what an earlier run left there if it is to be replaced."""
    (output / ".hf_ae_run").touch()
    for cut_off in output.glob(".partial-checkpoint-*"):
        shutil.rmtree(cut_off, ignore_errors=True)
    for old in [*checkpoints(output), output / "samples"] if everything else []:
        shutil.rmtree(old, ignore_errors=True)


def make_accelerator(args, output: Path) -> Accelerator:
    """The accelerator, with the tracker that `args.report_to` names."""
    logging.disable_progress_bar()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output / "logs",
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"report_to={args.report_to!r} needs that tracker: pip install {args.report_to}")
    return accelerator


# Optimizers


class KernelMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) that also takes convolution kernels, each as a matrix: outputs × everything else."""

    def __init__(self, weights, lr: float, weight_decay: float):
        super().__init__([w.detach().view(len(w), -1) for w in weights], lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.param_groups[0]["params"] = list(weights)  # Muon itself accepts matrices alone

    def _init_group(self, group, params_with_grad, grads, muon_momentum_bufs):
        for weight in group["params"]:
            self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        complex_weights = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, muon_momentum_bufs):
            tensors[:] = [t.view(len(t), -1) for t in tensors]
        grads[:] = [g.reshape(len(g), -1) for g in grads]
        return complex_weights


def make_optimizers(model, args: TrainingArguments) -> list[torch.optim.Optimizer]:
    """One or two for the model, and AdamW with β₁ = 0.5, as usual in adversarial training, for its discriminator if it has one."""
    judge = [] if getattr(model, "discriminator", None) is None else list(model.discriminator.parameters())
    rate, fused = args.discriminator_learning_rate or args.learning_rate, next(model.parameters()).device.type in ("cpu", "cuda")
    optimizers = optimizers_of(model, args, leave_out=set(judge))
    return [*optimizers, torch.optim.AdamW(judge, rate, betas=(0.5, 0.99), weight_decay=0.0, fused=fused)] if judge else optimizers


def optimizers_of(model, args: TrainingArguments, leave_out: set) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the weights of layers (not embeddings and codebooks) with AdamW for everything else."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in leave_out]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay, fused=fused)]
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables |= {p for name, p in model.named_parameters() if name.endswith("codebook")}
    matrices = [p for p in parameters if p.ndim >= 2 and p not in tables]
    rest = [p for p in parameters if p.ndim < 2 or p in tables]
    muon = KernelMuon(matrices, args.learning_rate, args.weight_decay)
    return [muon, torch.optim.AdamW(rest, args.learning_rate, weight_decay=0.0, fused=fused)] if rest else [muon]


def make_schedulers(optimizers, args: TrainingArguments, total_steps: int):
    """One learning-rate schedule for each optimizer."""
    return [get_scheduler(args.lr_scheduler, o, args.lr_warmup_steps, total_steps) for o in optimizers]


def make_ema(model, args: TrainingArguments):
    """diffusers' moving average of the weights, warmed up, or None."""
    if not args.use_ema:
        return None
    from diffusers.training_utils import EMAModel

    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.to(next(model.parameters()).device)
    return ema


@contextlib.contextmanager
def averaged(model, ema):
    """The model with its averaged weights, where there are any."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


class FiniteGuard:
    """Stops the run at the first loss that is not finite, naming the step and the term.

    On a CPU each step is checked; elsewhere every 20 steps, so that the device need not wait.
    """

    def __init__(self, device: torch.device):
        self.every = 1 if device.type == "cpu" else 20
        self.pending: list[tuple] = []

    def watch(self, step: int, loss: torch.Tensor, losses: dict):
        self.pending.append((step, loss.detach(), losses))
        if len(self.pending) >= self.every:
            self.check()

    def check(self):
        pending, self.pending = self.pending, []
        if not pending:
            return
        values = [pending[0][1].item()] if len(pending) == 1 else torch.stack([p[1] for p in pending]).tolist()
        for (step, _, losses), value in zip(pending, values):
            if not math.isfinite(value):
                terms = [name for name, term in losses.items() if not bool(torch.isfinite(term))]
                raise NonFiniteLossError(f"At step {step} the loss is {value}: the term {' and '.join(terms) or 'sum'} is not finite.")


# Steps


class Clock:
    """Counts images and the time that training took, without validation."""

    def __init__(self):
        self.begun, self.images, self.first = time.perf_counter(), 0, None

    def saw(self, images: int):
        self.images += images
        if self.first is None:  # the first step also compiles and allocates
            self.first = (time.perf_counter(), self.images)

    @contextlib.contextmanager
    def paused(self):
        stopped = time.perf_counter()
        yield
        pause = time.perf_counter() - stopped
        self.begun += pause
        if self.first is not None:
            self.first = (self.first[0] + pause, self.first[1])

    def summary(self) -> str:
        if self.first is None:
            return "Nothing was left to train."
        now = time.perf_counter()
        rate = (self.images - self.first[1]) / max(now - self.first[0], 1e-9)
        return f"Trained on {self.images:,} images in {now - self.begun:.1f} s ({rate:,.0f} images/s after the first step)."


def report(args, run: Run, bar, output):
    """Loss terms to the progress bar and the tracker."""
    terms = {name: float(term.detach()) for name, term in output.losses.items()}
    bar.set_postfix(loss=f"{float(output.loss.detach()):.4g}", refresh=False)
    terms |= {name: float(value) for name, value in (getattr(output, "measures", None) or {}).items()}
    if args.report_to != "none":
        terms = {f"train/{name}": value for name, value in terms.items()}
        rate = run.schedulers[0].get_last_lr()[0]
        run.accelerator.log({"train/loss": float(output.loss.detach()), "learning_rate": rate, **terms}, step=run.progress.step)


def show_samples(args, run: Run, draw, output: Path):
    """Write the picture that `draw(path)` makes into the samples of the run, and give it to the trackers that take pictures."""
    (output / "samples").mkdir(exist_ok=True)
    sheet = draw(output / "samples" / f"step-{run.progress.step:07d}.png")
    for tracker in run.accelerator.trackers if args.report_to != "none" else []:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"eval/samples": np.asarray(sheet)[None]}, step=run.progress.step, **layout)


def begin(args: TrainingArguments, accelerator, model, batches: int, data: dict, resume_from: Path | None) -> Run:
    """The model with its optimizers, schedules and moving average, new or as a checkpoint left them.

    `batches` an epoch fix the length of the run, unless `args.max_train_steps` does. `data` is compared on resume.
    """
    optimizers, ema = make_optimizers(model, args), make_ema(model, args)
    steps = args.max_train_steps or max(1, args.num_train_epochs * batches // args.gradient_accumulation_steps)
    schedulers = make_schedulers(optimizers, args, steps)
    model = accelerator.prepare(model)
    if accelerator.scaler is not None:  # fp16 alone needs accelerate's wrapper, which costs a small model 5% of its time
        optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    data = {name: getattr(args, name) for name in ("train_batch_size", "gradient_accumulation_steps", "seed")} | data
    run = Run(accelerator, model, optimizers, schedulers, ema, Progress(), steps, data)
    set_seed(args.seed, device_specific=True)
    if resume_from is not None:
        load_checkpoint(run, resume_from)
        accelerator.print(f"Going on from {resume_from.name}.")
    if args.report_to != "none":
        accelerator.init_trackers("hf_ae", config=trackable(args))
    return run


def optimize(args: TrainingArguments, run: Run, batches, forward, validate, output: Path):
    """Epochs of steps, with reports, checkpoints and validation in between.

    `batches(batch_size, epoch, seed, start, rank, processes)` yields an epoch's batches, `forward(batch)` gives `.loss`
    and `.losses`, `validate()` (or None) measures.
    """
    try:
        take_steps(args, run, batches, forward, validate, output)
    except NonFiniteLossError as error:
        good = next(reversed(checkpoints(output)), None)
        advice = f"The last good checkpoint is {good}." if good else "No checkpoint was written before."
        raise NonFiniteLossError(f"{error} {advice} Try a lower --learning_rate or --max_grad_norm 1.0.") from None


def take_steps(args, run, batches, forward, validate, output):
    """What `optimize` does, as long as the loss is finite."""
    accelerator, progress = run.accelerator, run.progress
    share = dict(seed=args.seed, rank=accelerator.process_index, processes=accelerator.num_processes)
    parameters, guard, clock = list(run.model.parameters()), FiniteGuard(accelerator.device), Clock()
    bar = tqdm(total=run.total_steps, initial=progress.step, disable=not accelerator.is_main_process, mininterval=1.0, desc="training")
    run.model.train()
    with bar:
        while progress.step < run.total_steps:
            for batch in batches(args.train_batch_size, progress.epoch, start=progress.batch, **share):
                with accelerator.accumulate(run.model):
                    result = forward(batch)
                    accelerator.backward(result.loss)  # of a model and its discriminator: each gets the gradient of its own terms
                    if accelerator.sync_gradients:
                        if args.max_grad_norm is not None:
                            accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                        for optimizer in run.optimizers:
                            optimizer.step()
                            optimizer.zero_grad()
                progress.batch += 1
                clock.saw(len(batch) * accelerator.num_processes)
                guard.watch(progress.step + 1, result.loss, result.losses)
                if not accelerator.sync_gradients:
                    continue
                for scheduler in run.schedulers:
                    scheduler.step()
                if run.ema is not None:
                    run.ema.step(parameters)
                progress.step += 1
                bar.update()
                if progress.step % args.logging_steps == 0:
                    report(args, run, bar, result)
                if args.checkpointing_steps and progress.step % args.checkpointing_steps == 0:
                    guard.check()
                    save_checkpoint(run, output, args.checkpoints_total_limit)
                if progress.step >= run.total_steps:
                    break
            else:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            due = args.validation_epochs and progress.epoch % args.validation_epochs == 0
            if validate is not None and (due or progress.step >= run.total_steps):
                with clock.paused():
                    validate()
        guard.check()
    accelerator.print(clock.summary())


def end(run: Run):
    """Close trackers and the process group."""
    accelerator = run.accelerator
    run.model = run.bare_model
    accelerator.free_memory()  # gloo can hang when the wrapper of several processes outlives the process group
    accelerator.wait_for_everyone()
    accelerator.end_training()


# Checkpoints


def save_checkpoint(run: Run, folder: Path, limit: int | None):
    """Write `folder`/checkpoint-STEP: the model as from_pretrained reads it, and the rest of the state as safetensors
    and JSON. The folder appears under its name only when it is complete. All but the newest `limit` are removed."""
    accelerator, step = run.accelerator, run.progress.step
    model = run.bare_model
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteLossError(f"At step {step} the weight {name} is not finite: no checkpoint was written.")
    tensors = {"random": accelerator.gather(torch.get_rng_state()[None].to(accelerator.device)).cpu()}
    if accelerator.device.type == "cuda":
        tensors["random_cuda"] = accelerator.gather(torch.cuda.get_rng_state()[None].to(accelerator.device)).cpu()
    if accelerator.is_main_process:
        state = {"format": STATE_FORMAT, "progress": dataclasses.asdict(run.progress), **pack_state(run, tensors)}
        target, partial = folder / f"checkpoint-{step}", folder / f".partial-checkpoint-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        save_file(tensors, partial / "training_state.safetensors")
        (partial / "training_state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in checkpoints(folder)[: -limit or None] if limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def pack_state(run: Run, tensors: dict) -> dict:
    """Put the state of optimizers and moving average into `tensors`; returns what JSON can hold of it."""
    state: dict = {"data": run.data, "optimizers": [], "schedulers": []}
    for number, optimizer in enumerate(run.optimizers):
        saved = optimizer.state_dict()
        state["optimizers"].append(saved["param_groups"])
        for index, values in saved["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value).cpu().contiguous()
    for scheduler in run.schedulers:
        state["schedulers"].append({k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"})
    if run.ema is not None:
        state["ema_step"] = run.ema.optimization_step
        tensors.update({f"ema.{i}": p.cpu().contiguous() for i, p in enumerate(run.ema.shadow_params)})
    if run.accelerator.scaler is not None:
        state["scaler"] = run.accelerator.scaler.state_dict()
    return state


def load_checkpoint(run: Run, path: Path):
    """Put a run back to where `save_checkpoint` left it. Raises ValueError where the checkpoint does not fit."""
    model = run.bare_model
    try:
        state = json.loads((path / "training_state.json").read_text())
        tensors = load_file(path / "training_state.safetensors")
        config = json.loads((path / "config.json").read_text())
        weights = load_file(path / "model.safetensors")
    except Exception as error:
        raise ValueError(f"The checkpoint {path} is damaged: {error}") from None
    check_fits(run, path, state, config, len(tensors.get("random", ())))
    model.load_state_dict(weights)
    unpack_state(run, state, tensors)
    torch.set_rng_state(tensors["random"][run.accelerator.process_index].clone())
    if "random_cuda" in tensors and run.accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random_cuda"][run.accelerator.process_index].clone())
    for name, value in state["progress"].items():
        setattr(run.progress, name, value)


def check_fits(run: Run, path: Path, state: dict, config: dict, processes: int):
    """Raise ValueError unless a checkpoint is of this model, of this number of processes and these optimizers."""
    if state.get("format") != STATE_FORMAT:
        raise ValueError(f"The checkpoint {path} has format {state.get('format')}, and this version reads {STATE_FORMAT}.")
    own = json.loads(run.bare_model.config.to_json_string(use_diff=False))
    changed = [k for k in sorted(own) if k in config and config[k] != own[k] and k not in _NOT_COMPARED]
    if changed:
        pairs = ", ".join(f"{k} {config[k]!r} there and {own[k]!r} here" for k in changed)
        raise ValueError(f"The checkpoint {path} is of another model: {pairs}.")
    if processes != run.accelerator.num_processes:
        raise ValueError(f"The checkpoint {path} was written by {processes} process(es), not {run.accelerator.num_processes}.")
    other = [f"{k} {v!r} there and {run.data.get(k)!r} here" for k, v in state["data"].items() if run.data.get(k) != v]
    if other:
        raise ValueError(f"The checkpoint {path} was trained on other data or batches: {', '.join(other)}.")
    if len(state["optimizers"]) != len(run.optimizers) or ("ema_step" in state) != (run.ema is not None):
        raise ValueError(f"The checkpoint {path} was written with another --optimizer or --use_ema.")


def unpack_state(run: Run, state: dict, tensors: dict):
    """What `pack_state` packed, back where it belongs."""
    for number, (optimizer, groups) in enumerate(zip(run.optimizers, state["optimizers"])):
        prefix = f"optimizer.{number}."
        values: dict = {}
        for name in (n for n in tensors if n.startswith(prefix)):
            index, key = name[len(prefix) :].split(".")
            values.setdefault(int(index), {})[key] = tensors[name]
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    for scheduler, saved in zip(run.schedulers, state["schedulers"]):
        scheduler.load_state_dict({**saved, "lr_lambdas": [None] * len(saved["base_lrs"])})
    if run.ema is not None:
        run.ema.optimization_step = state["ema_step"]
        run.ema.shadow_params = [tensors[f"ema.{i}"].to(p.device) for i, p in enumerate(run.ema.shadow_params)]
    if run.accelerator.scaler is not None and "scaler" in state:
        run.accelerator.scaler.load_state_dict(state["scaler"])


_NOT_COMPARED = {"transformers_version", "architectures", "auto_map", "dtype", "scaling_factor", "_name_or_path"}


def save_model(model, folder: Path, dtype: str = "float32"):
    """`save_pretrained`, with floating-point weights stored as `dtype`; config.json says float32, so they load as that.

    What the model keeps in float32, such as a codebook, is stored as float32.
    """
    model.save_pretrained(folder)
    if dtype != "float32":
        path, exact = folder / "model.safetensors", set(model._keep_in_fp32_modules_strict or ())
        stored = load_file(path)
        rounded = [name for name, value in stored.items() if value.is_floating_point() and not exact & set(name.split("."))]
        stored |= {name: stored[name].to(getattr(torch, dtype)) for name in rounded}
        save_file(stored, path, metadata={"format": "pt"})
