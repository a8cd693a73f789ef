"""Flags and recipes of the training scripts, and where their results go."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

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
    "lr_warmup_steps": 0, "learning_rate": 0, "discriminator_learning_rate": 0, "weight_decay": 0, "ema_decay": 0, "max_grad_norm": 0,
    "seed": 0,
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
    optimizer: str = flag("adamw", "adamw, or muon (Muon for matrices and convolution kernels, AdamW for the rest).")
    discriminator_learning_rate: float | None = flag(None, "Highest learning rate of a discriminator, by AdamW; default: learning_rate.")
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
            kinds = (
                (int, float)
                if name in ("learning_rate", "discriminator_learning_rate", "weight_decay", "ema_decay", "max_grad_norm")
                else int
            )
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not value >= least):
                what = "a number" if kinds is not int else "a whole number"
                raise ValueError(f"{name}={value!r} must be {what} of at least {least}.")


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


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a model of this family, a text-to-image pipeline or checkpoints of a run."""
    try:
        if (folder / "model_index.json").is_file():
            return "TextToImagePipeline" in json.loads((folder / "model_index.json").read_text()).get("_class_name", "")
        config = json.loads((folder / "config.json").read_text())
        return str(config.get("model_type", "")).startswith("hf_ae_")
    except (OSError, ValueError):
        return any(folder.glob("checkpoint-*/training_state.json")) or (folder / ".hf_ae_run").exists()


def write_recipe(args, path: Path):
    """The flags that differ from their defaults, as a recipe that trains the same model again."""
    machine = {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "report_to",
    }
    kept = {}
    for spec in dataclasses.fields(args):
        value = getattr(args, spec.name)
        if spec.name not in machine and (value != spec.default or spec.name == "model_type"):
            kept[spec.name] = value
    path.write_text(yaml.safe_dump(kept, sort_keys=False))


def trackable(args) -> dict:
    """Arguments as trackers take them."""
    return {k: str(v) if isinstance(v, dict) else v for k, v in dataclasses.asdict(args).items() if v is not None}
