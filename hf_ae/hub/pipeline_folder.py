"""A diffusers pipeline with models of ours inside, as a folder that loads with and without hf_ae.

```
model_index.json            _class_name: ["pipeline", "TextToImagePipeline"]; vae: ["modeling_hf_ae_vae", "VAEModel"]
pipeline.py                 a copy of pipelines/text_to_image.py
prior/pipeline.py           the same copy, if there is a prior: diffusers wants the code of a component in its folder
vae/modeling_hf_ae_vae.py   the modules that the VAE needs, in one file: diffusers takes only that one from the Hub
vae/ unet/ tokenizer/ ...   what each component's own save_pretrained writes
```
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from transformers import CONFIG_MAPPING, MODEL_MAPPING


def save_pipeline(pipe, folder, dtype: str = "float32"):
    """Write a complete pipeline folder, without its card. Weights are stored as `dtype` and load as what they are in `pipe`."""
    folder, stored = Path(folder), getattr(torch, dtype)
    pipe.register_modules(**pipe.components)  # else diffusers leaves out what was assigned where there was nothing
    pipe.save_pretrained(folder)
    for name in components(folder):
        for path in (folder / name).glob("*.safetensors"):
            tensors = load(path.read_bytes())  # into memory: the file is replaced
            save_file({name: compact(tensor, stored) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    write_code(folder)


def compact(tensor: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """As `stored`; matrices that `round_matrices` rounded to float8 are stored so, which loses nothing. Integers stay."""
    if not tensor.is_floating_point():
        return tensor
    small = tensor.to(torch.float8_e4m3fn)
    return small if tensor.ndim == 2 and torch.equal(small.to(tensor.dtype), tensor) else tensor.to(stored)


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of each component that model_index.json lists."""
    index = read_json(folder / "model_index.json")
    listed = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list)}
    return {k: (v[0], v[1]) for k, v in listed.items() if len(v) == 2 and v[0] and v[1]}


def write_code(folder: Path):
    """Bring the code in a pipeline folder up to this version of the package. The weights stay."""
    files = code_files(folder)
    for file in files:
        if file.endswith(".py") and "/" in file:  # save_pretrained of our models leaves all their modules
            for path in (folder / file).parent.glob("*.py"):
                path.unlink()
    for file, text in files.items():
        (folder / file).write_text(text)


def has_code(folder: Path) -> bool:
    """Whether all code is there, of whatever version, and the JSON files name it."""
    files = {folder / file: text for file, text in code_files(folder).items()}
    return all(path.is_file() and (path.suffix == ".py" or path.read_text() == text) for path, text in files.items())


def code_files(folder: Path) -> dict[str, str]:
    """path -> content of what a pipeline folder holds of ours: the code, and the JSON files that name it."""
    index, files = read_json(folder / "model_index.json"), {}
    index.pop("_name_or_path", None)  # diffusers notes paths of the machine at hand
    class_name = index.get("_class_name", "")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if source := pipeline_source(class_name):
        index["_class_name"], files["pipeline.py"] = ["pipeline", class_name], source
    for name, (_, cls_name) in components(folder).items():
        config = read_json(folder / name / "config.json")
        if source and f"\nclass {cls_name}(" in source:
            index[name], files[f"{name}/pipeline.py"] = ["pipeline", cls_name], source
        model_type = config.get("model_type", "")
        if model_type.startswith("hf_ae_") and model_type in CONFIG_MAPPING:
            model: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
            module = f"modeling_{model_type}"
            index[name] = [module, model.__name__]
            classes = {"AutoConfig": model.config_class, "AutoModel": model}
            config["auto_map"] = {auto: f"{name}/{module}.{cls.__name__}" for auto, cls in classes.items()}
            files |= {f"{name}/config.json": to_json(config), f"{name}/{module}.py": bundle(Path(inspect.getfile(model)))}
        elif config.pop("_name_or_path", None):
            files[f"{name}/config.json"] = to_json(config)
    return {"model_index.json": to_json(index), **files}


def read_json(path: Path) -> dict:
    """The file's content, {} where there is none. Raises ValueError where it is broken."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object.")
    return content


def to_json(content: dict) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def pipeline_source(class_name: str) -> str | None:
    """The file of `hf_ae.pipelines` that defines a class; None for a class of diffusers."""
    import diffusers

    package = importlib.util.find_spec("hf_ae.pipelines")
    paths = [p for place in (package and package.submodule_search_locations) or [] for p in Path(place).glob("*.py")]
    source = next((text for text in map(Path.read_text, paths) if re.search(rf"^class {class_name}\(", text, re.M)), None)
    if source is None and not hasattr(diffusers, class_name):
        raise ValueError(f"model_index.json: the pipeline {class_name!r} is neither of hf_ae.pipelines nor of diffusers.")
    return source


def bundle(module: Path) -> str:
    """A module and what it imports from its folder, as one file."""
    imports, parts = set(), []
    for path in in_order(module):
        text = path.read_text()
        lines = text.splitlines()
        for node in reversed(ast.parse(text).body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                del lines[node.lineno - 1 : node.end_lineno]
                if not getattr(node, "level", 0):
                    imports.add(ast.unparse(node))
        parts.append(f"# {path.name}\n\n" + "\n".join(lines).strip())
    future = "from __future__ import annotations"
    head = f'"""Modules of hf_ae, joined into one file: change them there."""\n\n{future}\n\n' + "\n".join(sorted(imports - {future}))
    return re.sub(r"\n{4,}", "\n\n\n", "\n\n\n".join([head, *parts])) + "\n"


def in_order(module: Path) -> list[Path]:
    """A module after all that it imports from its folder, each once."""
    imported = re.findall(r"^from \.(\w+) import", module.read_text(), re.M)
    return list(dict.fromkeys([path for name in imported for path in in_order(module.with_name(f"{name}.py"))] + [module]))
