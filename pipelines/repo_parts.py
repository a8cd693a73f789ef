"""What a text-to-image pipeline takes from its repository (configurations and safetensors, no code), and leaves in
one."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import CONFIG_MAPPING, AutoModel

from .caption_prior import CaptionPrior
from .image_io import require
from .repo_code import code_files, write_code

logger = logging.get_logger(__name__)

REQUIRED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
EXTRA = ("prior", "image_decoder", "discriminator")
NOT_RUN = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of Stable Diffusion 1.x repos that this pipeline accepts and leaves alone."""
NO_PICKLES = "{} pickled weights, which can run any code: this pipeline reads and writes safetensors alone."
UNCHECKED = "The safety_checker is not run: look at the images before you show them to others."


class RepoLoading:
    """Loads a `DiffusionPipeline`, of which this is the other base class, from safetensors and without a repo's code;
    saves it with the code that others need."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """A folder or a Hub id, as `DiffusionPipeline.from_pretrained`, from safetensors alone.

        A component of another library is loaded by `AutoModel` if transformers knows its `model_type` (importing hf_ae
        registers its own). No code of the repo is downloaded, nor run unless you pass trust_remote_code=True.
        Components passed as keywords replace those of the repo, whatever their class. Raises ValueError for
        `use_safetensors=False`.
        """
        require(kwargs.get("use_safetensors") in (None, True), NO_PICKLES.format("use_safetensors=False reads"))
        kwargs["use_safetensors"] = True
        given = {name: kwargs.pop(name) for name in (*REQUIRED, *EXTRA, *NOT_RUN) if name in kwargs}
        parts, folder = {**dict.fromkeys(NOT_RUN), **given}, Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(str(pretrained_model_name_or_path), parts, kwargs)
        config = cls.load_config(folder)
        libraries = {name: value[0] for name, value in config.items() if isinstance(value, (list, tuple))}
        if libraries.get("safety_checker") and "safety_checker" not in given:
            logger.warning(UNCHECKED)
        if libraries.get("prior") and "prior" not in parts:
            parts["prior"] = CaptionPrior.from_pretrained(folder / "prior", use_safetensors=True)
        for name in (*REQUIRED, *EXTRA):
            if name not in parts and libraries.get(name) not in (None, "diffusers", "transformers"):
                parts |= load_registered(folder, name, kwargs)
        pipe = super().from_pretrained(folder, **dict.fromkeys(parts), **kwargs)  # type: ignore[misc]
        pipe.register_modules(**parts)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, from safetensors alone: even where it is told to, diffusers reads a file of another name by
        torch.load. Raises ValueError for such a file and for `use_safetensors=False`."""
        require(kwargs.get("use_safetensors") in (None, True), NO_PICKLES.format("use_safetensors=False reads"))
        source, file = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        if file is None and isinstance(source, (str, Path)) and Path(source).is_file():
            file = source
        good = file is None or str(file).endswith(".safetensors")
        require(good, NO_PICKLES.format(f"{file} is no safetensors file and may hold"))
        kwargs["use_safetensors"] = True
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """model_index.json; where it names a `pipeline.py` beside it, this class stands in for that file, which is not
        run."""
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), (list, tuple)):
            config["_class_name"] = cls.__name__
        return loaded

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`, with `pipeline.py` and the code of hf_ae's components, so that
        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it where hf_ae is not installed.

        Raises ValueError for `safe_serialization=False`.
        """
        require(safe_serialization, NO_PICKLES.format("safe_serialization=False writes"))
        pipe: Any = self
        pipe.register_modules(**pipe.components)  # else what was assigned where there was nothing is left out
        super().save_pretrained(str(save_directory), **kwargs)  # type: ignore[misc]

    def save_config(self, save_directory: str | Path, **kwargs: Any) -> None:
        """model_index.json, and the code that it names: the last that `save_pretrained` writes before it uploads."""
        super().save_config(save_directory, **kwargs)  # type: ignore[misc]
        pipe: Any = self
        kind = next(cls for cls in type(self).__mro__ if RepoLoading in cls.__bases__)
        folder, parts = (
            Path(save_directory),
            {name: part for name, part in pipe.components.items() if part is not None},
        )
        parts = {name: type(part) for name, part in parts.items() if (folder / name).is_dir()}
        write_code(folder, code_files(folder, kind, parts))


def download(repo: str, skipped: Container[str], options: dict[str, Any]) -> Path:
    """What the pipeline needs of a Hub repo: configurations, vocabularies and safetensors of its components."""
    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    hub = {name: options[name] for name in names if options.get(name) is not None}
    index = json.loads(Path(hf_hub_download(repo, "model_index.json", **hub)).read_text())
    listed = {name: value for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0]}
    parts = [name for name in listed if name not in skipped]
    files = [f"{part}/*.{suffix}" for part in parts for suffix in ("json", "txt", "model", "safetensors")]
    variants = None if options.get("variant") else ["*.*.safetensors"]  # as model.fp16.safetensors
    return Path(snapshot_download(repo, allow_patterns=["model_index.json", *files], ignore_patterns=variants, **hub))


def load_registered(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """{name: model} where transformers knows the component's model type; {} where diffusers may run the repo's code.

    Raises ValueError where transformers does not know it and the user has not allowed that code.
    """
    path = folder / name / "config.json"
    model_type = json.loads(path.read_text()).get("model_type") if path.is_file() else None
    if model_type in CONFIG_MAPPING:
        dtype = options.get("dtype", options.get("torch_dtype"))
        dtype = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        variant = options.get("variant")
        saved = variant is not None and any(path.parent.glob(f"*.{variant}*"))  # else, as in diffusers, without
        fields = {"use_safetensors": True, "dtype": dtype or "auto", "variant": variant if saved else None}
        return {name: AutoModel.from_pretrained(folder, subfolder=name, **fields)}
    unknown = f"{name} is a {model_type!r} model, which transformers does not know: import the package that defines it"
    allowed = model_type is None or options.get("trust_remote_code")
    require(allowed, f"{unknown} (import hf_ae), or pass trust_remote_code=True to run the repo's code.")
    return {}
