"""Other Python processes. Each takes seconds to import torch, so tests share them where they can."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

STRANGER = """
import sys
sys.modules["hf_ae"] = None  # from here on `import hf_ae` raises ImportError
"""
"""The first lines of a program where hf_ae is not installed."""


def environment(**more: str) -> dict[str, str]:
    """That of this process with changes; one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def run_python(code: str, *arguments: object, cwd: str | Path = "/", **more: str) -> str:
    """What a program prints that runs in a process of its own, away from the checkout; it must end well."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment(**more), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run_ranks(processes: int, *command: object) -> list[str]:
    """Run `python *command` in so many processes that accelerate joins, as torchrun would; what each prints."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        children = []
        for rank in range(processes):
            ranks = dict(place, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
            out, err = (stack.enter_context(open(f"{folder}/{rank}.{kind}", "w")) for kind in ("out", "err"))
            env = environment(**ranks) if processes > 1 else environment()
            child = subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=out, stderr=err)
            children.append(child)
            stack.callback(child.kill)
        codes = [child.wait(240) for child in children]
        printed = [
            [Path(f"{folder}/{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(processes)
        ]
    assert codes == [0] * processes, "\n".join(err[-3000:] for _, err in printed)
    return [out for out, _ in printed]
