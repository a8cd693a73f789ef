"""Find the odd one: a detector of outliers looks at clothes, and at what is none."""

from __future__ import annotations

import random

import gradio as gr
from page import intro, show_many, status, status_html
from picker import Items, chosen, picker_of, sheet_items
from PIL import Image
from serving import (
    AT_ONCE,
    LIVE,
    PER_CLASS,
    PICKED,
    SHARED,
    SHEETS,
    enlarge,
    friendly,
    load_once,
    open_upload,
    place,
    sample_file,
    samples,
    upload,
    whole,
)

MODEL = "fashion-anomaly"
CLOTHES = 11
"""Clothes among which one digit is hidden."""
PICKER = "Test pictures to pick"


def detector():
    """The detector beside its model."""

    def load(loading):
        from hf_ae import AnomalyDetector

        return AnomalyDetector.from_pretrained(place(MODEL))

    return load_once("detector", MODEL, load)


def offered() -> Items:
    """What one can pick: clothes, and digits, which the detector never saw."""
    return sheet_items("clothes", 2)[::2] + sheet_items("digits", 2)[1::2]


@friendly
def look(picture: str) -> tuple[list[tuple[Image.Image, str]], str]:
    """Ask how unusual a picture is for a detector that was fitted to clothes alone.

    Args:
        picture: The picture; it becomes 28×28 and gray.

    Returns:
        The picture, what the autoencoder makes of it, and where the two differ; and whether it is an outlier.
    """
    import numpy as np
    import torch

    found = detector()
    pixels = found.processor([open_upload(picture, 1024, gray=True)], return_tensors="pt").pixel_values
    with torch.no_grad():
        rebuilt = found.model(pixels).reconstruction
    errors = np.sqrt(found.anomaly_map(pixels)[0])
    heat = Image.fromarray((255 * errors / max(errors.max(), 1e-6)).astype(np.uint8))
    margin = float(found.decision_function(pixels)[0])
    shown = [enlarge(image) for image in [*found.processor.postprocess(torch.cat([pixels, rebuilt])), heat]]
    usual = f"{1 - found.contamination:.0%} of the clothes lie above the threshold"
    verdict = f"an outlier, {-margin:.2f} below it" if margin < 0 else f"nothing odd, {margin:.2f} above it"
    told = f"{usual}; this picture is {verdict}."
    return list(zip(shown, ("picture", "comes back", "difference"))), status_html(told)


@friendly
def find_odd_one(seed: int = 0) -> tuple[list[tuple[Image.Image, str]], str]:
    """Hide a digit among eleven clothes, and let the detector find it.

    Args:
        seed: Which pictures, 0 to 99.

    Returns:
        The twelve pictures, the most unusual first, with their scores; and whether the detector found the digit.
    """
    shuffled = random.Random(whole(seed, 0, 99, "The seed"))
    names = shuffled.sample([(name, i) for name in SHEETS["clothes"] for i in range(PER_CLASS)], CLOTHES)
    digit = shuffled.choice(SHEETS["digits"])
    images = [(samples("clothes")[name][i], name) for name, i in names]
    images.append((samples("digits")[digit][shuffled.randrange(PER_CLASS)], f"the digit {digit}"))
    scores = detector().decision_function([image.convert("L") for image, _ in images])
    order = scores.argsort()
    shown = [(enlarge(images[i][0], 112), f"{images[i][1]}, {scores[i]:+.1f}") for i in order]
    most = images[order[0]][1]
    flagged = int((scores < 0).sum())
    told = f"The most unusual of the twelve: {most}. Below the threshold: {flagged}."
    return shown, status_html(told)


def first() -> tuple:
    """What the tab shows when the page opens."""
    return *look(sample_file("digits", "4", 2)), *find_odd_one(0)


def pick(event: gr.EventData) -> str:
    return chosen(offered(), event)


def build() -> list[gr.components.Component]:
    """The tab. Returns the outputs of `first`."""
    intro(
        "An autoencoder that learned from clothes alone knows where their codes lie. What is no clothing gets a code "
        "that lies elsewhere, and comes back as something that it is not.",
        ("image", "picture"),
        ("encoder", "encoder"),
        ("latents", "code"),
        ("chart", "how usual?"),
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            value = sample_file("digits", "4", 2)
            image = upload(value=value, label="Picture", height=200, elem_id="odd-picture", elem_classes="pixels")
            picker = picker_of(offered(), PICKER, "odd-picker")
        with gr.Column(scale=7, min_width=300):
            label = "What comes back"
            shown = show_many(label, "odd-shown", 3, elem_classes="pixels", buttons=["download", "fullscreen"])
            told = status("", "odd-status")
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            seed = gr.Slider(0, 99, 0, step=1, label="Eleven clothes and a digit: which", elem_id="odd-seed")
            again = status("", "odd-found")
        with gr.Column(scale=7, min_width=300):
            label = "The most unusual first"
            twelve = show_many(label, "twelve", 6, elem_classes="pixels")

    private = {"api_visibility": "private"}
    looking = {"inputs": image, "outputs": [shown, told]}
    image.upload(look, **looking, api_name="look", **LIVE)
    picker.click(pick, None, image, **PICKED, **private).then(look, **looking, **SHARED, **private)
    seed.input(find_odd_one, seed, [twelve, again], api_name="find_odd_one", **AT_ONCE)
    return [shown, told, twelve, again]
