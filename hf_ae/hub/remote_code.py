"""The code that a repository carries, so that it loads where hf_ae is not installed.

A model folder holds the modules of `hf_ae/models` that its classes need, as `save_pretrained` copies them. A component
of a pipeline needs all of them in one file, since diffusers downloads only that one: see `pipelines/repo_code.py`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING

from ..errors import require
from ..models.image_processing import AutoencoderImageProcessor
from .files import read_json, to_json

SIBLING_IMPORT = re.compile(r"^from \.(\w+) import (?:\([^)]*\)|.*)\n", re.M)


def in_order(module: Path) -> list[Path]:
    """A module after all that it imports from its folder, each once; those that are not there are left out."""
    if not module.is_file():
        return []
    names = SIBLING_IMPORT.findall(module.read_text())
    before = [path for name in names for path in in_order(module.with_name(f"{name}.py"))]
    return list(dict.fromkeys([*before, module]))


def model_class(config: dict[str, Any]) -> Any:
    """The class of hf_ae that a config.json belongs to; None where it is not one of ours."""
    model_type = str(config.get("model_type", ""))
    ours = model_type.startswith("hf_ae_") and model_type in CONFIG_MAPPING
    return MODEL_MAPPING[CONFIG_MAPPING[model_type]] if ours else None


def module_of(cls: type) -> Path:
    """The file that defines a class."""
    return Path(inspect.getfile(cls))


def code_classes(folder: Path) -> dict[str, dict[str, type]]:
    """JSON file of a model folder -> Auto class -> class of hf_ae. Raises ValueError where the model is another."""
    model = model_class(read_json(folder / "config.json"))
    require(model is not None, f"The model in {folder} is not one of hf_ae's.")
    classes = {"config.json": {"AutoConfig": model.config_class, "AutoModel": model}}
    return classes | {"preprocessor_config.json": {"AutoImageProcessor": AutoencoderImageProcessor}}


def carried_code(folder: Path) -> list[Path]:
    """The modules that a model folder's JSON files name, and what these import; those that are there."""
    maps = [read_json(folder / name).get("auto_map", {}) for name in ("config.json", "preprocessor_config.json")]
    entries = {value.split(".")[0] for auto_map in maps for value in auto_map.values()}
    return list(dict.fromkeys(path for name in sorted(entries) for path in in_order(folder / f"{name}.py")))


def has_model_code(folder: Path) -> bool:
    """Whether all modules that a model folder needs are there, of whatever version."""
    maps = [read_json(folder / name).get("auto_map", {}) for name in ("config.json", "preprocessor_config.json")]
    needed = {value.split(".")[0] for auto_map in maps for value in auto_map.values()}
    for path in carried_code(folder):
        needed |= set(SIBLING_IMPORT.findall(path.read_text()))
    return all(maps) and all((folder / f"{name}.py").is_file() for name in needed)


def write_model_code(folder: Path) -> None:
    """Bring the code in a model folder up to this version of the package. Weights and other files stay."""
    for path in carried_code(folder):
        path.unlink()
    for file, classes in code_classes(folder).items():
        content = read_json(folder / file)
        content["auto_map"] = {auto: f"{module_of(cls).stem}.{cls.__name__}" for auto, cls in classes.items()}
        (folder / file).write_text(to_json(content))
        for cls in classes.values():
            for path in in_order(module_of(cls)):
                (folder / path.name).write_text(path.read_text())
