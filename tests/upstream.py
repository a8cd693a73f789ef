"""Test suites of other projects, of the installed versions: fetched once into a folder that git ignores.

transformers' tests come in its source distribution, those of diffusers in its repository only: `DIFFUSERS_SOURCE`
names a checkout where github.com cannot be reached.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tarfile
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parent.parent / ".upstream"


def run(*command: str) -> None:
    """Run a command that needs the network; the test is skipped where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command[:4])}: no answer", allow_module_level=True)
    if done.returncode:
        said = (done.stderr.strip() or "failed").splitlines()[-1]
        pytest.skip(f"{' '.join(command[:4])}: {said}", allow_module_level=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time: several workers collect the same tests."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@alone()
def transformers_source() -> Path:
    """The unpacked source distribution of the installed transformers."""
    name = f"transformers-{version('transformers')}"
    if not (CACHE / name / "tests").is_dir():
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers")
        run(*pip, "--dest", str(CACHE), name.replace("-", "=="))
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return CACHE / name


@alone()
def diffusers_source() -> Path:
    """A checkout of diffusers at the tag of the installed version, or `DIFFUSERS_SOURCE`."""
    if given := os.environ.get("DIFFUSERS_SOURCE"):
        return Path(given)
    tag = f"v{version('diffusers')}"
    if not (CACHE / f"diffusers-{tag}" / "tests").is_dir():
        where = ("--branch", tag, "https://github.com/huggingface/diffusers", str(CACHE / f"diffusers-{tag}"))
        run("git", "clone", "--quiet", "--depth", "1", *where)
    return CACHE / f"diffusers-{tag}"


def excluded(suite: type, exclusions: dict[str, str]) -> type:
    """A suite without some of its tests, test name -> why; a name that the suite does not have is an error."""
    unknown = [name for name in exclusions if not hasattr(suite, name)]
    assert not unknown, f"{suite.__name__} has no {unknown}"
    return type(suite.__name__, (suite,), dict.fromkeys(exclusions))


def as_package(name: str, folder: Path) -> None:
    """Make the tests in `folder` importable as the package `name`, since every project calls its own `tests`."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
