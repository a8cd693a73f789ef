"""Where a training puts its results: a folder that is new, or an earlier run to replace or to go on with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..errors import UserError, require

ADAPTERS = "pytorch_lora_weights.safetensors"
"""The name that diffusers' load_lora_weights looks for."""
RUN_MARK = ".hf_ae_run"
"""A file that says that a folder holds an unfinished run."""
LOCK = f"{RUN_MARK}.lock"
"""A file that names the process which writes into a folder now."""


def check_request(args: Any, questions: dict[str, str]) -> Path | None:
    """Raise ValueError for what cannot work, before anything is loaded; returns the checkpoint to go on from.

    `questions`: flag that must be given -> what to ask where it is not.
    """
    for name, question in {
        "dataset_name": "Which dataset? Write --dataset_name with a Hub id or a folder.",
        **questions,
    }.items():
        require(getattr(args, name) is not None, question)
    folder = Path(args.output_dir)
    check_output_dir(folder, args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    return find_checkpoint(args.resume_from_checkpoint, folder)


def check_output_dir(folder: Path, overwrite: bool, resume: bool) -> None:
    """Raise ValueError unless `folder` is new, holds only a recipe, or is ours and may be replaced or continued."""
    require(not folder.exists() or folder.is_dir(), f"The output folder {folder} is a file.")
    check_free(read_owner(folder), folder)
    inside = {p.name for p in folder.iterdir() if not p.name.startswith(".writable-")} if folder.exists() else set()
    started = bool(inside - {"recipe.yaml", RUN_MARK, LOCK, "logs"})
    first = min(inside, default="")
    ours = not started or is_run(folder)
    require(
        ours, f"The output folder {folder} holds files that are not ours ({first}, …): choose another --output_dir."
    )
    over = resume and (folder / "model.safetensors").exists() and not (checkpoints(folder) or overwrite)
    advice = "add --overwrite_output_dir to train anew"
    require(not over, f"The run in {folder} is finished and has no checkpoint to go on from: {advice}.")
    require(
        not started or overwrite or resume,
        f"The output folder {folder} holds an earlier run: continue it with --resume_from_checkpoint latest, replace "
        "it with --overwrite_output_dir, or choose another --output_dir.",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be written: {error.strerror}.") from error


def take_lock(folder: Path) -> None:
    """Note this process as the one that writes into the folder. Raises ValueError, naming it, where another one
    does."""
    with open(folder / LOCK, "a+") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # not every network drive can; two may then begin in the same instant
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        check_free(parse_owner(file.read()), folder)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "begun": begun(os.getpid())}))


def release_lock(folder: Path) -> None:
    """Remove the lock of this process."""
    (folder / LOCK).unlink(missing_ok=True)


def read_owner(folder: Path) -> dict[str, Any]:
    """Which process writes into the folder, by its lock."""
    return parse_owner((folder / LOCK).read_text()) if (folder / LOCK).is_file() else {}


def parse_owner(text: str) -> dict[str, Any]:
    """What a lock says: pid, host and begun; {} where it says nothing."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host", "begun"} <= set(owner) else {}


def check_free(owner: dict[str, Any], folder: Path) -> None:
    """Raise ValueError where the owner of a lock is at work, or on a machine where nobody here can tell."""
    if not owner:
        return
    here, pid = owner["host"] == socket.gethostname(), owner["pid"]
    where = f"process {pid} on {owner['host']}"
    advice = "wait for it or stop it" if here else f"if that is over, remove {folder / LOCK}"
    at_work = not here or (is_alive(pid) and begun(pid) == owner["begun"])
    require(not at_work, f"Another training writes into {folder} ({where}): {advice}, or choose another --output_dir.")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def begun(pid: int) -> str:
    """When a process began, in ticks since the machine did: numbers of processes come again, in containers soon. Empty
    where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder to write into before what is written goes to its place; removed afterwards, on errors too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a model of this family, a text-to-image pipeline, adapters or checkpoints of a run."""
    if (folder / ADAPTERS).is_file():
        return True
    try:
        if (folder / "model_index.json").is_file():
            return "TextToImagePipeline" in json.loads((folder / "model_index.json").read_text()).get(
                "_class_name", ""
            )
        config = json.loads((folder / "config.json").read_text())
        return str(config.get("model_type", "")).startswith("hf_ae_")
    except (OSError, ValueError):
        return any(folder.glob("checkpoint-*/training_state.json")) or (folder / RUN_MARK).exists()


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest step first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "training_state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def find_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """The checkpoint to go on from: a path, or the newest ('latest'; None where there is none yet). Raises
    ValueError."""
    if wanted is None:
        return None
    newest = next(reversed(checkpoints(folder)), None)
    if wanted == "latest":
        return newest
    path = Path(wanted)
    older = newest is not None and path.resolve().parent == folder.resolve() and path.name != newest.name
    require(not older, f"{folder} holds the newer {newest and newest.name}: go on from that, or move it away first.")
    there = (path / "training_state.json").is_file()
    advice = "Write 'latest' or a folder checkpoint-STEP"
    require(there, f"{path} is no checkpoint: training_state.json is missing. {advice}.")
    return path


def begin_run(folder: Path, replace: bool) -> None:
    """Mark the folder as a run's; remove what an earlier run left there if it is to be replaced."""
    (folder / RUN_MARK).touch()
    for cut_off in folder.glob(".partial-*"):
        shutil.rmtree(cut_off, ignore_errors=True)
    for old in [*checkpoints(folder), folder / "samples"] if replace else []:
        shutil.rmtree(old, ignore_errors=True)
    for file in (ADAPTERS, "model_index.json") if replace else ():  # by which a folder is known
        (folder / file).unlink(missing_ok=True)


def end_run(folder: Path) -> None:
    """The folder now holds a finished model."""
    (folder / RUN_MARK).unlink(missing_ok=True)
