"""Repair: damage an image, and see a denoising autoencoder undo it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from page import intro, show_many, status, status_html, terms
from picker import Items, buttons_for, chosen, picker_of, sheet_items
from PIL import Image
from serving import (
    AT_ONCE,
    EXAMPLES,
    LIVE,
    PICKED,
    SHARED,
    available,
    enlarge,
    friendly,
    load_model,
    number,
    open_upload,
    sample_file,
    upload,
    whole,
)

DAMAGES = {
    "Noise": ("gaussian", "fashion-denoising", (0.05, 0.6, 0.5, 0.05)),
    "Salt and pepper": ("salt_pepper", "fashion-denoising", (0.02, 0.4, 0.15, 0.01)),
    "Mask": ("masking", "fashion-inpainting", (0.05, 0.8, 0.5, 0.05)),
    "Shrink": ("low_resolution", "fashion-sharpening", (2, 7, 4, 1)),
    "Drop the colour": ("grayscale", "emoji-coloring", (0, 1, 1, 1)),
}
"""Title -> kind of corruption, the model trained to undo it, and (lowest, highest, first, step) of its level."""
FALLBACK = "fashion-denoising"
"""Repairs what no model was trained for."""
START, FIRST = ("ankle boot", 0), ("Noise", 0.5)
"""What the tab shows when the page opens: a sample, the damage and its level."""
COLOURED = ("baby", "crying-face", "calendar", "broken-heart", "owl", "tractor", "motor-scooter", "castle")
"""Emoji to pick where the colour is dropped; no denoising model trained on them."""
PICKER = "Test pictures to pick"


def repairer(damage: str) -> str | None:
    """The model that repairs a kind of damage: that trained for it, or else the denoiser of gray images; None if
    neither can."""
    kind, name, _ = DAMAGES[damage]
    if available(name):
        return name
    return None if kind == "grayscale" else FALLBACK


def offered() -> list[str]:
    """The kinds of damage that something repairs."""
    return [damage for damage in DAMAGES if repairer(damage)]


@friendly
def repair(
    picture: str, damage: str = "Noise", level: float = 0.5, seed: int = 0
) -> tuple[list[tuple[Image.Image, str]], str]:
    """Damage a picture and let a denoising autoencoder repair it.

    Args:
        picture: The picture; it becomes as small as the model's own (28×28 gray, or 64×64 for colours).
        damage: Noise, "Salt and pepper", Mask, Shrink or "Drop the colour".
        level: How much. Noise: its standard deviation, 0.05 to 0.6. "Salt and pepper", Mask: the share of pixels,
            0.02 to 0.4 and 0.05 to 0.8. Shrink: by how much, 2 to 7. The colour goes entirely, whatever the level.
        seed: Of the noise or mask, 0 to 99.

    Returns:
        Original, damaged and repaired picture, and how near the last two are to the original.
    """
    import torch

    from hf_ae.metrics import psnr
    from hf_ae.models.corruptions import corrupt

    if damage not in offered():
        raise ValueError(f"This damage is not known: use one of {', '.join(offered())}.")
    kind, _, (low, high, _, _) = DAMAGES[damage]
    level = number(level, low, high, "The level")
    model, processor = load_model(repairer(damage))
    original = open_upload(picture, 1024, gray=model.config.num_channels == 1)
    pixels = processor([original], return_tensors="pt").pixel_values
    darkest, lightest = model.config.pixel_range
    generator = torch.Generator().manual_seed(whole(seed, 0, 99, "The seed"))
    damaged = corrupt(pixels, kind, round(level) if kind == "low_resolution" else level, darkest, lightest, generator)
    with torch.no_grad():
        repaired = model(damaged).reconstruction
    errors = ((image - pixels).square().mean() / (lightest - darkest) ** 2 for image in (damaged, repaired))
    before, after = (psnr(error).item() for error in errors)
    note = "This model was trained for this damage."
    if model.config.corruption != kind:
        note = "This model never saw this damage: it was trained for gaussian noise."
    drawn = [enlarge(image) for image in processor.postprocess(torch.cat([pixels, damaged, repaired]))]
    verdict = "better" if after > before else "worse"
    told = f"PSNR {before:.1f} dB before, {after:.1f} dB after: {verdict}. {note}"
    return list(zip(drawn, ("original", "damaged", "repaired"))), status_html(told)


def first() -> tuple:
    """What the tab shows when the page opens, and the level's own limits: the API knows those of all kinds of
    damage."""
    return *repair(sample_file("clothes", *START), *FIRST), level_for(FIRST[0])


def samples_for(damage: str) -> Items:
    """What one can pick: clothes, or what has colours to drop."""
    if DAMAGES[damage][0] != "grayscale":
        return sheet_items("clothes", 0)
    return [(name.replace("-", " "), str(EXAMPLES / f"{name}.png")) for name in COLOURED]


def level_for(damage: str) -> dict[str, Any]:
    """The level's slider."""
    low, high, value, step = DAMAGES[damage][2]
    return gr.update(minimum=low, maximum=high, value=value, step=step, visible=DAMAGES[damage][0] != "grayscale")


def change_damage(damage: str, path: str | None) -> tuple:
    """The level's slider, the samples and the image for another kind of damage; an image of one's own stays."""
    fitting = samples_for(damage)
    known = {Path(file).name for kind in offered() for _, file in samples_for(kind)}
    foreign = known - {Path(file).name for _, file in fitting}
    image = fitting[0][1] if path and Path(path).name in foreign else gr.skip()
    return level_for(damage), buttons_for(fitting, PICKER), image


def pick(damage: str, event: gr.EventData) -> str:
    return chosen(samples_for(damage), event)


def build() -> list[gr.components.Component]:
    """The tab. Returns the outputs of `first`."""
    intro(
        "A <b>denoising</b> autoencoder sees damaged pictures in training and must return the clean ones. Its code "
        "has room for what clothes look like, and none for noise: so the noise stays behind.",
        ("image", "picture"),
        ("noise", "damage"),
        ("encoder", "encoder"),
        ("latents", "code"),
        ("decoder", "decoder"),
        ("image", "repaired"),
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            value = sample_file("clothes", *START)
            image = upload(value=value, label="Picture", height=200, elem_id="repair-picture", elem_classes="pixels")
            picker = picker_of(samples_for(FIRST[0]), PICKER, "repair-picker")
            damage = gr.Radio(offered(), value=FIRST[0], label="Damage", elem_id="damage")
            lows, highs = zip(*(DAMAGES[damage][2][:2] for damage in offered()))
            level = gr.Slider(min(lows), max(highs), FIRST[1], step=0.05, label="How much", elem_id="level")
            seed = gr.Slider(0, 99, 0, step=1, label="Seed of the damage", elem_id="damage-seed")
        with gr.Column(scale=7, min_width=300):
            shown = show_many(
                "Original, damaged, repaired", "repaired", 3, elem_classes="pixels", buttons=["download", "fullscreen"]
            )
            told = status("", "repair-status")
            terms("PSNR")

    private = {"api_visibility": "private"}
    repairing = {"inputs": [image, damage, level, seed], "outputs": [shown, told]}
    gr.on([level.input, seed.input, image.upload], repair, **repairing, api_name="repair", **LIVE)
    changing = damage.input(change_damage, [damage, image], [level, picker, image], **AT_ONCE, **private)
    picking = picker.click(pick, damage, image, **PICKED, **private)
    for event in (changing, picking):
        event.then(repair, **repairing, **SHARED, **private)
    return [*repairing["outputs"], level]
