"""Pieces of the page: the theme, the diagrams, small tables. Text from outside is escaped here."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import gradio as gr
from PIL import Image

SHAPES = {
    "text": '<path d="M6 11h28M6 18h28M6 25h18"/>',
    "image": '<rect x="6" y="6" width="28" height="28" rx="3"/><circle cx="14" cy="14" r="3"/>'
    '<path d="M6 29l9-9 7 6 5-5 7 7"/>',
    "noise": '<rect x="6" y="6" width="28" height="28" rx="3"/><path d="M12 12h.1M20 11h.1M28 13h.1M11 20h.1M18 21h.1'
    'M27 19h.1M14 28h.1M22 27h.1M29 28h.1M24 15h.1M16 16h.1M23 23h.1" stroke-width="3.2"/>',
    "encoder": '<path d="M6 5l28 9v12l-28 9z"/>',
    "decoder": '<path d="M34 5l-28 9v12l28 9z"/>',
    "latents": '<path class="accent" d="M10 28v-9M15 28v-15M20 28v-6M25 28v-12M30 28v-8" stroke-width="3.2"/>',
    "file": '<path d="M10 5h14l7 7v23h-21z"/><path d="M24 5v7h7"/><path class="accent" d="M15 20h11M15 26h11"/>',
    "loop": '<path d="M33 20a13 13 0 1 1-5-10"/><path d="M28 3v8h-8"/>'
    '<circle class="accent" cx="20" cy="20" r="3.5"/>',
    "chart": '<path d="M7 34h27"/><path class="accent" d="M12 33v-9M20 33v-20M28 33v-14" stroke-width="5"/>',
}
"""Line drawings, 40×40, in the colour of the text."""


def theme() -> gr.themes.Base:
    """System fonts, quiet surfaces, one accent."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Base(
        primary_hue="teal", neutral_hue="zinc", radius_size="lg", text_size="md", font=fonts, font_mono=mono
    )
    return base.set(
        body_background_fill="#fafaf9",
        body_background_fill_dark="#131316",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="#1c1c20",
        block_border_color="#e7e5e4",
        block_border_color_dark="#2e2e34",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_shadow="none",
        input_background_fill="white",
        input_background_fill_dark="#232328",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def intro(text: str, *steps: tuple[str, str]) -> gr.HTML:
    """Two sentences, and the way of the data: (shape, what it is) in order."""
    svg = '<svg viewBox="0 0 40 40" aria-hidden="true" focusable="false">'
    drawn = "".join(f"<li>{svg}{SHAPES[shape]}</svg><span>{html.escape(label)}</span></li>" for shape, label in steps)
    way = html.escape("How it works: " + " → ".join(label for _, label in steps))
    return gr.HTML(f'<div class="intro"><p>{text}</p><ol class="flow" aria-label="{way}">{drawn}</ol></div>')


def show_one(label: str, elem_id: str, **options: Any) -> gr.Image:
    """An image that the page shows."""
    shown = {"format": "png", "interactive": False, "alt_text": label, "buttons": ["download"], **options}
    return gr.Image(label=label, elem_id=elem_id, **shown)


def show_many(label: str, elem_id: str, columns: int, **options: Any) -> gr.Gallery:
    """Images side by side that the page shows."""
    shown = {"format": "png", "interactive": False, "height": "auto", "object_fit": "contain"}
    shown |= {"buttons": ["fullscreen"], **options}
    return gr.Gallery(label=label, elem_id=elem_id, columns=columns, **shown)


TERMS = {
    "PSNR": "how near to the original, in decibels; 6 dB more halve the error, and beyond 35 dB one hardly sees any",
    "SSIM": "likeness of structures, 1 where nothing differs",
    "FID": "how far drawn pictures are from real ones as a whole, 0 where they cannot be told apart",
    "PCA": "the best that a linear code of as many numbers can do",
}
"""What figures mean."""


def terms(*names: str) -> gr.HTML:
    """A line that explains figures."""
    return gr.HTML(f'<p class="terms">{"; ".join(f"<b>{name}</b>: {TERMS[name]}" for name in names)}.</p>')


def status(text: str = "", elem_id: str | None = None) -> gr.HTML:
    """A line that tells what happened; screen readers say it aloud."""
    return gr.HTML(status_html(text), label="Result in words", elem_id=elem_id, elem_classes="status")


def status_html(text: str) -> str:
    """Text as the HTML of a status line."""
    return f'<p role="status" aria-live="polite">{html.escape(text)}</p>'


def table(headers: list[str], rows: list[list[str]], caption: str, marked: int | None = None) -> str:
    """Cells of plain text as an HTML table; the first cell of a row is its heading, the row `marked` stands out."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in headers)
    body = ""
    for index, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        mark = " class=marked" if index == marked else ""
        body += f'<tr{mark}><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    parts = f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="figures">{parts}</table></div>'


def data_uri(image: Image.Image) -> str:
    """An image as an address that needs no request."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
