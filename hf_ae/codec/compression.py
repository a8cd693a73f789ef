"""Any autoencoder as an image codec: `compress(model, image) -> bytes`, `decompress(data) -> image`.

The latents that decoding starts from are exact: independent of threads, batches, processes and devices. Pixels are
computed in float32, image by image, in channels-last order, which is bitwise equal for any number of threads on a
machine with oneDNN; other machines and devices may differ in the last bit of a pixel. The hyperprior needs float64,
which mps has not.

The caller's model is left as it was found, and several threads may use one model.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import UserError, require, user_input
from ..loading import eval_mode, load_autoencoder
from ..metrics import psnr
from ..models.image_processing import open_image, to_mode
from . import method_hyperprior, method_indices, method_latents, method_palette
from .container import FINGERPRINT_BYTES, MAX_PIXELS, CorruptFileError, File, check_pixels, expect, pack, unpack
from .tiles import num_channels, padded_pixels

WRITERS = {"hyperprior": method_hyperprior.write, "latents": method_latents.write, "indices": method_indices.write}
READERS = {
    "hyperprior": method_hyperprior.read,
    "latents": method_latents.read,
    "palette": method_palette.read,
    "indices": method_indices.read,
}
ENCODER_ONLY = ("encoder.", "quant_conv.", "hyperprior.hyper_encoder.", "down.", "to_code.", "prior.")
"""Weights that decoding does not use."""
HYPER_POSITIONS = 4
"""Positions of the latents, high and wide, that share a hyper-latent: the hyperprior works on whole groups of them."""


def compress(model: Any, image: Any, quality: float | None = None, model_id: str | None = None) -> bytes:
    """One image (path, bytes, PIL image) -> the bytes of an `.hfae` file.

    quality: 0 (smallest files) to 1; default: what the model's configuration says, or 0.5 where it says nothing. For a
    model that was not trained for compression it sets the precision of its latents: 2 bits a value at 0, 8 at 1;
    discrete codes are written as they are, at one quality. model_id: how `decompress` finds the model, a Hub id or a
    relative path; default: where the model was loaded from, unless that is an absolute path, which says where somebody
    keeps their files; "" saves these bytes. Raises ValueError for images that the model cannot take, for transparency
    and for an absolute model_id.
    """
    number = isinstance(quality, int | float) and not isinstance(quality, bool)
    good = quality is None or (number and 0 <= quality <= 1)
    require(good, f"quality={quality} must lie between 0 (smallest files) and 1 (best images).")
    image = prepare_image(image, num_channels(model))
    check_work(model, *image.size)
    pixels = torch.from_numpy(np.array(image if num_channels(model) == 1 else image.convert("RGB")))
    pixels = pixels.view(1, *pixels.shape[:2], -1).permute(0, 3, 1, 2)
    with ready(model):
        method = method_of(model)
        body = WRITERS[method](model, pixels, quality)
        identity = fingerprint(model)
    if model_id is None:
        model_id = shared_name(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or "")
    private = f"model_id={model_id!r} is a path of this machine, which others should not see"
    require(model_id == shared_name(model_id), f"{private}: write a Hub id, a relative path or ''.")
    width, height = image.size
    return pack(File(method, image.mode, width, height, identity, str(model_id), body))


def decompress(data: bytes, model: Any = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of an `.hfae` file -> PIL image. Without `model`, the one that the file names (folder or Hub id) is
    loaded.

    Raises CorruptFileError where the file is damaged, foreign, of another model or of an image beyond `max_pixels`,
    counted as the model works on them: a row of pixels costs as much as a row of whole latents.
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
        check_work(model, file.width, file.height, max_pixels, CorruptFileError)
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
    advice = "make it gray first, such as with PIL's image.convert('L')"
    require(channels == 3 or gray, f"This model codes gray images, and the image has colours: {advice}.")
    check_pixels(*image.size)
    return to_mode(image, 1 if gray else 3)


def shared_name(name: Any) -> str:
    """The Hub id or relative path that a model was loaded from, as a file may name it; "" for a path that says where
    on this machine somebody keeps their files."""
    name = str(name)
    absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return "" if absolute or name.startswith(("~", "file:")) or ".." in re.split(r"[/\\]", name) else name


def check_work(
    model: Any, width: int, height: int, most: int = MAX_PIXELS, error: type[ValueError] = UserError
) -> None:
    """Raise `error` where the model would work on more than `most` pixels for an image of this size."""
    pixels = padded_pixels(model, width, height, HYPER_POSITIONS if method_of(model) == "hyperprior" else 1)
    if pixels > most:
        size = f"An image of {width}×{height} pixels, of which this model makes {pixels:,}"
        raise error(f"{size}, is too large: at most {most:,} are taken.")


def method_of(model: Any) -> str:
    """How the codec writes this model's latents. Raises ValueError where it cannot."""
    says = hasattr(model, "codec_method")
    ours = str(getattr(model.config, "model_type", "")).startswith("hf_ae_")
    old = f"The {model.config.model_type} model" if ours else ""
    advice = "load it with hf_ae's own code, hf_ae.loading.load_autoencoder or AutoModel after `import hf_ae`"
    require(says or not ours, f"{old} runs the code of its repository, which knows no codec yet: {advice}.")
    method = model.codec_method if says else "latents"  # diffusers' models do not say
    needs = "positions beside its latents (upsample='unpool')"
    require(method, f"The decoder of this model needs {needs}: it cannot be a codec.")
    require(method in WRITERS, f"This model asks for the codec method {method!r}, which this version does not know.")
    return method


def named_model(name: str) -> Any:
    """The model of a folder or Hub id, kept for the next file."""
    return _load_named(str(Path(name).resolve()) if Path(name).is_dir() else name)


_load_named = functools.lru_cache(maxsize=2)(load_autoencoder)

_ENTERING = threading.Lock()
_inside: dict[Any, tuple[int, contextlib.ExitStack]] = {}
"""What is prepared -> (threads inside, how to undo it)."""


@contextlib.contextmanager
def shared(key: Any, prepare: Callable[[contextlib.ExitStack], None]) -> Iterator[None]:
    """A state that several threads may be in at a time: the first one prepares it, the last one undoes it."""
    with _ENTERING:
        count, undo = _inside.get(key, (0, contextlib.ExitStack()))
        if not count:
            prepare(undo)
        _inside[key] = count + 1, undo
    try:
        yield
    finally:
        with _ENTERING:
            count, undo = _inside.pop(key)
            if count > 1:
                _inside[key] = count - 1, undo
            else:
                undo.close()


@contextlib.contextmanager
def ready(model: Any) -> Iterator[None]:
    """The model as the codec runs it: in eval mode, without gradients, with tables up to date. Afterwards each of its
    modules is in the mode it was in."""
    method = method_of(model)

    def prepare(undo: contextlib.ExitStack) -> None:
        undo.enter_context(eval_mode(model))
        if method == "hyperprior":
            model.update_tables()

    def exact_sums(undo: contextlib.ExitStack) -> None:  # cuDNN may choose algorithms whose sums are not exact
        undo.enter_context(torch.backends.cudnn.flags(enabled=False))

    device = model.device.type
    exact = shared("cudnn", exact_sums) if device == "cuda" else contextlib.nullcontext()
    with shared(id(model), prepare), torch.no_grad(), torch.autocast(device, enabled=False), exact:
        yield
