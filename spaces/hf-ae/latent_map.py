"""A map: test pictures where their two latents put them, and the decoder, which runs in the visitor's browser."""

from __future__ import annotations

import json

import gradio as gr
from serving import file_of, own_folder

MODEL, PAGE = "fashion-ae-2d", "map.html"
"""The model, and the page beside it that `hf-ae map` wrote."""


def first() -> str:
    """The page in a frame, which a browser fetches once somebody opens the section."""
    from hf_ae.latents.map_page import RUNTIME, runtime

    page = file_of(MODEL, PAGE)
    if page is None:
        return "<p>The map cannot be read just now: try again later.</p>"
    folder = own_folder() / "map"
    folder.mkdir(exist_ok=True)
    gr.set_static_paths([folder])
    (folder / RUNTIME).write_text(runtime())
    text = page.read_text(encoding="utf-8").replace(f'src="{RUNTIME}"', f'src="gradio_api/file={folder / RUNTIME}"')
    (folder / "map.js").write_text(f"document.open(); document.write({json.dumps(text)}); document.close();")
    script = f"<script src='gradio_api/file={folder / 'map.js'}'></script>"
    return f'<iframe id="map-frame" title="A map of clothes" loading="lazy" srcdoc="{script}"></iframe>'


def build() -> list[gr.components.Component]:
    """The section. Returns the outputs of `first`."""
    gr.HTML(
        "<p>2,000 test pictures of clothes, each where the two numbers of its code put it. Point at the map: the "
        "decoder draws what lies there, in your browser.</p>"
    )
    return [gr.HTML(elem_id="map", apply_default_css=False)]
