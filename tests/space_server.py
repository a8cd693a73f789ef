"""The Space in a process of its own, for the tests and the benchmark."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "spaces" / "hf-ae" / "app.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def running_space(seconds: float = 120, app: Path = APP, **environment: str):
    """The address of a Space that answers."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tempfile.TemporaryFile("w+")  # noqa: SIM115
    env = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    } | environment
    process = subprocess.Popen([sys.executable, app], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise RuntimeError(f"The Space does not start:\n{log.read()[-3000:]}")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
