"""The Space of hf_ae: every autoencoder, in a browser. `python app.py`, or `make space` in a checkout."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="hf_ae_space_"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gradio as gr
import tab_compare
import tab_latent
import tab_prompt
import tab_repair
import tab_round_trip
from page import theme
from serving import HERE, SHARED, each, keep

TITLE = "hf_ae: every autoencoder"
HEADER = """<header><h1>Every autoencoder, in your browser</h1>
<p>An autoencoder learns to put a picture into a few numbers, its <b>code</b>, and to get it back from them. Here is what that is good for.
Every model here is small enough for a CPU.</p></header>"""
HEAD = (
    '<meta name="description" content="Draw, compress, explore, repair: autoencoders as Hugging Face models.">'
    '<meta name="color-scheme" content="light dark">'
)
KEEP_FILES = 3600
"""Seconds that uploads and results stay on the disk."""


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=TITLE, delete_cache=(KEEP_FILES, KEEP_FILES)) as demo:
        gr.HTML(HEADER, elem_id="header")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Prompt to picture", id="prompt"):
                drawn = tab_prompt.build(demo)
            with gr.Tab("Round trip", id="round-trip"):
                trip = tab_round_trip.build()
            with gr.Tab("Latent space", id="latent"):
                latent = tab_latent.build()
            with gr.Tab("Repair", id="repair"):
                repair = tab_repair.build()
            with gr.Tab("Compare", id="compare"):
                compare = tab_compare.build()
        for outputs, fill in [(trip, tab_round_trip.first), *latent, (repair, tab_repair.first), (compare, tab_compare.compare)]:
            drawn.then(remembered(fill), None, outputs, api_visibility="private", show_progress="hidden", **SHARED)
    return demo


def remembered(fill):
    """What `fill()` gives, worked out once for all visitors."""
    lock, kept = threading.Lock(), []

    def first_view():
        with lock:
            if not kept:
                kept.append(each(fill(), keep))
        return kept[0]

    return first_view


def warm():
    """Import and load what the first visitor needs: while the page travels, or on ZeroGPU before anything forks."""
    import contextlib

    from serving import load_pipeline

    with contextlib.suppress(ValueError):  # said again, on the page, to whoever asks for it
        load_pipeline()


def main():
    if os.environ.get("SPACES_ZERO_GPU"):
        warm()
    demo = build()
    demo.queue(max_size=100)
    demo.launch(
        theme=theme(), css_paths=HERE / "style.css", head=HEAD, mcp_server=True, max_file_size="30mb", max_threads=8, ssr_mode=False,
        footer_links=["api", "gradio", "settings"], prevent_thread_lock=True,
    )  # fmt: skip
    threading.Thread(target=warm, daemon=True).start()
    demo.block_thread()


if __name__ == "__main__":
    main()
