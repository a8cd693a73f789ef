"""Small images in a row, to pick one: buttons that a keyboard and a screen reader know."""

from __future__ import annotations

import html

import gradio as gr
from page import data_uri
from PIL import Image
from serving import SHEETS, sample_file

Items = list[tuple[str, str]]
"""(what it shows, file) of each image."""
PICK = """element.addEventListener('click', event => {
    const button = event.target.closest('button');
    if (button) trigger('click', {index: Number(button.dataset.index)});
});"""
THUMBNAIL = 96
"""Pixels of the longest side."""


def sheet_items(sheet: str, index: int = 1) -> Items:
    """One sample of each class of a sheet."""
    return [(name, sample_file(sheet, name, index)) for name in SHEETS[sheet]]


def picker_of(items: Items, label: str, elem_id: str) -> gr.HTML:
    """A row of images; its `click` event tells which one, see `chosen`."""
    options = {"js_on_load": PICK, "elem_classes": "picker", "apply_default_css": False}
    return gr.HTML(buttons_for(items, label), elem_id=elem_id, **options)


def buttons_for(items: Items, label: str) -> str:
    """The HTML of a picker."""
    buttons = ""
    for index, (name, path) in enumerate(items):
        image = Image.open(path)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        title = html.escape(name)
        buttons += (
            f'<button type="button" data-index="{index}" aria-label="{title}" title="{title}">'
            f'<img src="{data_uri(image)}" alt=""></button>'
        )
    return f'<div role="group" aria-label="{html.escape(label)}">{buttons}</div>'


def chosen(items: Items, event: gr.EventData) -> str:
    """The file that a click names; anything else is refused."""
    index = event.index
    if not isinstance(index, int) or index not in range(len(items)):
        raise gr.Error("There is no such sample.", print_exception=False)
    return items[index][1]
