"""Any autoencoder as an image codec: `compress(model, image) -> bytes`, `decompress(data) -> image`.

The latents that decoding starts from are exact: independent of threads, batches and processes. Pixels are computed in float32,
picture by picture, in channels-last order, which is bitwise equal for any number of threads on a machine with oneDNN; other
machines may differ in the last bit of a pixel.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel

from .container import FINGERPRINT_BYTES, MAX_PIXELS, CorruptFileError, File, pack, unpack
from .methods import (
    read_hyperprior,
    read_indices,
    read_latents,
    read_palette,
    write_hyperprior,
    write_indices,
    write_latents,
    write_palette,
)
from ..models.image_processing import open_image, to_mode
from ..models.modeling_compressive import CompressiveAutoencoderModel
from ..models.modeling_vqvae import VQVAEModel

__all__ = ["CorruptFileError", "compress", "compress_batch", "decompress", "decompress_batch", "fingerprint"]

ENCODER_ONLY = ("encoder.", "quant_conv.", "hyperprior.hyper_encoder.", "down.", "to_code.", "prior.")
"""Weights that decoding does not use."""


def compress(model, image, quality: float | None = None, palette: bool = False, model_id: str | None = None) -> bytes:
    """One image (path, bytes, PIL image) -> the bytes of an `.hfae` file.

    quality: 0 (smallest files) to 1; default: what the model's configuration says, or 0.5 where it says nothing. For a model
    that was not trained for compression it sets the precision of its latents: 2 bits a value at 0, 8 at 1; discrete codes are
    written as they are, at one quality. palette: 256 colours
    with error diffusion instead (spatial latents). model_id: how `decompress` finds the model; default: where the model was loaded
    from; "" saves these bytes. Raises ValueError for pictures that the model cannot take, and for transparency.
    """
    picture = prepare_picture(image, num_channels(model))
    pixels = torch.from_numpy(np.array(picture if num_channels(model) == 1 else picture.convert("RGB")))
    pixels = pixels.view(1, *pixels.shape[:2], -1).permute(0, 3, 1, 2)
    with ready(model):
        own = method_of(model)
        if own in ("hyperprior", "indices"):
            if palette:
                raise ValueError("palette is for latents that no prior was trained for: leave it out for this model.")
            method, body = own, write_indices(model, pixels) if own == "indices" else write_hyperprior(model, pixels, quality)
        else:
            method, body = ("palette", write_palette(model, pixels)) if palette else ("latents", write_latents(model, pixels, quality))
        identity = fingerprint(model)
    name = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") if model_id is None else model_id
    return pack(File(method, picture.mode, *picture.size, identity, str(name or ""), body))


def decompress(data: bytes, model=None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of an `.hfae` file -> PIL image. Without `model`, the model that the file names is loaded (folder or Hub id).

    Raises CorruptFileError where the file is damaged, foreign, of another model or of a picture beyond `max_pixels`.
    """
    file = unpack(bytes(data), max_pixels)
    if model is None:
        if not file.model_id:
            raise ValueError("The file names no model: pass the model it was made with.")
        model = load_codec_model(file.model_id)
    with ready(model):
        own = fingerprint(model)
        if own != file.fingerprint:
            raise CorruptFileError(
                f"The file was made with another model ({file.model_id or 'unnamed'}): its fingerprint is {file.fingerprint.hex()}, "
                f"that of this model {own.hex()}."
            )
        read = {"hyperprior": read_hyperprior, "latents": read_latents, "palette": read_palette, "indices": read_indices}[file.method]
        if method_of(model) != ("latents" if file.method == "palette" else file.method):
            raise CorruptFileError(f"The file's method {file.method!r} does not fit this model.")
        pixels = read(model, file)
    array = pixels[0, :, : file.height, : file.width].permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))
    return picture if picture.mode == file.mode else picture.convert(file.mode)


def compress_batch(model, images, **options) -> list[bytes]:
    """`compress` for each of a list of images: each file is what `compress` gives for its image alone."""
    return [compress(model, image, **options) for image in images]


def decompress_batch(files, model=None, **options) -> list[Image.Image]:
    """`decompress` for each of a list of files."""
    return [decompress(data, model, **options) for data in files]


def roundtrip(model, image, quality: float | None = None, palette: bool = False) -> tuple[int, float, int]:
    """Compress and decompress one image: (bytes of a file that names no model, PSNR in dB, pixels)."""
    original = prepare_picture(image, num_channels(model))
    data = compress(model, original, quality, palette, model_id="")
    x, y = (np.asarray(picture, dtype=np.float64) for picture in (original, decompress(data, model)))
    return len(data), -10 * math.log10(max(((x - y) ** 2).mean() / 255**2, 1e-10)), original.width * original.height


def fingerprint(model) -> bytes:
    """The first bytes of the SHA-256 over the weights and tables that decoding uses."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(ENCODER_ONLY):
            tensor = tensor.detach().cpu().contiguous()
            tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
            digest.update(name.encode() + tensor.numpy().astype(tensor.numpy().dtype.newbyteorder("<")).tobytes())
    return digest.digest()[:FINGERPRINT_BYTES]


# Pictures and models


def prepare_picture(image, channels: int) -> Image.Image:
    """Any image -> a PIL image of mode L or RGB that a model of so many channels can code."""
    picture = open_image(image)
    may_be_transparent = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
    if may_be_transparent and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError(
            "The picture is transparent, and this format keeps no transparency: lay it on a background first, such as "
            "PIL.Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)."
        )
    gray = picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16")
    if channels == 1 and not gray:
        raise ValueError("This model codes gray pictures, and the picture has colours: convert it first with picture.convert('L').")
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"A picture of {picture.width}×{picture.height} pixels is beyond the limit of {MAX_PIXELS:,} pixels.")
    return to_mode(picture, 1 if gray else 3)


def method_of(model) -> str:
    """How the codec writes this model's codes, where no palette is asked for."""
    if isinstance(model, VQVAEModel):
        return "indices"
    return "hyperprior" if isinstance(model, CompressiveAutoencoderModel) else "latents"


def num_channels(model) -> int:
    """1 or 3, of a model of ours or of diffusers."""
    channels = getattr(model.config, "num_channels", None) or model.config.in_channels
    if channels not in (1, 3):
        raise ValueError(f"The codec takes models of 1 or 3 channels, not {channels}.")
    return channels


@contextlib.contextmanager
def ready(model):
    """The model as the codec runs it: in eval mode, channels last, without gradients, with tables up to date."""
    if getattr(model.config, "upsample", None) == "unpool":
        raise ValueError("The decoder of this model needs positions beside its latents (upsample='unpool'): it cannot be a codec.")
    training = model.training
    model.eval().to(memory_format=torch.channels_last)
    if isinstance(model, CompressiveAutoencoderModel):
        model.update_tables()
    # cuDNN may choose algorithms whose sums are not exact
    exact = torch.backends.cudnn.flags(enabled=False) if model.device.type == "cuda" else contextlib.nullcontext()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False), exact:
            yield
    finally:
        model.train(training)


@functools.lru_cache(maxsize=2)
def load_codec_model(name: str, subfolder: str = ""):
    """A model of ours, or diffusers' AutoencoderKL or AutoencoderTiny, in eval mode, from a folder or the Hub. Raises ValueError."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers.utils import logging

    logging.disable_progress_bar()
    kinds = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny)}
    if name.count("/") != 1 and not Path(name).is_dir():
        raise ValueError(f"The model {name} is neither a folder nor a Hub id (owner/name).")
    try:
        config = AutoencoderKL.load_config(name, subfolder=subfolder or None)
        ours = str(config.get("model_type")).startswith("hf_ae_")
        kind = AutoModel if ours else kinds[config.get("_class_name")]
        return kind.from_pretrained(name, subfolder=subfolder, dtype=torch.float32).eval()
    except KeyError:
        raise ValueError(f"The codec takes models of ours, {' and '.join(kinds)}; {name} is another.") from None
    except Exception as error:  # not there, damaged, offline: each library has its own exceptions
        raise ValueError(f"The model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
