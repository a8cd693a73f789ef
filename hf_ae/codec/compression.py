"""Any autoencoder as an image codec: `compress(model, image) -> bytes`, `decompress(data) -> image`.

The latents that decoding starts from are exact: independent of threads, batches and processes. Pixels are computed in
float32, image by image, in channels-last order, which is bitwise equal for any number of threads on a machine with
oneDNN; other machines may differ in the last bit of a pixel.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import require, user_input
from ..loading import load_autoencoder
from ..metrics import psnr
from ..models.image_processing import open_image, to_mode
from . import method_hyperprior, method_indices, method_latents, method_palette
from .container import FINGERPRINT_BYTES, MAX_PIXELS, File, check_pixels, expect, pack, unpack
from .tiles import num_channels

WRITERS = {"hyperprior": method_hyperprior.write, "latents": method_latents.write, "indices": method_indices.write}
READERS = {
    "hyperprior": method_hyperprior.read,
    "latents": method_latents.read,
    "palette": method_palette.read,
    "indices": method_indices.read,
}
ENCODER_ONLY = ("encoder.", "quant_conv.", "hyperprior.hyper_encoder.", "down.", "to_code.", "prior.")
"""Weights that decoding does not use."""


def compress(model: Any, image: Any, quality: float | None = None, model_id: str | None = None) -> bytes:
    """One image (path, bytes, PIL image) -> the bytes of an `.hfae` file.

    quality: 0 (smallest files) to 1; default: what the model's configuration says, or 0.5 where it says nothing. For a
    model that was not trained for compression it sets the precision of its latents: 2 bits a value at 0, 8 at 1;
    discrete codes are written as they are, at one quality. model_id: how `decompress` finds the model; default: where
    the model was loaded from; "" saves these bytes. Raises ValueError for images that the model cannot take, and for
    transparency.
    """
    good = quality is None or 0 <= quality <= 1
    require(good, f"quality={quality} must lie between 0 (smallest files) and 1 (best images).")
    image = prepare_image(image, num_channels(model))
    pixels = torch.from_numpy(np.array(image if num_channels(model) == 1 else image.convert("RGB")))
    pixels = pixels.view(1, *pixels.shape[:2], -1).permute(0, 3, 1, 2)
    with ready(model):
        method = method_of(model)
        body = WRITERS[method](model, pixels, quality)
        identity = fingerprint(model)
    if model_id is None:
        model_id = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or ""
    width, height = image.size
    return pack(File(method, image.mode, width, height, identity, str(model_id), body))


def decompress(data: bytes, model: Any = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of an `.hfae` file -> PIL image. Without `model`, the one that the file names (folder or Hub id) is
    loaded.

    Raises CorruptFileError where the file is damaged, foreign, of another model or of an image beyond `max_pixels`.
    """
    file = unpack(bytes(data), max_pixels)
    require(model is not None or file.model_id, "The file names no model: pass the model it was made with.")
    model = named_model(file.model_id) if model is None else model
    with ready(model):
        own, written = fingerprint(model).hex(), file.fingerprint.hex()
        maker = f"another model ({file.model_id or 'unnamed'})"
        expect(
            own == written, f"The file was made with {maker}: its fingerprint is {written}, that of this model {own}."
        )
        fits = method_of(model) == ("latents" if file.method == "palette" else file.method)
        expect(fits, f"The file's method {file.method!r} does not fit this model.")
        pixels = READERS[file.method](model, file)
    array = pixels[0, :, : file.height, : file.width].permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else np.ascontiguousarray(array))
    return image if image.mode == file.mode else image.convert(file.mode)


def compress_batch(model: Any, images: Iterable[Any], **options: Any) -> list[bytes]:
    """`compress` for each of a list of images: each file is what `compress` gives for its image alone."""
    return [compress(model, image, **options) for image in images]


def decompress_batch(files: Iterable[bytes], model: Any = None, **options: Any) -> list[Image.Image]:
    """`decompress` for each of a list of files."""
    return [decompress(data, model, **options) for data in files]


def roundtrip(model: Any, image: Any, quality: float | None = None) -> tuple[int, float, int]:
    """Compress and decompress one image: (bytes of a file that names no model, PSNR in dB, pixels)."""
    original = prepare_image(image, num_channels(model))
    data = compress(model, original, quality, model_id="")
    x, y = (torch.from_numpy(np.asarray(i, dtype=np.float64)) / 255 for i in (original, decompress(data, model)))
    return len(data), psnr((x - y).square().mean()).item(), original.width * original.height


def fingerprint(model: Any) -> bytes:
    """The first bytes of the SHA-256 over the weights and tables that decoding uses."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(ENCODER_ONLY):
            tensor = tensor.detach().cpu().contiguous()
            array = (tensor.float() if tensor.is_floating_point() else tensor.long()).numpy()
            digest.update(name.encode() + array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.digest()[:FINGERPRINT_BYTES]


def prepare_image(image: Any, channels: int) -> Image.Image:
    """Any image -> a PIL image of mode L or RGB that a model of so many channels can code. Raises ValueError."""
    with user_input():
        image = open_image(image)
    opaque = not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    wrong = "The image is transparent, and this format keeps no transparency"
    advice = "PIL.Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)"
    require(opaque, f"{wrong}: lay it on a background first, such as {advice}.")
    gray = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
    advice = "convert it first with image.convert('L')"
    require(channels == 3 or gray, f"This model codes gray images, and the image has colours: {advice}.")
    check_pixels(*image.size)
    return to_mode(image, 1 if gray else 3)


def method_of(model: Any) -> str:
    """How the codec writes this model's latents. Raises ValueError where it cannot."""
    method = getattr(model, "codec_method", "latents")  # diffusers' models do not say
    needs = "positions beside its latents (upsample='unpool')"
    require(method, f"The decoder of this model needs {needs}: it cannot be a codec.")
    return method


named_model = functools.lru_cache(maxsize=2)(load_autoencoder)
"""The model of a folder or Hub id, kept for the next file."""


@contextlib.contextmanager
def ready(model: Any) -> Iterator[None]:
    """The model as the codec runs it: in eval mode, channels last, without gradients, with tables up to date."""
    method, training = method_of(model), model.training
    model.eval().to(memory_format=torch.channels_last)
    if method == "hyperprior":
        model.update_tables()
    # cuDNN may choose algorithms whose sums are not exact
    exact = torch.backends.cudnn.flags(enabled=False) if model.device.type == "cuda" else contextlib.nullcontext()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False), exact:
            yield
    finally:
        model.train(training)
