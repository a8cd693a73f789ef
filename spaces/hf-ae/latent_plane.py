"""The plane: latents of two values, so every point of a plane is an image."""

from __future__ import annotations

import html

import gradio as gr
from page import data_uri, show_one
from PIL import Image
from serving import LIVE, enlarge, friendly, load_model, number

MODEL, SIDE = "mnist-ae-2d", 20
X, Y = (-8.0, 17.0), (-8.0, 17.0)
"""The model, images along a side of the map, and what part of the plane it shows: that where nearly all digits lie."""


@friendly
def plane_point(x: float = 0, y: float = 0) -> Image.Image:
    """Draw the digit at a point of the plane: an autoencoder keeps two numbers of a digit, and every pair is a point.

    Args:
        x: The first number of the code, -8 to 17.
        y: The second number of the code, -8 to 17.

    Returns:
        The digit that the decoder draws there.
    """
    import torch

    from hf_ae.latents import decode

    model, processor = load_model(MODEL)
    latents = torch.tensor([[number(x, *X, "x"), number(y, *Y, "y")]])
    return enlarge(processor.postprocess(decode(model, latents))[0])


def first() -> tuple[str, Image.Image]:
    """The map, and the digit in the middle of it."""
    from hf_ae.latents import manifold_grid
    from hf_ae.plots import image_grid

    grid = manifold_grid(load_model(MODEL)[0], SIDE, X, Y)
    return map_html(image_grid(grid, SIDE, gap=0)), plane_point(sum(X) / 2, sum(Y) / 2)


def map_html(image: Image.Image) -> str:
    """The map, with what the page needs to know where a pointer on it is."""
    edges = 'data-left="{}" data-right="{}" data-bottom="{}" data-top="{}"'.format(*X, *Y)
    label = "Map of the plane: a digit at every point. Point or drag on it; or use the two sliders."
    return (
        f'<div class="map" {edges} role="img" aria-label="{html.escape(label)}">'
        f'<img src="{data_uri(image)}" alt="" draggable="false"><i class="dot"></i></div>'
    )


POINT = """const at = event => {
    const map = element.querySelector('.map');
    if (!map) return;
    const box = map.getBoundingClientRect(), d = map.dataset;
    const u = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const v = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    map.querySelector('.dot').style.cssText = `left:${100 * u}%;top:${100 * v}%`;
    const x = Number(d.left) + u * (d.right - d.left), y = Number(d.top) + v * (d.bottom - d.top);
    window.planePoint = [Math.round(100 * x) / 100, Math.round(100 * y) / 100];
    waiting ||= requestAnimationFrame(() => { waiting = 0; trigger('input'); });  // of one moment, one event
};
let held = false, waiting = 0;
element.addEventListener('pointerdown', event => { held = true; at(event); });
element.addEventListener('pointermove', event => { if (held || event.pointerType === 'mouse') at(event); });
window.addEventListener('pointerup', () => { held = false; });"""
MOVE_DOT = """(x, y) => {
    const map = document.querySelector('#plane .map');
    if (map) {
        const d = map.dataset, u = (x - d.left) / (d.right - d.left), v = (y - d.top) / (d.bottom - d.top);
        map.querySelector('.dot').style.cssText = `left:${100 * u}%;top:${100 * v}%`;
    }
    return [x, y];
}"""


def point_at(x: float, y: float) -> tuple[float, float, Image.Image]:
    """The pointer on the map -> the two sliders and the digit."""
    return x, y, plane_point(x, y)


def build() -> list[gr.components.Component]:
    """The section. Returns the outputs of `first`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=300):
            plane = gr.HTML(elem_id="plane", js_on_load=POINT, apply_default_css=False)
        with gr.Column(scale=4, min_width=260):
            shown = show_one("The digit at this point", "plane-digit", elem_classes="pixels", height=280)
            x = gr.Slider(*X, sum(X) / 2, step=0.01, label="First number: left to right", elem_id="plane-x")
            y = gr.Slider(*Y, sum(Y) / 2, step=0.01, label="Second number: bottom to top", elem_id="plane-y")
    private = {"api_visibility": "private"}
    gr.on([x.input, y.input], plane_point, [x, y], shown, js=MOVE_DOT, api_name="plane_point", **LIVE)
    # The browser tells where the pointer is when the event starts: data of an event that had to wait are lost.
    plane.input(friendly(point_at), [x, y], [x, y, shown], js="() => window.planePoint", **LIVE, **private)
    return [plane, shown]
