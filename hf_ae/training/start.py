"""How a training begins and ends: its accelerator, the lock of its folder, and a program that is left as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from transformers.utils import logging

from ..errors import require, user_input
from .arguments import TrainingArguments
from .output_folder import release_lock, take_lock
from .precision import precision, precision_in_words
from .processes import LONGEST_WAIT, on_main


@contextlib.contextmanager
def training(args: TrainingArguments) -> Iterator[Accelerator]:
    """The accelerator of a training that alone writes `args.output_dir`. Raises ValueError.

    When it is over, however it ends, random numbers and progress bars of the program go on as before.
    """
    with as_before(), locked(accelerator := make_accelerator(args), Path(args.output_dir)):
        yield accelerator


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Keeps random states and transformers' progress bars of the program for afterwards; no such bars inside."""
    bars, python, numpy = logging.is_progress_bar_enabled(), random.getstate(), np.random.get_state()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def locked(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """No other training writes into the folder inside; the main process holds the lock."""
    main = accelerator.is_main_process
    accelerator.wait_for_everyone()  # each process has looked into the folder before
    on_main(accelerator, lambda: take_lock(folder))
    try:
        yield
    finally:
        if main:
            release_lock(folder)


def make_accelerator(args: TrainingArguments) -> Accelerator:
    """The accelerator, with the tracker that `args.report_to` names. Raises ValueError where that is not installed,
    and for ways to train that would leave the weights as they are."""
    tracks = args.report_to != "none"
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        require(not parse_flag_from_env(f"ACCELERATE_USE_{plugin}"), no_plugin(plugin))
    with user_input():
        accelerator = Accelerator(
            mixed_precision=precision(args),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to if tracks else None,
            project_dir=Path(args.output_dir) / "logs",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    parts = DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM
    require(accelerator.distributed_type not in parts, no_plugin(str(accelerator.distributed_type.value)))
    there = not tracks or accelerator.log_with
    require(there, f"report_to={args.report_to!r} needs that tracker: pip install {args.report_to}")
    accelerator.print(f"Precision: {precision_in_words(args, accelerator)}.")
    return accelerator


def no_plugin(name: str) -> str:
    """What is said of a plugin of accelerate that splits a model up."""
    return f"{name} is not supported: the optimizers would not see its weights. Use several processes without it."
