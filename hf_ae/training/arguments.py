"""Flags and recipes of the training scripts."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from ..errors import UserError, require

Arguments = TypeVar("Arguments")
SCHEDULES = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
)  # fmt: skip
LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "least": (operator.ge, "at least"), "above": (operator.gt, "more than"), "below": (operator.lt, "less than"),
}  # fmt: skip
"""Limit of a flag -> when a value keeps it, and how that is said."""
MACHINE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private",
    "report_to",
}  # fmt: skip
"""Flags that are no part of a recipe: they differ from machine to machine."""


PLACES = ("dataset_name", "pretrained_model", "pretrained_pipeline", "vae", "text_encoder", "model")
"""Flags that take a folder or a Hub id."""


def flag(
    default: Any, text: str, choices: tuple[Any, ...] = (), least: float | None = None, above: float | None = None,
    below: float | None = None,
) -> Any:  # fmt: skip
    """A dataclass field that is a command-line flag with this help text. `least` is the smallest number that it takes;
    others lie `above` or `below` a number that it does not take."""
    metadata = {
        "help": text.replace("%", "%%"), "accepted": choices, "least": least, "above": above, "below": below,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass
class TrainingArguments:
    """Flags of every training script; a recipe (YAML) holds the same keys and a flag overrides it."""

    dataset_name: str | None = flag(None, "Hub id of a dataset, or a local folder that load_dataset reads.")
    dataset_config_name: str | None = flag(None, "Configuration of the dataset, where it has several.")
    train_split: str = flag("train", "Split to train on.")
    eval_split: str | None = flag(None, "Split to measure on after each epoch; default: test or validation, if any.")
    max_train_samples: int | None = flag(None, "Use only the first of the training images.", least=1)
    max_eval_samples: int | None = flag(2000, "Use only the first of the evaluation images during training.", least=1)
    output_dir: str = flag("outputs", "Folder for the trained model, its checkpoints and samples.")
    overwrite_output_dir: bool = flag(
        False, "Train anew into a folder that holds an earlier run: its files are replaced."
    )
    train_batch_size: int = flag(128, "Images a process takes in each step.", least=1)
    num_train_epochs: int = flag(10, "Passes over the training images.", least=1)
    max_train_steps: int | None = flag(None, "Optimizer steps; overrides num_train_epochs.", least=1)
    learning_rate: float = flag(1e-3, "Highest learning rate.", least=0)
    lr_scheduler: str = flag("cosine", f"One of {', '.join(SCHEDULES)}.", choices=SCHEDULES)
    lr_warmup_steps: int = flag(0, "Steps over which the learning rate rises from 0.", least=0)
    optimizer: str = flag(
        "adamw",
        "adamw, or muon (Muon for matrices and convolution kernels, AdamW for the rest).",
        choices=("adamw", "muon"),
    )
    discriminator_learning_rate: float | None = flag(
        None, "Highest learning rate of a discriminator, by AdamW; default: learning_rate.", least=0
    )
    weight_decay: float = flag(0.0, "Decoupled weight decay.", least=0)
    gradient_accumulation_steps: int = flag(1, "Batches whose gradients are added up for one optimizer step.", least=1)
    max_grad_norm: float | None = flag(None, "Clip gradients to this norm; a discriminator's on their own.", above=0)
    mixed_precision: str | None = flag(
        None, "no, bf16 or fp16; default: what accelerate launch says.", choices=(None, "no", "bf16", "fp16")
    )
    gradient_checkpointing: bool = flag(False, "Compute activations again in the backward pass, to save memory.")
    use_ema: bool = flag(False, "Keep a moving average of the weights, evaluate it and publish it.")
    ema_decay: float = flag(0.999, "Decay of the moving average.", least=0, below=1)
    checkpointing_steps: int | None = flag(None, "Save a checkpoint every so many steps.", least=1)
    checkpoints_total_limit: int | None = flag(2, "Keep only the newest checkpoints.", least=1)
    resume_from_checkpoint: str | None = flag(None, "Path of a checkpoint, or 'latest' in output_dir.")
    validation_epochs: int = flag(1, "Measure and draw samples every so many epochs; 0: never.", least=0)
    logging_steps: int = flag(50, "Report the loss every so many steps.", least=1)
    report_to: str = flag(
        "none", "tensorboard, trackio, wandb, or none.", choices=("none", "tensorboard", "trackio", "wandb")
    )
    seed: int = flag(0, "Seed of initial weights, order of the data and noise.", least=0)
    save_dtype: str = flag(
        "float32",
        "Storage of the final weights: float32, float16 or bfloat16. They load as float32.",
        choices=("float32", "float16", "bfloat16"),
    )
    push_to_hub: bool = flag(False, "Upload the final folder, with its card.")
    hub_model_id: str | None = flag(None, "Repository to push to; default: the folder's name in your namespace.")
    hub_private: bool = flag(False, "Make the repository private when it is created.")

    def __post_init__(self) -> None:
        for name in PLACES:
            if isinstance(place := getattr(self, name, None), str):
                setattr(self, name, local_or_id(place))
        for spec in dataclasses.fields(self):
            value, accepted = getattr(self, spec.name), spec.metadata["accepted"]
            listed = ", ".join(str(choice) for choice in accepted if choice is not None)
            good = not accepted or value in accepted
            require(good, f"{spec.name}={value!r} is not known: write one of {listed}.")
            limits = {name: spec.metadata[name] for name in LIMITS if spec.metadata[name] is not None}
            if limits and value is not None:
                real = "float" in str(spec.type)
                good = isinstance(value, int | float if real else int) and not isinstance(value, bool)
                good = good and all(LIMITS[name][0](value, limit) for name, limit in limits.items())
                what = " and ".join(f"{LIMITS[name][1]} {limit}" for name, limit in limits.items())
                kind = "a number" if real else "a whole number"
                require(good, f"{spec.name}={value!r} must be {kind} of {what}.")


def local_or_id(name: str | Path) -> str:
    """The name of a dataset or model; that of a relative folder with ./ before it, so that nobody, from whatever other
    folder, takes it for a Hub id."""
    text = str(name)
    return f"./{text}" if Path(text).exists() and not text.startswith((".", "/", "~")) else text


def parse_arguments(cls: type[Arguments], argv: list[str]) -> Arguments:
    """`[RECIPE.yaml] [--flag value …]` -> an instance of the dataclass `cls`. Raises ValueError for an unknown key."""

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(f"{message[0].upper()}{message[1:]}. See --help.")

        def add_argument(self, *names: str, accepted: object = None, **options: Any) -> Any:
            options = {name: value for name, value in options.items() if name not in LIMITS}
            return super().add_argument(*names, **options)  # the dataclass checks the limits

    parser = Parser(cls, description=(cls.__doc__ or "").strip(), allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("recipe", nargs="?", help="YAML file with the same keys; flags override it")
    known, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-")]:
        parser.error(f"unknown flag {unknown[0]}")
    if known.recipe:
        keys = {spec.name for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
        parser.set_defaults(**read_recipe(Path(known.recipe), keys))
    values = vars(parser.parse_args(argv))
    values.pop("recipe")
    return cls(**values)


def read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """Keys and values of a recipe file. Raises ValueError."""
    require(path.exists(), f"The recipe {path} does not exist.")
    require(path.is_file(), f"The recipe {path} is a folder: name the YAML file in it.")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe {path} is no text file: a recipe is YAML.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe {path} is not valid YAML: {error}") from error
    require(isinstance(recipe, dict), f"The recipe {path} holds no keys: write lines such as learning_rate: 0.001.")
    unknown = sorted(set(recipe) - known)
    require(not unknown, f"The recipe {path} holds keys that are no flags: {', '.join(unknown)}. See --help.")
    return recipe


def write_recipe(args: Any, path: Path) -> None:
    """The flags that differ from their defaults, as a recipe that trains the same model again."""
    values = {spec.name: (getattr(args, spec.name), spec.default) for spec in dataclasses.fields(args)}
    kept = {k: v for k, (v, default) in values.items() if k not in MACHINE and (v != default or k == "model_type")}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))


def parse_overrides(text: str | dict[str, Any] | None) -> dict[str, Any]:
    """`"latent_dim=16,hidden_sizes=[512, 256]"` (or a mapping, in a recipe) -> fields of a configuration."""
    if not text:
        return {}
    if isinstance(text, dict):
        return {name: _to_float(value) for name, value in text.items()}
    fields = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.partition("=")
        require(equals, f"config_overrides: {part.strip()!r} has no '='; write name=value,name=[1, 2].")
        try:
            fields[name.strip()] = _to_float(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UserError(f"config_overrides: {part.strip()!r} is not valid YAML behind its '='.") from error
    return fields


def _to_float(value: Any) -> Any:
    """YAML reads 1e-6 as a string; people mean the number."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value)
    return float(value) if is_number else value
