"""The code that a pipeline folder carries, so that it loads where hf_ae is not installed."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIBLING_IMPORT = re.compile(r"^from \.(\w+) import (?:\([^)]*\)|.*)\n", re.M)
FUTURE = "from __future__ import annotations\n"
HEAD = f'"""Modules of hf_ae, joined into one file: change them there."""\n\n{FUTURE}'


def siblings(module: Path) -> list[Path]:
    """What a module imports from its folder, there or not."""
    return [module.with_name(f"{name}.py") for name in SIBLING_IMPORT.findall(module.read_text())]


def in_order(module: Path) -> list[Path]:
    """A module after all that it imports from its folder, each once; those that are not there are left out."""
    if not module.is_file():
        return []
    before = [path for sibling in siblings(module) for path in in_order(sibling)]
    return list(dict.fromkeys([*before, module]))


def bundle(module: Path) -> str:
    """A module and what it imports from its folder, as one file; a file that was joined before, as it is.

    The modules may not define a name twice.
    """
    if module.read_text().startswith(HEAD):
        return module.read_text()
    parts = [
        f"# {path.name}\n\n{SIBLING_IMPORT.sub('', path.read_text().replace(FUTURE, ''))}" for path in in_order(module)
    ]
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n\n".join([HEAD, *parts]))


def carries_code(cls: type) -> bool:
    """Whether a component's class is one of hf_ae's, installed or from a repository."""
    model_type = getattr(getattr(cls, "config_class", None), "model_type", "")
    return str(model_type).startswith("hf_ae_") or cls.__name__ == "CaptionPrior"


def code_files(folder: Path, pipeline: type | None, parts: Mapping[str, type | None]) -> dict[str, str]:
    """path -> content of what a pipeline folder holds of hf_ae: the code of the pipeline and of the components whose
    class carries code, and the JSON files that name it. Paths of this machine are left out of them."""
    index, files = json.loads((folder / "model_index.json").read_text()), {}
    index.pop("_name_or_path", None)
    if pipeline is not None:
        index["_class_name"], files["pipeline.py"] = ["pipeline", pipeline.__name__], bundle(file_of(pipeline))
    for part, cls in parts.items():
        path = folder / part / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        changed = config.pop("_name_or_path", None) is not None
        if cls is not None and carries_code(cls):
            module = file_of(cls)
            stem = f"modeling_{config['model_type']}" if "model_type" in config else module.stem
            index[part], files[f"{part}/{stem}.py"] = [stem, cls.__name__], bundle(module)
            if "model_type" in config:
                classes = {"AutoConfig": cls.config_class, "AutoModel": cls}  # type: ignore[attr-defined]
                config["auto_map"] = {auto: f"{part}/{stem}.{kind.__name__}" for auto, kind in classes.items()}
                changed = True
        if changed:
            files[f"{part}/config.json"] = as_json(config)
    return {"model_index.json": as_json(index), **files}


def write_code(folder: Path, files: Mapping[str, str]) -> None:
    """Write what `code_files` made, instead of all code that lies beside those components."""
    for file in files:
        if file.endswith(".py") and "/" in file:  # save_pretrained of hf_ae's models leaves all their modules
            for path in (folder / file).parent.glob("*.py"):
                path.unlink()
    for file, text in files.items():
        (folder / file).write_text(text)


def file_of(cls: type) -> Path:
    """The file that defines a class."""
    return Path(inspect.getfile(cls))


def as_json(content: dict[str, Any]) -> str:
    """As transformers and diffusers write it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
