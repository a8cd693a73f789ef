"""A map as a page: images under the pointer, and the decoder itself, by ONNX in the browser."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..export import export
from .maps import Map

PAGE = Path(__file__).parent / "page"
RUNTIME = "onnxruntime-web.js"
"""The file beside a page that runs its decoder."""
THUMBNAIL, MOST_PIXELS = 64, 16_000
"""Height of an image on the page at most, and of the sheet that holds all of them, in pixels."""


def write_map(
    path: str | Path, model: Any, found: Map, images: Tensor, labels: Tensor | None = None, names: Sequence[str] = (),
    title: str = "map",
) -> bool:  # fmt: skip
    """Write a page that needs no server: `path` and, where the decoder runs on it, RUNTIME beside it.

    images: those of the points, (images, channels, height, width) in 0…1. labels: indices into `names`, the classes.
    Returns whether the decoder is on the page: it is where a point stands for latents and hf_ae[export] is installed.
    """
    path = Path(path)
    sheet, columns, side = thumbnails(images)
    page: dict[str, Any] = {
        "title": title, "method": found.method, "columns": columns, "height": side[0], "width": side[1],
        "points": encoded(found.points.astype("<f4").tobytes()), "sheet": sheet, "names": list(names),
        "labels": None if labels is None else labels.tolist(),
    }  # fmt: skip
    decoder = decoder_of(model) if found.can_decode else None
    if decoder is not None and found.origin is not None and found.axes is not None:
        config = model.config
        page["decoder"] = {
            "onnx": encoded(decoder), "shape": list(config.latent_shape), "range": list(config.pixel_range),
            "origin": found.origin.tolist(), "axes": found.axes.tolist(),
        }  # fmt: skip
        (path.parent / RUNTIME).write_text(runtime())
    # "</" would end the script that holds it
    data = json.dumps(page, ensure_ascii=False).replace("</", "<\\/")
    path.write_text((PAGE / "map.html").read_text().replace("/*MAP*/null", data), encoding="utf-8")
    return decoder is not None


def decoder_of(model: Any) -> bytes | None:
    """The decoder as an ONNX model; None where the libraries for that are not installed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return export(model, folder, only="decoder")["decoder"].read_bytes()
        except UserError as error:
            print(f"The page has no decoder: {error}")
            return None


def runtime() -> str:
    """onnxruntime-web as a script that a page without a server can load: a browser reads no other file from a disk."""
    module = (PAGE / "ort.wasm.bundle.min.mjs").read_bytes()
    program = (PAGE / "ort-wasm-simd-threaded.wasm.gz").read_bytes()
    about = "// onnxruntime-web 1.30.0, Copyright (c) Microsoft Corporation, MIT License: its module and its program"
    return f'{about}\nwindow.onnxruntimeWeb = ["{encoded(module)}", "{encoded(program)}"];\n'


def thumbnails(images: Tensor) -> tuple[str, int, tuple[int, int]]:
    """Images in 0…1 -> (one sheet that holds all of them, as WebP in base64; its columns; height and width of one)."""
    smaller = min(1.0, THUMBNAIL / max(images.shape[-2:]))
    if smaller < 1:
        images = torch.nn.functional.interpolate(images, scale_factor=smaller, mode="area")
    values = (images.clamp(0, 1) * 255).round().byte().expand(-1, max(3, images.shape[1]), -1, -1)
    height, width = values.shape[-2:]
    columns = min(len(values), MOST_PIXELS // width)
    while columns > 1 and (columns - 1) * width >= -(-len(values) // (columns - 1)) * height:
        columns -= 1  # about as high as wide
    rows = -(-len(values) // columns)
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(-1, height, width, 3)[: len(values)] = values[:, :3].permute(0, 2, 3, 1).numpy()
    file = io.BytesIO()
    picture = Image.fromarray(sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))
    picture.save(file, "WEBP", quality=90)
    return encoded(file.getvalue()), columns, (height, width)


def encoded(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode("ascii")
