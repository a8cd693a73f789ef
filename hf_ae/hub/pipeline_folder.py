"""A diffusers pipeline with models of ours inside, as a folder that loads with and without hf_ae.

```
model_index.json            _class_name: ["pipeline", "TextToImagePipeline"]; vae: ["modeling_hf_ae_vae", "VAEModel"]
pipeline.py                 pipelines/text_to_image.py and its siblings, in one file
prior/caption_prior.py      if there is a prior: diffusers wants the code of a component in its folder
vae/modeling_hf_ae_vae.py   the modules that the VAE needs, in one file: diffusers takes only that one from the Hub
vae/ unet/ tokenizer/ ...   what each component's own save_pretrained writes
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from ..errors import require
from .files import read_json
from .remote_code import model_class


def save_pipeline(pipe: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write a complete pipeline folder, without its card. Weights are stored as `dtype` and load as what they are in
    `pipe`."""
    folder, stored = Path(folder), getattr(torch, dtype)
    pipe.save_pretrained(folder)
    for name in components(folder):
        for path in (folder / name).glob("*.safetensors"):
            tensors = load(path.read_bytes())  # into memory: the file is replaced
            compacted = {name: compact(tensor, stored) for name, tensor in tensors.items()}
            save_file(compacted, path, metadata={"format": "pt"})
    write_pipeline_code(folder)


def compact(tensor: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """As `stored`; a matrix whose values float8 (e4m3: three bits of mantissa) holds exactly is stored so. Integers
    stay."""
    if not tensor.is_floating_point():
        return tensor
    small = tensor.to(torch.float8_e4m3fn)
    return small if tensor.ndim == 2 and torch.equal(small.to(tensor.dtype), tensor) else tensor.to(stored)


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """name -> (library, class) of each component that model_index.json lists."""
    index = read_json(folder / "model_index.json")
    listed = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list)}
    return {k: (v[0], v[1]) for k, v in listed.items() if len(v) == 2 and v[0] and v[1]}


def pipeline_classes() -> dict[str, type]:
    """The classes of `hf_ae.pipelines` whose code travels with a pipeline folder."""
    from ..pipelines.caption_prior import CaptionPrior
    from ..pipelines.text_to_image import TextToImagePipeline

    return {cls.__name__: cls for cls in (CaptionPrior, TextToImagePipeline)}


def write_pipeline_code(folder: Path) -> None:
    """Bring the code in a pipeline folder up to this version of the package. The weights stay."""
    from ..pipelines.repo_code import write_code

    write_code(folder, code_files(folder))


def has_pipeline_code(folder: Path) -> bool:
    """Whether all code is there, of whatever version, and the JSON files name it."""
    files = {folder / file: text for file, text in code_files(folder).items()}
    return all(path.is_file() and (path.suffix == ".py" or path.read_text() == text) for path, text in files.items())


def code_files(folder: Path) -> dict[str, str]:
    """path -> content of what a pipeline folder holds of ours: the code, and the JSON files that name it.

    Raises ValueError where the pipeline is neither ours nor one of diffusers.
    """
    import diffusers

    from ..pipelines import repo_code

    ours, index = pipeline_classes(), read_json(folder / "model_index.json")
    name = index.get("_class_name", "")
    name = name[-1] if isinstance(name, list) else name
    known = name in ours or hasattr(diffusers, name)
    require(known, f"model_index.json: the pipeline {name!r} is neither of hf_ae.pipelines nor of diffusers.")
    parts = {
        part: ours.get(class_name) or model_class(read_json(folder / part / "config.json"))
        for part, (_, class_name) in components(folder).items()
    }
    return repo_code.code_files(folder, ours.get(name), parts)
