"""Checkpoints: the model as `from_pretrained` reads it, and the rest of a run's state as safetensors and JSON, no
pickle.

A run that goes on from one gives bit for bit the weights of an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import StoppedError, UserError, first_line, require
from .output_folder import checkpoints, scratch
from .processes import on_main
from .run import Run

STATE_FORMAT = 1
HONOURED = (
    "learning_rate", "discriminator_learning_rate", "weight_decay", "lr_scheduler", "lr_warmup_steps", "ema_decay",
    "max_grad_norm",
)  # fmt: skip
"""Flags that may change when a run goes on: they hold from there on."""
FIXED = ("optimizer", "pretrain_layerwise_epochs")
"""Flags that may not."""
RATES = ("weight_decay", "initial_lr")
"""What an optimizer has from the arguments, not from a checkpoint."""
NOT_COMPARED = {"transformers_version", "architectures", "auto_map", "dtype", "scaling_factor", "_name_or_path"}
"""Fields of a configuration that may differ between a checkpoint and the run that goes on from it."""


def keep(run: Run) -> None:
    """After a step: write a checkpoint where one is due. Raises StoppedError, after writing one in any case, where the
    run was asked to stop."""
    step, folder = run.progress.step, Path(run.args.output_dir)
    stopping = run.unfinished and run.stop.agreed(step)
    if stopping or run.every(run.args.checkpointing_steps):
        save_checkpoint(run)
    if stopping:
        said = f"SIGTERM at step {step}; go on with --output_dir {folder} --resume_from_checkpoint latest"
        raise StoppedError(said if run.accelerator.is_main_process else "")


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-STEP into the output folder. It appears under its name only when it is complete. All but the
    newest `checkpoints_total_limit` are removed. Raises NonFiniteLossError where a weight is not finite."""
    accelerator, step, model = run.accelerator, run.progress.step, run.bare_model
    run.guard.check()
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            run.guard.stop(f"At step {step} the weight {name} is not finite: no checkpoint was written.")
    tensors = {"random": accelerator.gather(torch.get_rng_state()[None].to(accelerator.device)).cpu()}
    if accelerator.device.type == "cuda":
        tensors["random_cuda"] = accelerator.gather(torch.cuda.get_rng_state()[None].to(accelerator.device)).cpu()
    on_main(accelerator, lambda: write_checkpoint(run, tensors))


def write_checkpoint(run: Run, tensors: dict[str, Tensor]) -> None:
    """The files of a checkpoint; `tensors` are the random states of all processes. Raises OSError or SafetensorError
    where the disk is full: earlier checkpoints are then still there."""
    state = {"format": STATE_FORMAT, "progress": dataclasses.asdict(run.progress), **pack_state(run, tensors)}
    folder, limit = Path(run.args.output_dir), run.args.checkpoints_total_limit
    target = folder / f"checkpoint-{run.progress.step}"
    with scratch(folder / f".partial-{target.name}") as partial:
        run.bare_model.save_pretrained(partial)
        save_file(tensors, partial / "training_state.safetensors")
        (partial / "training_state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    for old in checkpoints(folder)[:-limit] if limit else []:
        shutil.rmtree(old)


def settings(run: Run) -> dict[str, Any]:
    """What may change when a run goes on (HONOURED) and what may not (FIXED), as far as its script has such flags."""
    values = {name: getattr(run.args, name) for name in (*HONOURED, *FIXED) if hasattr(run.args, name)}
    return {**values, "steps": run.total_steps}


def pack_state(run: Run, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the state of optimizers and moving average into `tensors`; returns what JSON can hold of it."""
    state: dict[str, Any] = {"data": run.data, "settings": settings(run), "optimizers": [], "schedulers": []}
    for i, optimizer in enumerate(run.optimizers):
        saved = optimizer.state_dict()
        state["optimizers"].append(saved["param_groups"])
        for index, values in saved["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{i}.{index}.{key}"] = torch.as_tensor(value).cpu().contiguous()
    for scheduler in run.schedulers:
        state["schedulers"].append({k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"})
    if run.ema is not None:
        state["ema_step"] = run.ema.optimization_step
        tensors |= {f"ema.{i}": p.cpu().contiguous() for i, p in enumerate(run.ema.shadow_params)}
    if run.accelerator.scaler is not None:
        state["scaler"] = run.accelerator.scaler.state_dict()
    return state


def load_checkpoint(run: Run, path: Path) -> None:
    """Put a run back to where `save_checkpoint` left it. Raises ValueError where the checkpoint does not fit."""
    accelerator, rank = run.accelerator, run.accelerator.process_index
    try:
        state = json.loads((path / "training_state.json").read_text())
        tensors = load_file(path / "training_state.safetensors")
        config = json.loads((path / "config.json").read_text())
        weights = load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"The checkpoint {path} is damaged: {first_line(error)}") from error
    check_fits(run, path, state, config, len(tensors.get("random", ())))
    run.bare_model.load_state_dict(weights)
    unpack_state(run, state, tensors)
    torch.set_rng_state(tensors["random"][rank].clone())
    if "random_cuda" in tensors and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random_cuda"][rank].clone())
    for name, value in state["progress"].items():
        setattr(run.progress, name, value)
    accelerator.print(f"Going on from {path.name}.")
    changed = differences(state.get("settings", {}), settings(run))
    if changed:
        accelerator.print(f"From here on with other settings than the checkpoint's: {changed}.")


def check_fits(run: Run, path: Path, state: dict[str, Any], config: dict[str, Any], processes: int) -> None:
    """Raise ValueError unless a checkpoint is of this model, of this number of processes and these optimizers."""
    what, version, here = f"The checkpoint {path}", state.get("format"), run.accelerator.num_processes
    require(version == STATE_FORMAT, f"{what} has format {version}, and this version reads {STATE_FORMAT}.")
    own = json.loads(run.bare_model.config.to_json_string(use_diff=False))
    changed = differences({k: config[k] for k in sorted(own) if k in config and k not in NOT_COMPARED}, own)
    require(not changed, f"{what} is of another model: {changed}.")
    require(processes == here, f"{what} was written by {processes} process(es), not {here}.")
    changed = differences({**dict.fromkeys(run.data), **state["data"]}, run.data)  # what it lacks was not there yet
    require(not changed, f"{what} was trained on other data or batches: {changed}.")
    there = {name: value for name, value in state.get("settings", {}).items() if name in FIXED}
    changed = differences(there, settings(run))
    require(not changed, f"{what} cannot go on with other settings: {changed}.")
    same = len(state["optimizers"]) == len(run.optimizers) and ("ema_step" in state) == (run.ema is not None)
    require(same, f"{what} was written with another --optimizer or --use_ema.")


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs, in words."""
    return ", ".join(f"{k} {v!r} there and {here.get(k)!r} here" for k, v in there.items() if here.get(k) != v)


def unpack_state(run: Run, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What `pack_state` packed, back where it belongs; learning rates and weight decay are those of the run's own
    arguments."""
    for i, (optimizer, groups) in enumerate(zip(run.optimizers, state["optimizers"])):
        prefix = f"optimizer.{i}."
        values: dict[int, dict[str, Tensor]] = {}
        for name in (n for n in tensors if n.startswith(prefix)):
            index, key = name.removeprefix(prefix).split(".")
            values.setdefault(int(index), {})[key] = tensors[name]
        now = [{name: group[name] for name in RATES if name in group} for group in optimizer.param_groups]
        optimizer.load_state_dict({"state": values, "param_groups": groups})
        for group, rates in zip(optimizer.param_groups, now):
            group |= rates
    for scheduler, saved in zip(run.schedulers, state["schedulers"]):
        base_rates = scheduler.base_lrs
        scheduler.load_state_dict({**saved, "lr_lambdas": [None] * len(saved["base_lrs"]), "base_lrs": base_rates})
        current = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base_rates, scheduler.lr_lambdas)]
        scheduler._last_lr = current
        for group, rate in zip(scheduler.optimizer.param_groups, current):
            group["lr"] = rate
    if run.ema is not None:
        run.ema.optimization_step = state["ema_step"]
        run.ema.shadow_params = [tensors[f"ema.{i}"].to(p.device) for i, p in enumerate(run.ema.shadow_params)]
    if run.accelerator.scaler is not None and "scaler" in state:
        run.accelerator.scaler.load_state_dict(state["scaler"])


def save_model(model: Any, folder: Path, dtype: str = "float32") -> None:
    """`save_pretrained`, with floating-point weights stored as `dtype`; config.json says float32, so they load as
    that.

    What the model keeps in float32, such as a codebook, is stored as float32. Files in the folder are replaced only
    when all new ones are written.
    """
    with scratch(folder / ".partial-model") as partial:
        model.save_pretrained(partial)
        if dtype != "float32":
            path, exact = partial / "model.safetensors", set(model._keep_in_fp32_modules_strict or ())
            stored = load_file(path)
            rounded = [n for n, value in stored.items() if value.is_floating_point() and not exact & set(n.split("."))]
            stored |= {name: stored[name].to(getattr(torch, dtype)) for name in rounded}
            save_file(stored, path, metadata={"format": "pt"})
        for path in partial.iterdir():
            os.replace(path, folder / path.name)
