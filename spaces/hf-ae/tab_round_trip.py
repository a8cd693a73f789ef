"""Round trip: an image through a file and back, beside JPEG, WebP and AVIF of that size."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import gradio as gr
from page import intro, show_many, show_one, status, status_html, table, terms
from picker import Items, chosen, picker_of
from PIL import Image
from serving import (
    AT_ONCE,
    EXAMPLES,
    LIVE,
    PICKED,
    SHARED,
    enlarge,
    friendly,
    load_codec,
    number,
    open_upload,
    sample_file,
    served,
    upload,
)

CODECS = {
    "Photo": ("photo-compressive", 768),
    "Emoji": ("emoji-compressive", 128),
    "Clothes": ("fashion-compressive", 112),
}
"""Title -> model, and the longest side that it takes here."""
MOST_FILE = 2_000_000
"""Bytes of a compressed file that is opened."""
MOST_SIDE = 4096
"""Pixels of its image's longer side."""
FIRST = ("window.png", "Photo", 0.25)
SHOWN = {
    "Photo": ("window", "caps", "boat"),
    "Emoji": ("owl", "cupcake", "castle", "motor-scooter"),
    "Clothes": ("ankle boot", "bag", "dress"),
}
"""Examples for each model."""


def prepared(path: str | None, kind: str) -> tuple[Any, Image.Image]:
    """(codec, the upload as it takes it). Raises ValueError."""
    if kind not in CODECS:
        raise ValueError(f"This model is not known: use one of {', '.join(CODECS)}.")
    name, most_side = CODECS[kind]
    model = load_codec(name)
    return model, open_upload(path, most_side, gray=model.config.num_channels == 1)


@functools.partial(friendly, threads=2)  # large images
def round_trip(
    picture: str, model: str = "Photo", quality: float = 0.25
) -> tuple[tuple[Image.Image, Image.Image], str, str]:
    """Compress a picture into a small file with an autoencoder, and open that file again.

    Args:
        picture: The picture; large ones are made smaller first.
        model: Photo, Emoji or Clothes: what the autoencoder was trained with.
        quality: 0 (smallest file) to 1 (best picture).

    Returns:
        The picture before and after, the size and error, and the file itself.
    """
    import numpy as np
    import torch

    from hf_ae.codec import compress, decompress
    from hf_ae.metrics import psnr

    codec, original = prepared(picture, model)
    data = compress(codec, original, quality=number(quality, 0, 1, "The quality"), model_id=CODECS[model][0])
    back = decompress(data, codec)
    error = np.square(np.asarray(original, dtype=np.float32) - np.asarray(back)).mean()
    pixels, decibels = original.width * original.height, psnr(torch.tensor(error / 255**2)).item()
    path = served(data, "picture.hfae")
    raw, size = pixels * len(original.getbands()), len(data)
    fraction = f": 1/{raw / size:.0f}" if size < raw else ""
    told = (
        f"{size:,} bytes instead of {raw:,}{fraction}. {8 * size / pixels:.2f} bits a pixel, PSNR {decibels:.1f} dB."
    )
    return (enlarge(original, 384), enlarge(back, 384)), status_html(told), path


@friendly
def beside_others(
    picture: str, model: str = "Photo", quality: float = 0.25
) -> tuple[list[tuple[Image.Image, str]], str, Image.Image]:
    """Put the autoencoder's file beside JPEG, WebP and AVIF files of about the same size.

    Args:
        picture: The picture; large ones are made smaller first.
        model: Photo, Emoji or Clothes: what the autoencoder was trained with.
        quality: 0 (smallest file) to 1 (best picture), of the autoencoder; the others follow its size.

    Returns:
        The four pictures, a table of their sizes and errors, and a panel: original, latents, decoded.
    """
    from hf_ae.pipelines import VAERoundTripPipeline

    codec, original = prepared(picture, model)
    result = VAERoundTripPipeline(codec)(original, quality=number(quality, 0, 1, "The quality"))
    found = {"Autoencoder": result.decoded, **result.others}
    rows = [
        [name, f"{m.size:,}", f"{m.bpp:.3f}", f"{m.psnr:.2f}", "" if math.isnan(m.ssim) else f"{m.ssim:.3f}"]
        for name, m in found.items()
    ]
    head = ["", "bytes", "bits a pixel", "PSNR, dB", "SSIM"]
    figures = table(head, rows, "The same picture in four kinds of file", marked=0)
    images = [(enlarge(m.picture, 384), f"{name}, {m.size:,} bytes") for name, m in found.items()]
    return images, figures, result.panel


@friendly
def open_file(file: str) -> tuple[Image.Image, str]:
    """Open a compressed .hfae file that this Space or `hf-ae compress` wrote with one of its three models.

    Args:
        file: The .hfae file.

    Returns:
        The picture, and a line about the file.
    """
    from hf_ae.codec import CorruptFileError, decompress, fingerprint, unpack
    from hf_ae.codec.compression import ready as ready_for_coding

    if not file:
        raise ValueError("There is no file yet: drop one that ends in .hfae.")
    if Path(file).stat().st_size > MOST_FILE:
        raise ValueError(f"This file is larger than {MOST_FILE // 1_000_000} MB, and so no file of this Space.")
    data, most = Path(file).read_bytes(), 4_000_000
    header = unpack(data, most)
    if max(header.width, header.height) > MOST_SIDE:  # an image of one row costs as much as one of sixteen
        size, limit = f"{header.width:,}×{header.height:,} pixels", f"at most {MOST_SIDE:,} a side are opened"
        raise ValueError(f"This file holds a picture of {size}, and {limit}.")
    for kind, (name, _) in CODECS.items():
        model = load_codec(name)
        with ready_for_coding(model):
            fits = fingerprint(model) == header.fingerprint
        if fits:
            back = decompress(data, model, most)
            told = f"Opened: {len(data):,} bytes, {back.width}×{back.height} pixels"
            return enlarge(back, 384), status_html(f"{told}, written with the model for “{kind}”.")
    raise CorruptFileError("This file was written with another model than the three of this Space.")


def items() -> Items:
    """The examples."""
    files = {f"{kind}: {name}": EXAMPLES / f"{name}.png" for kind, names in SHOWN.items() for name in names}
    return [(name, str(f) if f.is_file() else sample_file("clothes", f.stem, 1)) for name, f in files.items()]


def pick(event: gr.EventData) -> tuple[str, str]:
    """An example, and the model for it."""
    path = chosen(items(), event)
    return path, items()[event.index][0].split(":")[0]


def first() -> Any:
    """What the tab shows when the page opens."""
    return round_trip(str(EXAMPLES / FIRST[0]), *FIRST[1:])


def build() -> list[gr.components.Component]:
    """The tab. Returns the outputs of `first`."""
    intro(
        "An autoencoder squeezes a picture into a <b>code</b>, and an entropy coder packs the code into a file; "
        "another machine turns it into the picture again. Trained to spend its bits where they show, it needs about "
        "half the bytes of JPEG.",
        ("image", "picture"),
        ("encoder", "encoder"),
        ("latents", "code"),
        ("file", "small file"),
        ("decoder", "decoder"),
        ("image", "picture again"),
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            image = upload(value=str(EXAMPLES / FIRST[0]), label="Picture", height=240, elem_id="trip-picture")
            kind = gr.Radio(list(CODECS), value=FIRST[1], label="Model trained with", elem_id="trip-model")
            quality = gr.Slider(0, 1, FIRST[2], step=0.01, label="Quality", elem_id="quality")
            picker = picker_of(items(), "Examples", "trip-picker")
        with gr.Column(scale=7, min_width=300):
            shown = {"format": "png", "interactive": False, "max_height": 440, "buttons": ["fullscreen"]}
            slider = gr.ImageSlider(label="Before | after: drag the line", elem_id="trip-slider", **shown)
            told = status("", "trip-status")
            with gr.Row():
                file = gr.File(label="The compressed file", elem_id="trip-file", interactive=False, height=90)
            compare = gr.Button("Put JPEG, WebP and AVIF of this size beside it", elem_id="beside")
    with gr.Column(visible=False, elem_id="others") as others:
        figures = gr.HTML(label="Figures", elem_id="trip-figures", apply_default_css=False)
        gallery = show_many("At the same size", "trip-others", 4)
        with gr.Accordion("Panel: original | latents | decoded", open=False):
            panel = show_one("Panel", "trip-panel", show_label=False)
    terms("PSNR", "SSIM")
    build_opening()

    private = {"api_visibility": "private"}
    trip = {"inputs": [image, kind, quality], "outputs": [slider, told, file]}
    gr.on([quality.input, kind.input, image.upload], round_trip, **trip, **LIVE, api_name="round_trip")
    changes = [quality.release, kind.change, image.change]
    gr.on(changes, lambda: gr.update(visible=False), None, others, **AT_ONCE, **private)
    picker.click(pick, None, [image, kind], **PICKED, **private).then(round_trip, **trip, **SHARED, **private)
    opening = compare.click(lambda: gr.update(visible=True), None, others, **AT_ONCE, **private)
    shown = [gallery, figures, panel]
    opening.then(beside_others, trip["inputs"], shown, api_name="beside_others", **SHARED)
    return trip["outputs"]


def build_opening() -> None:
    """Where a compressed file is dropped."""
    with gr.Accordion("Open a compressed file", open=False, elem_id="open-accordion"), gr.Row(equal_height=False):
        dropped = gr.File(label="Drop an .hfae file", elem_id="dropped", height=160)
        with gr.Column():
            opened = show_one("The picture in it", "opened", height=240)
            said = status("", "open-status")
    dropped.upload(open_file, dropped, [opened, said], api_name="open_file", **SHARED)
