"""Where a training puts its results: a folder that is new, or an earlier run to replace or to go on with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import UserError, require

RUN_MARK = ".hf_ae_run"
"""A file that says that a folder holds an unfinished run."""


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
    inside = {p.name for p in folder.iterdir() if not p.name.startswith(".writable-")} if folder.exists() else set()
    started = bool(inside - {"recipe.yaml", RUN_MARK, "logs"})
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


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a model of this family, a text-to-image pipeline or checkpoints of a run."""
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
    for cut_off in folder.glob(".partial-checkpoint-*"):
        shutil.rmtree(cut_off, ignore_errors=True)
    for old in [*checkpoints(folder), folder / "samples"] if replace else []:
        shutil.rmtree(old, ignore_errors=True)


def end_run(folder: Path) -> None:
    """The folder now holds a finished model."""
    (folder / RUN_MARK).unlink(missing_ok=True)
