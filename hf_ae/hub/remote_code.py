"""The code that a repository carries, so that it loads where hf_ae is not installed.

A model folder holds the modules of `hf_ae/models` that its classes need, as `save_pretrained` copies them. A component
of a pipeline needs all of them in one file, since diffusers downloads only that one: see `pipelines/repo_code.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING

from ..errors import require
from ..models.image_processing import AutoencoderImageProcessor
from .files import read_json, to_json


def model_class(config: dict[str, Any]) -> Any:
    """The class of hf_ae that a config.json belongs to; None where it is not one of ours."""
    model_type = str(config.get("model_type", ""))
    ours = model_type.startswith("hf_ae_") and model_type in CONFIG_MAPPING
    return MODEL_MAPPING[CONFIG_MAPPING[model_type]] if ours else None


def code_classes(folder: Path) -> dict[str, dict[str, type]]:
    """JSON file of a model folder -> Auto class -> class of hf_ae. Raises ValueError where the model is another."""
    model = model_class(read_json(folder / "config.json"))
    require(model is not None, f"The model in {folder} is not one of hf_ae's.")
    classes = {"config.json": {"AutoConfig": model.config_class, "AutoModel": model}}
    return classes | {"preprocessor_config.json": {"AutoImageProcessor": AutoencoderImageProcessor}}


def carried_code(folder: Path) -> list[Path]:
    """The modules that a model folder's JSON files name, and what these import; those that are there."""
    from ..pipelines.repo_code import in_order

    maps = [read_json(folder / name).get("auto_map", {}) for name in ("config.json", "preprocessor_config.json")]
    entries = {value.split(".")[0] for auto_map in maps for value in auto_map.values()}
    return list(dict.fromkeys(path for name in sorted(entries) for path in in_order(folder / f"{name}.py")))


def has_model_code(folder: Path) -> bool:
    """Whether all modules that a model folder needs are there, of whatever version."""
    from ..pipelines.repo_code import siblings

    maps = [read_json(folder / name).get("auto_map", {}) for name in ("config.json", "preprocessor_config.json")]
    needed = {folder / f"{value.split('.')[0]}.py" for auto_map in maps for value in auto_map.values()}
    for path in carried_code(folder):
        needed |= set(siblings(path))
    return all(maps) and all(path.is_file() for path in needed)


def write_model_code(folder: Path) -> None:
    """Bring the code in a model folder up to this version of the package. Weights and other files stay."""
    from ..pipelines.repo_code import file_of, in_order

    for path in carried_code(folder):
        path.unlink()
    for file, classes in code_classes(folder).items():
        content = read_json(folder / file)
        content["auto_map"] = {auto: f"{file_of(cls).stem}.{cls.__name__}" for auto, cls in classes.items()}
        (folder / file).write_text(to_json(content))
        for cls in classes.values():
            for path in in_order(file_of(cls)):
                (folder / path.name).write_text(path.read_text())
