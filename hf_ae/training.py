"""What the training scripts share: flags and recipes, optimizers, checkpoints and exact resume, guards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser, get_scheduler

STATE_FORMAT = 1
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt")
CHOICES = {
    "lr_scheduler": SCHEDULES,
    "optimizer": ("adamw", "muon"),
    "mixed_precision": (None, "no", "bf16", "fp16"),
    "report_to": ("none", "tensorboard", "trackio", "wandb"),
    "save_dtype": ("float32", "float16", "bfloat16"),
}
AT_LEAST = {
    "train_batch_size": 1, "num_train_epochs": 1, "max_train_steps": 1, "gradient_accumulation_steps": 1, "logging_steps": 1,
    "checkpointing_steps": 1, "checkpoints_total_limit": 1, "max_train_samples": 1, "max_eval_samples": 1, "validation_epochs": 0,
    "lr_warmup_steps": 0, "learning_rate": 0, "weight_decay": 0, "ema_decay": 0, "max_grad_norm": 0, "seed": 0,
}  # fmt: skip
"""Smallest value of a number among the flags."""


def flag(default, text: str):
    """A dataclass field that is a command-line flag with this help text."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class TrainingArguments:
    """Flags of every training script; a recipe (YAML) holds the same keys and a flag overrides it."""

    dataset_name: str | None = flag(None, "Hub id of a dataset, or a local folder that load_dataset reads.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, where it has several.")
    train_split: str = flag("train", "Split to train on.")
    eval_split: str | None = flag(None, "Split to measure on after each epoch; default: test or validation, where there is one.")
    max_train_samples: int | None = flag(None, "Use only the first of the training images.")
    max_eval_samples: int | None = flag(2000, "Use only the first of the evaluation images during training.")
    output_dir: str = flag("outputs", "Folder for the trained model, its checkpoints and samples.")
    overwrite_output_dir: bool = flag(False, "Train anew into a folder that holds an earlier run: its files are replaced.")
    train_batch_size: int = flag(128, "Images a process takes in each step.")
    num_train_epochs: int = flag(10, "Passes over the training images.")
    max_train_steps: int | None = flag(None, "Optimizer steps; overrides num_train_epochs.")
    learning_rate: float = flag(1e-3, "Highest learning rate.")
    lr_scheduler: str = flag("cosine", f"One of {', '.join(SCHEDULES)}.")
    lr_warmup_steps: int = flag(0, "Steps over which the learning rate rises from 0.")
    optimizer: str = flag("adamw", "adamw, or muon (Muon for weight matrices, AdamW for the rest).")
    weight_decay: float = flag(0.0, "Decoupled weight decay.")
    gradient_accumulation_steps: int = flag(1, "Batches whose gradients are added up for one optimizer step.")
    max_grad_norm: float | None = flag(None, "Clip gradients to this norm.")
    mixed_precision: str | None = flag(None, "no, bf16 or fp16; default: what accelerate launch says.")
    gradient_checkpointing: bool = flag(False, "Compute activations again in the backward pass, to save memory.")
    use_ema: bool = flag(False, "Keep a moving average of the weights, evaluate it and publish it.")
    ema_decay: float = flag(0.999, "Decay of the moving average.")
    checkpointing_steps: int | None = flag(None, "Save a checkpoint every so many steps.")
    checkpoints_total_limit: int | None = flag(2, "Keep only the newest checkpoints.")
    resume_from_checkpoint: str | None = flag(None, "Path of a checkpoint, or 'latest' in output_dir.")
    validation_epochs: int = flag(1, "Measure and draw samples every so many epochs; 0: never.")
    logging_steps: int = flag(50, "Report the loss every so many steps.")
    report_to: str = flag("none", "tensorboard, trackio, wandb, or none.")
    seed: int = flag(0, "Seed of initial weights, order of the data and noise.")
    save_dtype: str = flag("float32", "Storage of the final weights: float32, float16 or bfloat16. They load as float32.")
    push_to_hub: bool = flag(False, "Upload the final folder, with its card.")
    hub_model_id: str | None = flag(None, "Repository to push to; default: the folder's name in your namespace.")
    hub_private: bool = flag(False, "Make the repository private when it is created.")

    def __post_init__(self):
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                listed = ", ".join(str(a) for a in accepted if a is not None)
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: write one of {listed}.")
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            kinds = (int, float) if name in ("learning_rate", "weight_decay", "ema_decay", "max_grad_norm") else int
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not value >= least):
                what = "a number" if kinds is not int else "a whole number"
                raise ValueError(f"{name}={value!r} must be {what} of at least {least}.")


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


@contextlib.contextmanager
def one_line_errors():
    """End the program with one line and exit code 2 on an error that the user can cause."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install 'hf_ae[eval]' {error.name}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# Flags and recipes


def parse_arguments(cls, argv: list[str]):
    """`[RECIPE.yaml] [--flag value …]` -> an instance of the dataclass `cls`. Raises ValueError for an unknown key."""

    class Parser(HfArgumentParser):
        def error(self, message):
            raise ValueError(f"{message[0].upper()}{message[1:]}. See --help.")

    parser = Parser(cls, description=(cls.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", help="YAML file with the same keys; flags override it")
    known, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown flag {unknown[0]}")
    recipe = known.recipe
    if recipe:
        parser.set_defaults(**read_recipe(Path(recipe), {f.name for f in dataclasses.fields(cls)}))
    values = vars(parser.parse_args(argv))
    values.pop("recipe")
    return cls(**values)


def read_recipe(path: Path, known: set[str]) -> dict:
    """Keys and values of a recipe file."""
    if not path.is_file():
        raise ValueError(f"The recipe {path} does not exist.")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {path} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict) or set(recipe) - known:
        unknown = ", ".join(sorted(set(recipe) - known)) if isinstance(recipe, dict) else "no keys"
        raise ValueError(f"The recipe {path} holds keys that are no flags: {unknown}. See --help.")
    return recipe


def parse_overrides(text: str | dict | None) -> dict:
    """`"latent_dim=16,hidden_sizes=[512, 256]"` (or a mapping, in a recipe) -> fields of a configuration."""
    if not text:
        return {}
    if isinstance(text, dict):
        return {name: _number(value) for name, value in text.items()}
    fields = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"config_overrides: {part.strip()!r} has no '='; write name=value,name=[1, 2].")
        fields[name.strip()] = _number(yaml.safe_load(value))
    return fields


def _number(value):
    """YAML reads 1e-6 as a string; people mean the number."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value) else value


# Where results go


def check_output_dir(folder: Path, overwrite: bool, resume: bool):
    """Raise ValueError unless `folder` is new, holds only a recipe, or is ours and may be replaced or continued."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output folder {folder} is a file.")
    inside = {p.name for p in folder.iterdir() if not p.name.startswith(".writable-")} if folder.exists() else set()
    started = bool(inside - {"recipe.yaml", ".hf_ae_run", "logs"})
    ours = not started or is_run(folder)
    if not ours:
        raise ValueError(f"The output folder {folder} holds files that are not ours ({sorted(inside)[0]}, …): choose another --output_dir.")
    if resume and (folder / "model.safetensors").exists() and not (checkpoints(folder) or overwrite):
        raise ValueError(f"The run in {folder} is finished and has no checkpoint to go on from: add --overwrite_output_dir to train anew.")
    if started and not (overwrite or resume):
        raise ValueError(
            f"The output folder {folder} holds an earlier run: continue it with --resume_from_checkpoint latest, replace it "
            "with --overwrite_output_dir, or choose another --output_dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be written: {error.strerror}.") from None


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a model of this family or checkpoints of a run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return str(config.get("model_type", "")).startswith("hf_ae_")
    except (OSError, ValueError):
        return any(folder.glob("checkpoint-*/training_state.json")) or (folder / ".hf_ae_run").exists()


# Optimizers


def make_optimizers(model, args: TrainingArguments) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (Jordan et al. 2024) for weight matrices with AdamW for everything else."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay, fused=fused)]
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim != 2]
    if not matrices:
        raise ValueError("optimizer='muon' needs weight matrices, and this network has none: write adamw.")
    muon = torch.optim.Muon(matrices, args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
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


# Checkpoints


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


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest step first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "training_state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint to go on from: a path, or the newest ('latest'; None where there is none yet)."""
    if wanted is None:
        return None
    newest = next(reversed(checkpoints(folder)), None)
    if wanted == "latest":
        return newest
    path = Path(wanted)
    if newest is not None and path.resolve().parent == folder.resolve() and path.name != newest.name:
        raise ValueError(f"{folder} holds the newer {newest.name}: go on from that, or move it away first.")
    if not (path / "training_state.json").is_file():
        raise ValueError(f"{path} is no checkpoint: training_state.json is missing. Write 'latest' or a folder checkpoint-STEP.")
    return path


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
    """`save_pretrained`, with floating-point weights stored as `dtype`; config.json says float32, so they load as that."""
    model.save_pretrained(folder)
    if dtype != "float32":
        path = folder / "model.safetensors"
        stored = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(stored, path, metadata={"format": "pt"})
