"""A folder or a Hub id -> a model, an autoencoder of ours or of diffusers, or a text-to-image pipeline.

Weights are read from safetensors alone, and the code of a repository is not run. Whatever goes wrong is one
ValueError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionResolutionError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import logging

from .errors import UserError, first_line, require
from .models.image_processing import AutoencoderImageProcessor

CHECKOUT = Path(__file__).resolve().parent.parent
"""The folder of the project, where the package runs from a checkout."""
PIPELINE = "model_index.json"
"""The file that makes a folder a pipeline."""
DEFAULT_PIPELINE = CHECKOUT / "model_cards" / "emoji-text-to-image"
"""The text-to-image pipeline that a checkout carries."""


HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]
"""Of the HTTP client that this version of huggingface_hub uses."""
HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError, ValueError, HTTP_ERROR, RevisionResolutionError, EntryNotFoundError,
)  # fmt: skip
"""What huggingface_hub raises where the Hub refuses or does not answer, or a name is none of a repository."""
LOADING_ERRORS: tuple[type[Exception], ...] = (
    *HUB_ERRORS, SafetensorError, StrictDataclassError, KeyError, TypeError, AttributeError, RuntimeError, EOFError,
    ImportError,
)  # fmt: skip
"""What transformers, diffusers and huggingface_hub raise for a checkpoint that is not there, damaged or of another
kind."""


@contextlib.contextmanager
def opening(what: str, name: str | Path) -> Iterator[None]:
    """Open a checkpoint inside: any error becomes a ValueError that names `what` it is and the folder or Hub id."""
    path = Path(name)
    require(not path.is_file(), f"The {what} {name} is a file: write the folder that holds it.")
    good = path.is_dir() or str(name).count("/") == 1
    require(good, f"The {what} {name} is neither a folder nor a Hub id (owner/name).")
    try:
        with quiet():
            yield
    except SafetensorError as error:
        raise UserError(f"The {what} {name} is damaged: {first_line(error)}") from error
    except LOADING_ERRORS as error:
        here = "" if path.is_dir() else " There is no such folder here."
        raise UserError(f"The {what} {name} cannot be loaded: {first_line(error)}{here}") from error


def check_kind(name: str | Path, wanted: str) -> None:
    """Raise ValueError where a folder holds a pipeline and a model is wanted, or the other way round."""
    is_pipeline, is_model = ((Path(name) / file).is_file() for file in (PIPELINE, "config.json"))
    kind = "pipeline" if is_pipeline else "model" if is_model else wanted
    require(kind == wanted, f"{name} is a {kind}, and a {wanted} is needed here.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which show again afterwards where they did before."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """A model in eval mode; afterwards each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def pick_device(name: str | None = None, float64: bool = False) -> torch.device:
    """The device of this name (`cuda`, `cuda:1`, `mps`, `xpu`, `cpu`); default: the first of these that is there.

    float64: for work that needs it, which mps cannot do. Raises ValueError where the device is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and not float64,
        "xpu": torch.xpu.is_available(),
        "cpu": True,
    }
    if name is None:
        return torch.device(next(kind for kind, found in there.items() if found))
    found = [kind for kind, good in there.items() if good]
    kind, _, index = name.partition(":")
    require(kind in there, f"device={name!r} is not known: write one of {', '.join(there)}.")
    require(kind != "mps" or not float64, "The codec computes in float64, which mps has not: write --device cpu.")
    require(kind in found, f"There is no {kind} on this machine: write one of {', '.join(found)}.")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    require(not index or (index.isdecimal() and int(index) < count), f"There is no device {name!r}.")
    return torch.device(name)


def load_model(
    name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, AutoencoderImageProcessor]:
    """(model in eval mode, image processor) of a folder or Hub id, one of this family. Raises ValueError."""
    check_kind(name, "model")
    with opening("model", name):
        kind = AutoConfig.from_pretrained(name).model_type
        require(kind.startswith("hf_ae_"), f"it is a {kind!r} model, not one of hf_ae's.")
        model = AutoModel.from_pretrained(name, dtype=dtype, use_safetensors=True)
        return model.eval().to(device), AutoImageProcessor.from_pretrained(name)


def load_autoencoder(
    name: str | Path, subfolder: str = "", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """A model of this family, or diffusers' AutoencoderKL or AutoencoderTiny, in eval mode. Raises ValueError.

    `subfolder`: where the folder or Hub id is that of a pipeline, such as "vae".
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    if not subfolder:
        check_kind(name, "model")
    kinds: dict[str, Any] = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny)}
    with opening("model", name):
        config = AutoencoderKL.load_config(str(name), subfolder=subfolder or None)
        ours = str(config.get("model_type")).startswith("hf_ae_")
        kind: Any = AutoModel if ours else kinds.get(str(config.get("_class_name")))
        require(kind, f"it is none of hf_ae's models, {' or '.join(kinds)}.")
        model = kind.from_pretrained(name, subfolder=subfolder, dtype=dtype, use_safetensors=True)
        return model.eval().to(device)


def load_pipeline(
    name: str | Path | None = None, scheduler: str | None = None, device: torch.device | str = "cpu"
) -> Any:
    """The text-to-image pipeline of a folder or Hub id, with another diffusers scheduler where asked. Raises
    ValueError.

    Default: the pipeline that a checkout of the project carries.
    """
    import diffusers

    from .pipelines.text_to_image import TextToImagePipeline

    found = name is not None or (DEFAULT_PIPELINE / PIPELINE).is_file()
    require(found, "Which pipeline? Write --model with a folder or a Hub id.")
    name = DEFAULT_PIPELINE if name is None else name
    check_kind(name, "pipeline")
    with opening("pipeline", name):
        pipe = TextToImagePipeline.from_pretrained(name).to(device)
    if scheduler is not None:
        kind = getattr(diffusers, scheduler, None)
        good = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        require(good, f"diffusers has no scheduler {scheduler!r}: write DDIMScheduler, DPMSolverMultistepScheduler, …")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)  # type: ignore[union-attr]
    return pipe


def image_processor_for(autoencoder: Any, image_size: int | None = None) -> AutoencoderImageProcessor:
    """The image processor that fits an autoencoder, one of ours or of diffusers, for square images of `image_size`.

    Raises ValueError where the size does not divide by the pixels of a latent position.
    """
    config = autoencoder.config
    if not hasattr(config, "image_hw"):  # one of diffusers
        size = image_size or config.sample_size
        fields: dict[str, Any] = {"num_channels": config.in_channels, "pixel_range": [-1.0, 1.0]}
    else:
        size = image_size or config.image_hw
        fields = {"num_channels": config.num_channels, "pixel_range": list(config.pixel_range)}
    scale = 2 ** (len(config.block_out_channels) - 1)
    wrong = image_size is not None and (image_size < scale or image_size % scale)
    positions = f"{scale}, the pixels of a latent position"
    require(not wrong, f"image_size={image_size} does not divide by {positions}: write a multiple of it.")
    height, width = (size, size) if isinstance(size, int) else size
    return AutoencoderImageProcessor(size={"height": height, "width": width}, **fields)


def pipeline_image_processor(pipe: Any) -> AutoencoderImageProcessor:
    """The image processor for images of the size that a text-to-image pipeline draws."""
    size, scale = pipe.unet.config.sample_size, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return image_processor_for(pipe.vae, (size if isinstance(size, int) else size[0]) * scale)
