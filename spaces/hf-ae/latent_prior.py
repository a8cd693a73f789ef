"""A learned prior: a transformer writes the codes of a VQ-VAE-2, index by index, and the decoder draws them."""

from __future__ import annotations

import gradio as gr
from page import show_many
from PIL import Image
from serving import LIVE, SHEETS, enlarge, friendly, load_model, number, whole

MODEL, COUNT = "fashion-vqvae2", 3
FIRST = "ankle boot"


@friendly
def draw_class(kind: str = FIRST, seed: int = 0, guidance: float = 2.5) -> list[Image.Image]:
    """Draw new pieces of clothing of a class: a transformer writes their codes, and a VQ-VAE-2 decodes them.

    Args:
        kind: T-shirt, trousers, pullover, dress, coat, sandal, shirt, sneaker, bag or "ankle boot".
        seed: 0 to 99; the same seed draws the same pictures.
        guidance: How much the class counts, 1 to 5: above 1 more typical, and less varied.

    Returns:
        Three new pictures.
    """
    if kind not in SHEETS["clothes"]:
        raise ValueError(f"This class is not known: use one of {', '.join(SHEETS['clothes'])}.")
    model, processor = load_model(MODEL)
    label, seed = SHEETS["clothes"].index(kind), whole(seed, 0, 99, "The seed")
    drawn = model.generate(COUNT, labels=label, guidance_scale=number(guidance, 1, 5, "The guidance"), seed=seed)
    return [enlarge(image) for image in processor.postprocess(drawn)]


def build() -> list[gr.components.Component]:
    """The section. Returns the output of `draw_class`."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=260):
            kind = gr.Radio(SHEETS["clothes"], value=FIRST, label="Class", elem_id="class")
            seed = gr.Slider(0, 99, 0, step=1, label="Seed", elem_id="class-seed")
            guidance = gr.Slider(
                1, 5, 2.5, step=0.1, label="Guidance", info="How much the class counts", elem_id="class-guidance"
            )
        with gr.Column(scale=7, min_width=300):
            shown = show_many(
                "New pictures", "class-pictures", 3, elem_classes="pixels", buttons=["download", "fullscreen"]
            )
    gr.HTML(
        "<p>Random codes of a good compressor mean nothing. So a transformer learned which code follows which, as a "
        "language model learns words; it writes the 65 indices of a picture, the 16 coarse ones first.</p>"
    )
    fields = [kind, seed, guidance]
    gr.on([field.input for field in fields], draw_class, fields, shown, api_name="draw_class", **LIVE)
    return [shown]
