"""Latent space: walk, reckon, turn, point, throw dice and draw among latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr
import latent_map
import latent_plane
import latent_prior
from page import intro, show_many, show_one
from picker import buttons_for, chosen, picker_of, sheet_items
from PIL import Image
from serving import (
    AT_ONCE,
    LIVE,
    PICKED,
    SHARED,
    SHEETS,
    enlarge,
    friendly,
    load_model,
    number,
    open_upload,
    sample_file,
    samples,
    upload,
    whole,
)

if TYPE_CHECKING:
    from torch import Tensor

WALKERS = {"Clothes": ("clothes", "fashion-vae"), "Digits": ("digits", "mnist-vae")}
"""Title -> sheet of samples, model."""
ENDS = {"Clothes": (("sneaker", 1), ("ankle boot", 1)), "Digits": (("3", 1), ("8", 1))}
FRAMES = 9
TURNED, TURNS = "fashion-beta-vae", 10
DICE = {"Autoencoder": "mnist-deep-ae", "VAE": "mnist-vae"}
SPREADS = {"N(0, 1), as the VAE was trained": False, "as wide as each model's own codes": True}


def encode(model: Any, processor: Any, images: list[Image.Image]) -> Tensor:
    """PIL images -> latents (n, *shape)."""
    import torch

    with torch.no_grad():
        return model.encode(processor(images, return_tensors="pt").pixel_values).latents


def draw(model: Any, processor: Any, latents: Tensor) -> list[Image.Image]:
    """Latents -> PIL images that are large enough to see."""
    from hf_ae.latents import decode

    return [enlarge(image) for image in processor.postprocess(decode(model, latents))]


def walker(kind: str) -> tuple[Any, Any]:
    """(model, image processor) for a title of WALKERS. Raises ValueError."""
    if kind not in WALKERS:
        raise ValueError(f"This model is not known: use one of {', '.join(WALKERS)}.")
    return load_model(WALKERS[kind][1])


# Walk


@friendly
def walk(
    a: str, b: str, kind: str = "Clothes", way: str = "spherical", position: float = 0.5
) -> tuple[Image.Image, list[Image.Image]]:
    """Walk from the code of one picture to that of another and decode what lies between.

    Args:
        a: The picture to start from; it is made 28×28 and gray.
        b: The picture to arrive at.
        kind: Clothes or Digits: which VAE to use.
        way: linear or spherical.
        position: Where to stand on the way, 0 to 1.

    Returns:
        The picture at that position, and nine pictures along the way.
    """
    import torch

    from hf_ae.latents import interpolate

    loaded = walker(kind)
    ends = encode(*loaded, [open_upload(a, 1024, gray=True), open_upload(b, 1024, gray=True)])
    place = number(position, 0, 1, "The position")
    steps = 101
    latents = interpolate(ends[0], ends[1], steps, way)
    chosen = torch.cat([latents[round(place * (steps - 1))][None], latents[:: (steps - 1) // (FRAMES - 1)]])
    here, *frames = draw(*loaded, chosen)
    return here, frames


def walk_first() -> Any:
    return walk(*(sample_file("clothes", *end) for end in ENDS["Clothes"]))


def build_walk() -> list[gr.components.Component]:
    with gr.Row(equal_height=False):
        kind = gr.Radio(list(WALKERS), value="Clothes", label="Model trained with", elem_id="walk-kind")
        way = gr.Radio(["spherical", "linear"], value="spherical", label="Way", elem_id="walk-way")
    with gr.Row(equal_height=False, elem_classes="three"):
        ends, pickers = [], []
        with gr.Column(min_width=220):
            ends.append(end_image("From", 0))
            pickers.append(picker_of(sheet_items("clothes"), "From: test pictures to pick", "walk-pick-a"))
        with gr.Column(min_width=260):
            here = show_one("Here", "walk-here", elem_classes="pixels", height=280)
            position = gr.Slider(0, 1, 0.5, step=0.01, label="Position on the way", elem_id="position")
        with gr.Column(min_width=220):
            ends.append(end_image("To", 1))
            pickers.append(picker_of(sheet_items("clothes"), "To: test pictures to pick", "walk-pick-b"))
    frames = show_many("The whole way", "frames", FRAMES, elem_classes="pixels strip", buttons=[], allow_preview=False)
    walking = {"inputs": [*ends, kind, way, position], "outputs": [here, frames]}
    private = {"api_visibility": "private"}
    gr.on([position.input, way.input, *(end.upload for end in ends)], walk, **walking, api_name="walk", **LIVE)
    for end, picker in zip(ends, pickers):
        picker.click(pick_end, kind, end, **PICKED, **private).then(walk, **walking, **SHARED, **private)
    kind.input(change_kind, kind, [*ends, *pickers], **AT_ONCE, **private).then(walk, **walking, **SHARED, **private)
    return walking["outputs"]


def end_image(label: str, index: int) -> gr.Image:
    """The image to start from (0) or to arrive at (1)."""
    value, elem_id = sample_file("clothes", *ENDS["Clothes"][index]), f"walk-{'ab'[index]}"
    return upload(value=value, label=label, height=200, elem_id=elem_id, elem_classes="pixels")


def pick_end(kind: str, event: gr.EventData) -> str:
    return chosen(sheet_items(WALKERS[kind][0]), event)


def change_kind(kind: str) -> list[str]:
    """Ends and samples of another model."""
    sheet = WALKERS[kind][0]
    pickers = [buttons_for(sheet_items(sheet), f"{end}: test pictures to pick") for end in ("From", "To")]
    return [*(sample_file(sheet, *end) for end in ENDS[kind]), *pickers]


# Arithmetic


@friendly
def arithmetic(a: str = "ankle boot", b: str = "sneaker", picture: str = "") -> list[tuple[Image.Image, str]]:
    """Reckon with codes: the mean code of one kind of clothes, minus that of another, plus the code of a picture.

    Args:
        a: T-shirt, trousers, pullover, dress, coat, sandal, shirt, sneaker, bag or ankle boot: what to add.
        b: Another of these kinds: what to take away.
        picture: The picture to change; it is made 28×28 and gray.

    Returns:
        Four pictures: the mean of a, the mean of b, the picture as the VAE sees it, and the result.
    """
    import torch

    from hf_ae.latents import arithmetic as reckon

    for group in (a, b):
        if group not in SHEETS["clothes"]:
            raise ValueError(f"This kind is not known: use one of {', '.join(SHEETS['clothes'])}.")
    loaded = walker("Clothes")
    first, second = (encode(*loaded, samples("clothes")[group]) for group in (a, b))
    start = encode(*loaded, [open_upload(picture, 1024, gray=True)])
    latents = torch.stack([first.mean(0), second.mean(0), start[0], reckon(first, second, start)[0]])
    captions = [a, f"− {b}", "+ picture", "= result"]
    return list(zip(draw(*loaded, latents), captions))


def arithmetic_first() -> Any:
    return arithmetic("ankle boot", "sneaker", sample_file("clothes", "sneaker", 1))


def build_arithmetic() -> list[gr.components.Component]:
    with gr.Row(equal_height=False):
        a = gr.Dropdown(SHEETS["clothes"], value="ankle boot", label="Mean of these", elem_id="group-a")
        b = gr.Dropdown(SHEETS["clothes"], value="sneaker", label="minus mean of these", elem_id="group-b")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=240):
            value = sample_file("clothes", "sneaker", 1)
            c = upload(value=value, label="plus this picture", height=200, elem_id="group-c", elem_classes="pixels")
            picker = picker_of(sheet_items("clothes"), "Test pictures to pick", "pick-c")
        with gr.Column(scale=8, min_width=300):
            shown = show_many("Mean of 8 − mean of 8 + picture = result", "sum", 4, elem_classes="pixels")
    private = {"api_visibility": "private"}
    summing = {"inputs": [a, b, c], "outputs": shown}
    gr.on([a.input, b.input, c.upload], arithmetic, **summing, api_name="arithmetic", **SHARED)
    picker.click(pick_clothes, None, c, **PICKED, **private).then(arithmetic, **summing, **SHARED, **private)
    return [shown]


def pick_clothes(event: gr.EventData) -> str:
    return chosen(sheet_items("clothes"), event)


# A slider a dimension


@friendly
def numbers_of(picture: str) -> tuple:
    """The ten numbers that the β-VAE keeps of a picture of clothing.

    Args:
        picture: The picture; it is made 28×28 and gray.

    Returns:
        Ten numbers, and what the decoder draws from them.
    """
    latents = encode(*load_model(TURNED), [open_upload(picture, 1024, gray=True)])[0]
    values = [round(max(-4.0, min(4.0, value)), 2) for value in latents.tolist()]
    return (*values, draw_numbers(*values))


@friendly
def draw_numbers(
    n1: float = 0,
    n2: float = 0,
    n3: float = 0,
    n4: float = 0,
    n5: float = 0,
    n6: float = 0,
    n7: float = 0,
    n8: float = 0,
    n9: float = 0,
    n10: float = 0,
) -> Image.Image:
    """Draw a piece of clothing from the ten numbers of a β-VAE's code.

    Args:
        n1: The first number of the code, -4 to 4; 0 is the middle of all clothes.
        n2: The second number.
        n3: The third number.
        n4: The fourth number.
        n5: The fifth number.
        n6: The sixth number.
        n7: The seventh number.
        n8: The eighth number.
        n9: The ninth number.
        n10: The tenth number.

    Returns:
        The picture that the decoder draws.
    """
    import torch

    given = (n1, n2, n3, n4, n5, n6, n7, n8, n9, n10)
    values = [number(value, -4, 4, f"Number {i + 1}") for i, value in enumerate(given)]
    return draw(*load_model(TURNED), torch.tensor([values]))[0]


def numbers_first() -> Any:
    return numbers_of(sample_file("clothes", "dress", 1))


def build_numbers() -> list[gr.components.Component]:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=260):
            shown = show_one("What the decoder draws", "turned", elem_classes="pixels", height=280)
            picker = picker_of(sheet_items("clothes"), "Start from a test picture", "turn-picker")
            with gr.Accordion("Start from your own picture", open=False):
                own = upload(label="Picture", height=160, elem_id="turn-upload")
        with gr.Column(scale=7, min_width=300, elem_classes="dense"):
            sliders = []
            for row in range(TURNS // 2):
                with gr.Row():
                    for i in (2 * row + 1, 2 * row + 2):
                        named = {"label": f"Number {i}", "elem_id": f"number-{i}"}
                        sliders.append(gr.Slider(-4, 4, 0, step=0.01, min_width=140, **named))
    private = {"api_visibility": "private"}
    gr.on([slider.input for slider in sliders], draw_numbers, sliders, shown, api_name="draw_numbers", **LIVE)
    own.upload(numbers_of, own, [*sliders, shown], api_name="numbers_of", **SHARED)
    chosen = gr.State()
    picking = picker.click(pick_clothes, None, chosen, **PICKED, **private)
    picking.then(numbers_of, chosen, [*sliders, shown], **SHARED, **private)
    return [*sliders, shown]


# Dice


@friendly
def random_digits(seed: int = 0, spread: str = next(iter(SPREADS))) -> list[Image.Image]:
    """Decode random codes with an autoencoder and with a variational one: the first scribbles, the second writes
    digits.

    Args:
        seed: 0 to 99; the same seed draws the same codes.
        spread: "N(0, 1), as the VAE was trained", or "as wide as each model's own codes".

    Returns:
        25 pictures by the autoencoder, and 25 by the VAE.
    """
    from hf_ae.latents import decode, random_latents
    from hf_ae.plots import image_grid

    if spread not in SPREADS:
        raise ValueError(f"This spread is not known: use one of {'; '.join(SPREADS)}.")
    seed, sheets = whole(seed, 0, 99, "The seed"), []
    digits = [image for row in samples("digits").values() for image in row]
    for name in DICE.values():
        model, processor = load_model(name)
        like = encode(model, processor, digits) if SPREADS[spread] else None
        sheets.append(image_grid(decode(model, random_latents(model, 25, like, seed)), 5, cell=84, gap=2))
    return sheets


def build_random() -> list[gr.components.Component]:
    with gr.Row(equal_height=False):
        seed = gr.Slider(
            0, 99, 0, step=1, label="Throw the dice", info="Seed of 25 random codes", elem_id="dice", min_width=260
        )
        named = {"label": "How far apart the codes are", "elem_id": "spread"}
        spread = gr.Radio(list(SPREADS), value=next(iter(SPREADS)), min_width=260, **named)
    with gr.Row(equal_height=False):
        sheets = [
            show_one(title, f"dice-{i}", alt_text=f"25 random codes, decoded by the {title}", elem_classes="pixels")
            for i, title in enumerate(DICE)
        ]
    gr.HTML(
        "<p>The autoencoder only learned to copy digits, so most codes mean nothing to it; the VAE had to fill the "
        "space around 0.</p>"
    )
    gr.on([seed.input, spread.input], random_digits, [seed, spread], sheets, api_name="random_digits", **LIVE)
    return sheets


SECTIONS = {
    "Walk": (build_walk, walk_first),
    "Arithmetic": (build_arithmetic, arithmetic_first),
    "Turn the numbers": (build_numbers, numbers_first),
    "The plane": (latent_plane.build, latent_plane.first),
    "A map": (latent_map.build, latent_map.first),
    "Random codes": (build_random, random_digits),
    "A learned prior": (latent_prior.build, latent_prior.draw_class),
}


def build() -> list[tuple[list[gr.components.Component], Callable]]:
    """The tab. Returns [(outputs, what fills them)] of its sections."""
    intro(
        "A code is a list of numbers, so it is a <b>point in a space</b>: one can walk in it, add and subtract, and "
        "decode wherever one stands. Where a model keeps the space in order, as a variational autoencoder must, every "
        "point is a picture.",
        ("image", "picture"),
        ("encoder", "encoder"),
        ("latents", "code: move it"),
        ("decoder", "decoder"),
        ("image", "new picture"),
    )
    with gr.Tabs():
        filled = []
        for title, (make, fill) in SECTIONS.items():
            with gr.Tab(title, id=f"latent-{title}"):
                filled.append((make(), fill))
    return filled
