"""What several processes of a training do together, and how all of them stop where one is asked to."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import distributed

from ..errors import UserError, first_line, is_full_disk

LONGEST_WAIT = timedelta(hours=24)
"""How long processes wait for one that validates, encodes or saves; one that died ends them at once."""
LOOK_EVERY = 1.0
"""Seconds between two looks of several processes at whether one of them was asked to stop."""
SAME_REQUEST = 2.0
"""Seconds in which a second SIGTERM belongs to the first: a cluster signals a process, and so does its launcher."""


def on_main(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run `action` on the main process, while the others wait. An error that the user can mend ends all of them."""
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except (UserError, OSError, SafetensorError) as error:
            if not isinstance(error, UserError) and not is_full_disk(error):
                raise
            problem = [first_line(error)]
            broadcast_object_list(problem)
            raise
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


class StopRequest:
    """Notes SIGTERM, with which clusters announce that they take a machine away. A second one ends at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.processes, self.asked_at = accelerator.num_processes, 0.0
        self.before: Any = None
        self.next_look, self.looked = 0, (0, time.monotonic())
        self.group: Any = None
        self.launcher: int | None = None

    def listen(self) -> None:
        """Begin to note signals; all processes call this at the same point."""
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._receive) or signal.SIG_DFL
        self.launcher = launcher()
        if self.processes > 1 and self.group is None:
            # numbers on the CPU, so that no look waits for the device
            self.group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def ignore(self) -> None:
        """Leave signals to whoever had them before."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked_at and now - self.asked_at > SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked_at = self.asked_at or now

    @property
    def asked(self) -> bool:
        """Whether this process was asked, or was left behind by a launcher that was."""
        return bool(self.asked_at) or (self.launcher is not None and os.getppid() != self.launcher)

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after this step: one of them was asked. They look at the same steps, about once a
        second."""
        if self.processes == 1:
            return self.asked
        if step < self.next_look:
            return False
        (last, then), now = self.looked, time.monotonic()
        seen = torch.tensor([float(self.asked), (now - then) / max(step - last, 1)], dtype=torch.float64)
        distributed.all_reduce(seen, distributed.ReduceOp.MAX, group=self.group)
        asked, seconds = seen.tolist()
        self.looked, self.next_look = (step, now), step + min(max(int(LOOK_EVERY / max(seconds, 1e-3)), 1), 1000)
        return bool(asked)


def launcher() -> int | None:
    """The parent process, where that is `accelerate launch`, which passes no signals on to a single process."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no Linux
        return None
    return os.getppid() if b"accelerate" in command and b"launch" in command else None
