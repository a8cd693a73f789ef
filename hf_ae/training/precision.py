"""Which precision a training computes in: bfloat16 only where the hardware has it."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from .arguments import TrainingArguments

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux says what a CPU can do."""


def precision(args: TrainingArguments) -> str | None:
    """The mixed precision to train in: what is asked for, but no bf16 on a CPU that would have to imitate it."""
    wanted = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return "no" if wanted == "bf16" and on_cpu and not has_bf16("cpu") else args.mixed_precision


def precision_in_words(args: TrainingArguments, accelerator: Accelerator) -> str:
    """What the log says."""
    used = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
    wanted = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    why = "" if wanted != "bf16" or used == "bfloat16" else ", not bf16, which this CPU has no instructions for"
    muon = "bfloat16" if has_bf16(accelerator.device.type) else "float32"
    return f"{used}{why}" + (f"; Muon in {muon}" if args.optimizer == "muon" else "")


def has_bf16(device: str) -> bool:
    """Whether a kind of device computes in bfloat16 itself. A CPU without such instructions takes many times as long
    as in float32."""
    return device != "cpu" or _cpu_has_bf16(CPUINFO)


@functools.cache
def _cpu_has_bf16(path: Path) -> bool:
    text = path.read_text() if path.is_file() else ""
    return re.search(r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b", text, re.M) is not None
