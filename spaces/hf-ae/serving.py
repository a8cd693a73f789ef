"""What every tab needs: models that load once, images that are safe to open, errors that read well.

Models come from `HF_AE_SPACE_MODELS`: a folder of model folders or an owner on the Hub, and `name=place` for single
models, with commas between. Default: the model_cards of the checkout around this folder, or else the ids that the
Space's README lists.
"""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import io
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE / "examples"
CHECKOUT = HERE.parent.parent / "model_cards"
MOST_PIXELS = 25_000_000
"""Of an uploaded image, as its header announces them."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""That Pillow may decode: none of them runs another program."""
SHARED = {"concurrency_id": "compute", "concurrency_limit": 2, "trigger_mode": "always_last"}
"""Every event that computes waits in one queue; of a visitor's quick clicks the last one counts."""
LIVE = {**SHARED, "show_progress": "hidden"}
"""An event that follows a control while it moves."""
AT_ONCE = {"queue": False, "trigger_mode": "always_last"}
"""An event that computes nothing. Gradio's default forgets one that comes while the one before is on its way."""
PICKED = {**AT_ONCE, "trigger_mode": "multiple"}
"""A click that says what was clicked: an event that waits would say what was clicked before it."""
log = logging.getLogger("hf_ae.space")

try:  # on the Hub; for text-to-image only: the rest takes no time on a CPU
    from spaces import GPU  # type: ignore[import-not-found]
except ImportError:

    def GPU(function: Callable) -> Callable:  # type: ignore[no-redef]
        """Here everything runs on the CPU."""
        return function


# Where models are


def places() -> tuple[str | None, dict[str, str]]:
    """(folder or owner of all models if there is one, {name: place} of single ones) from the environment."""
    parts = [part.strip() for part in os.environ.get("HF_AE_SPACE_MODELS", "").split(",") if part.strip()]
    single = dict(part.split("=", 1) for part in parts if "=" in part)
    common = [part for part in parts if "=" not in part]
    return (common[-1] if common else str(CHECKOUT) if CHECKOUT.is_dir() else None), single


def place(name: str) -> str:
    """The folder or the Hub id of a model."""
    common, single = places()
    if name in single:
        return single[name]
    if common is None:
        return published().get(name, name)
    return str(Path(common) / name) if Path(common).is_dir() else f"{common}/{name}"


@functools.cache
def published() -> dict[str, str]:
    """name -> Hub id of the models that the Space's own README lists."""
    header = re.match(r"---\n.*?^models:\n((?:- .*\n)+)", (HERE / "README.md").read_text(), re.S | re.M)
    ids = [line.removeprefix("- ").strip() for line in header[1].splitlines()] if header else []
    return {repo.rsplit("/", 1)[-1]: repo for repo in ids}


def available(name: str) -> bool:
    """Whether a model can be loaded: its folder holds weights, or it lies on the Hub."""
    folder = Path(place(name))
    if folder.is_dir():
        return (folder / "model_index.json").is_file() or (folder / "model.safetensors").is_file()
    common = places()[0]
    return name in published() and not (common and Path(common).is_dir())


def file_of(name: str, filename: str) -> Path | None:
    """A small file beside a model, from its folder or the Hub; None where there is none."""
    folder = Path(place(name))
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    if (name, filename) not in _fetched:
        from huggingface_hub import hf_hub_download

        try:
            _fetched[name, filename] = Path(hf_hub_download(place(name), filename))
        except Exception:  # not there, or no network: each has its own exception
            return None
    return _fetched[name, filename]


_fetched: dict[tuple[str, str], Path] = {}


# Models, loaded once


LOADING = threading.RLock()
_loaded: dict[tuple[str, str], Any] = {}


def load_once(kind: str, name: str, load: Callable[[Any], Any]) -> Any:
    """What `load(hf_ae.loading)` gives, the first time; the same object ever after."""
    if (kind, name) not in _loaded:
        with LOADING:
            if (kind, name) not in _loaded:
                from hf_ae import loading

                _loaded[kind, name] = load(loading)
    return _loaded[kind, name]


def is_loaded(kind: str, name: str) -> bool:
    return (kind, name) in _loaded


def load_model(name: str) -> tuple[Any, Any]:
    """(model, image processor) of a shipped autoencoder."""
    return load_once("model", name, lambda loading: loading.load_model(place(name)))


def load_codec(name: str) -> Any:
    """An autoencoder as `hf_ae.codec` takes it."""
    return load_once("codec", name, lambda loading: loading.load_autoencoder(place(name)))


def load_pipeline(name: str = "emoji-text-to-image") -> Any:
    """The text-to-image pipeline; on the GPU where there is one."""

    def load(loading: Any) -> Any:
        import torch

        pipe = loading.load_pipeline(place(name))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to("cuda") if torch.cuda.is_available() else pipe

    return load_once("pipeline", name, load)


# Errors and inputs


def use_threads(count: int) -> None:
    """Torch's threads in this worker. One is fastest for small steps: where there are more threads than cores, libgomp
    makes them wait."""
    import torch

    torch.set_num_threads(min(count, os.cpu_count() or 1))


def friendly(action: Callable, threads: int = 1) -> Callable:
    """An action that hands over images as files, and whose every error is one line for whoever asked; what nobody
    foresaw is logged."""
    if inspect.isgeneratorfunction(action):

        @functools.wraps(action)
        def run(*args: Any, **options: Any) -> Any:
            try:
                use_threads(threads)
                for output in action(*args, **options):
                    yield each(output, as_file)
            except Exception as error:
                raise readable(error) from None

    else:

        @functools.wraps(action)
        def run(*args: Any, **options: Any) -> Any:
            try:
                use_threads(threads)
                return each(action(*args, **options), as_file)
            except Exception as error:
                raise readable(error) from None

    # Gradio reads no more than one line about each argument
    run.__doc__ = re.sub(r"\n {8,}", " ", inspect.getdoc(action) or "")
    return run


def readable(error: Exception) -> gr.Error:
    """An exception as what a person reads: its text is shown as HTML, so it is escaped."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, ValueError):
        text = (str(error).strip() or "This cannot be done.").splitlines()[0]
    else:
        log.error("An action failed", exc_info=error)
        text = "Something went wrong here. Please try it again, or with another picture."
    return gr.Error(html.escape(text[:300]), print_exception=False, title="That did not work")


def upload(**options: Any) -> gr.Image:
    """An image input that hands over the path of the file as it came: nothing is decoded before its size is known.

    Only files in the folder of uploads count: whoever calls the API may write any path.
    """
    shown = {"format": "png", "alt_text": options["label"], **options}
    image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], **shown)
    decode = image.preprocess

    def preprocess(payload: Any) -> Any:
        if payload is None or not payload.path:
            return decode(payload)
        if not Path(payload.path).resolve().is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
            raise gr.Error("This picture was not uploaded here.", print_exception=False)
        return payload.path

    image.preprocess = preprocess  # type: ignore[method-assign]
    return image


def open_upload(path: str | None, most_side: int | None = None, gray: bool = False) -> Image.Image:
    """The image at `path`, RGB or gray, turned as its EXIF says, on white, no side longer than `most_side`. Raises
    ValueError."""
    from hf_ae.models.image_processing import open_image, to_mode

    if not path:
        raise ValueError("There is no picture yet: upload one, or click one of the examples.")
    most, known = f"at most {MOST_PIXELS // 1_000_000} megapixels are accepted", ", ".join(FORMATS[:5])
    try:
        with Image.open(path, formats=FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise ValueError(f"This picture is far too large: {most}.") from None
    except Exception:  # every decoder has its own exceptions
        raise ValueError(f"This file is no picture that can be read here: use {known}.") from None
    if width * height > MOST_PIXELS:
        raise ValueError(f"This picture has {width * height / 1e6:.0f} megapixels, and {most}: make it smaller first.")
    try:
        with Image.open(path, formats=FORMATS) as file:
            if most_side:
                file.draft("RGB", (most_side, most_side))
            image = to_mode(open_image(file), 1 if gray else 3)
    except Exception:
        raise ValueError("This picture is damaged: its first part reads well, but not the rest.") from None
    if most_side and max(image.size) > most_side:
        image.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
    return image


def whole(value: Any, low: int, high: int, what: str) -> int:
    """A whole number within limits. Raises ValueError."""
    if not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        raise ValueError(f"{what} must be a whole number from {low:,} to {high:,}.")
    return int(value)


def number(value: Any, low: float, high: float, what: str) -> float:
    """A number within limits. Raises ValueError."""
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{what} must be a number from {low:g} to {high:g}.")
    return float(value)


# Samples


SHEETS = {
    "digits": [str(digit) for digit in range(10)],
    "clothes": ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"],
}
"""The sheets of samples: a row for each class."""
PER_CLASS = 8


@functools.cache
def samples(sheet: str) -> dict[str, list[Image.Image]]:
    """class -> its images (28×28, gray), test images that no model trained on."""
    page = Image.open(EXAMPLES / f"{sheet}.png").convert("L")
    lefts = range(0, 28 * PER_CLASS, 28)
    return {
        name: [page.crop((left, 28 * row, left + 28, 28 * row + 28)) for left in lefts]
        for row, name in enumerate(SHEETS[sheet])
    }


@functools.cache
def own_folder() -> Path:
    """For files that last as long as the process."""
    import atexit

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def sample_file(sheet: str, name: str, index: int) -> str:
    """One sample as a file of its own."""
    path = own_folder() / f"{sheet}-{name.replace(' ', '-')}-{index}.png"
    samples(sheet)[name][index].save(path)
    return str(path)


def each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of everything in a result, which may be a tuple or list of results."""
    return type(value)(each(part, change) for part in value) if isinstance(value, tuple | list) else change(value)


def as_file(value: Any) -> Any:
    """An image as the PNG that the browser fetches, written fast rather than small; anything else as it is."""
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, "PNG", compress_level=1)
    return served(buffer.getvalue(), "picture.png")


def served(data: bytes, name: str) -> str:
    """A file that the page may fetch for an hour."""
    return write_once(Path(os.environ["GRADIO_TEMP_DIR"]), data, name)


def keep(value: Any) -> Any:
    """Of a file that the page may fetch for an hour, a copy for as long as the process lasts; anything else as it
    is."""
    return keep_file(value) if isinstance(value, str) and value.startswith(os.environ["GRADIO_TEMP_DIR"]) else value


def keep_file(path: str | Path) -> str:
    """A copy of a file that the page may show for as long as the process lasts."""
    return write_once(own_folder(), Path(path).read_bytes(), Path(path).name)


def write_once(root: Path, data: bytes, name: str) -> str:
    """Equal data under one path, which nobody sees half-written."""
    path = root / hashlib.sha256(data).hexdigest()[:32] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.utime(path)
    except FileNotFoundError:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(data)
        os.chmod(partial.name, 0o644)
        os.replace(partial.name, path)
    return str(path)


def remembered(fill: Callable[[], Any]) -> Callable[[], Any]:
    """What `fill()` gives, worked out once for all visitors, with files that last as long as the process."""
    lock, kept = threading.Lock(), []

    def first_view() -> Any:
        with lock:
            if not kept:
                kept.append(each(fill(), keep))
        return kept[0]

    return first_view


def enlarge(image: Image.Image, side: int = 224) -> Image.Image:
    """A small image several times as large, pixel by pixel, so that one sees it."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
