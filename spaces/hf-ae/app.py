"""The Space of hf_ae: every autoencoder, in a browser. `python app.py`, or `make space` in a checkout."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "GRADIO_TEMP_DIR" not in os.environ:
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="hf_ae_space_")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gradio as gr
import tab_compare
import tab_latent
import tab_odd
import tab_prompt
import tab_repair
import tab_round_trip
from page import theme
from serving import HERE, load_pipeline, remembered

TITLE = "hf_ae: every autoencoder"
HEADER = """<header><h1>Every autoencoder, in your browser</h1>
<p>An autoencoder learns to put a picture into a few numbers, its <b>code</b>, and to get it back from them. \
Here is what that is good for.
Every model here is small enough for a CPU.</p></header>"""
HEAD = (
    '<meta name="description" content="Draw, compress, explore, repair: autoencoders as Hugging Face models.">'
    '<meta name="color-scheme" content="light dark">'
)
SESSIONS = 100
"""Visitors whose fields Gradio keeps, the latest ones, at 0.3 MB each (it would keep 10,000)."""
ON_ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
KEEP_FILES, SWEEP = 3600, 600
"""Seconds that uploads and results stay on the disk, and between two looks for older ones."""


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title=TITLE) as demo:
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
            with gr.Tab("Find the odd one", id="odd"):
                odd = tab_odd.build()
            with gr.Tab("Compare", id="compare"):
                compare = tab_compare.build()
        filled = [(trip, tab_round_trip.first), *latent, (repair, tab_repair.first), (odd, tab_odd.first)]
        filled.append((compare, tab_compare.compare))
        for outputs, fill in filled:
            drawn.then(remembered(fill), None, outputs, api_visibility="private", show_progress="hidden", queue=False)
    return demo


def warm() -> None:
    """What the first visitor needs: on ZeroGPU loaded before anything forks, elsewhere also drawn, while the page
    travels."""
    with contextlib.suppress(ValueError, gr.Error):  # shown again, on the page, to whoever asks for it
        load_pipeline() if ON_ZERO_GPU else tab_prompt.first_drawing()


def sweep(folder: Path, kept: set[str], seconds: float = KEEP_FILES) -> None:
    """Delete the files, and the empty folders, that nobody has touched for so long; not those that the page itself
    shows."""
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # in use, not empty, or gone
            if time.time() - path.stat().st_ctime > seconds and str(path) not in kept:
                path.rmdir() if path.is_dir() else path.unlink()


def keep_tidy(demo: gr.Blocks) -> None:
    """Sweep from time to time. Gradio's own `delete_cache` stops for good when a file comes while it looks."""
    while True:
        time.sleep(SWEEP)
        kept = {path for block in list(demo.blocks.values()) for path in list(block.keep_in_cache)}
        sweep(Path(os.environ["GRADIO_TEMP_DIR"]), kept)


def main() -> None:
    if ON_ZERO_GPU:
        warm()
    demo = build()
    demo.queue(max_size=100)
    demo.launch(
        theme=theme(), css_paths=HERE / "style.css", head=HEAD, footer_links=["api", "gradio", "settings"],
        mcp_server=True, max_file_size="30mb", max_threads=8, ssr_mode=False, prevent_thread_lock=True,
        state_session_capacity=SESSIONS,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that what stands at the exit is done
    threading.Thread(target=keep_tidy, args=(demo,), daemon=True).start()
    if not ON_ZERO_GPU:
        threading.Thread(target=warm, daemon=True).start()
    demo.block_thread()


if __name__ == "__main__":
    main()
