"""Prompt to picture: a latent-diffusion pipeline, watched while it denoises."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from page import intro, show_many, show_one, status, status_html
from PIL import Image, ImageOps
from serving import (
    AT_ONCE,
    GPU,
    SHARED,
    friendly,
    is_loaded,
    load_pipeline,
    number,
    open_upload,
    remembered,
    upload,
    whole,
)

MOST_LETTERS, MOST_STEPS, MOST_IMAGES = 300, 50, 6
ANY_STYLE = "any"
STYLES = ("shaded", "flat", "soft 3d", "cartoon", "classic", "blob", "line art", "ink", "retro")
"""What the pipeline was trained to draw in."""
PLACES = {"beside": "and", "left of": "left of", "above": "above"}
"""Where the first thing is -> the words between the two."""
SCHEDULERS = {
    "DPM-Solver++": None,
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler, ancestral": "EulerAncestralDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
"""Title -> diffusers class; None is the pipeline's own."""
SHEET_STEPS, SHEET_SEEDS = (2, 4, 6, 10, 20), 4
PROMPTS = ["birthday cake", "cat face", "rocket", "three strawberries", "a purple banana", "octopus", "🚀", "in love"]
FIRST = {
    "prompt": "birthday cake", "seed": 1, "steps": 10, "guidance": 2.0, "scheduler": "DPM-Solver++", "count": 3,
    "style": ANY_STYLE, "second": "", "place": "beside",
}  # fmt: skip
"""What the page draws when it opens."""


def composed(prompt: str, style: str, second: str, place: str) -> str:
    """The whole prompt. Raises ValueError."""
    prompt, second = (str(text or "").strip() for text in (prompt, second))
    if not prompt:
        raise ValueError("Write what to draw first, such as: birthday cake.")
    if style not in (ANY_STYLE, *STYLES):
        raise ValueError(f"This style is not known: use one of {', '.join((ANY_STYLE, *STYLES))}.")
    if place not in PLACES:
        raise ValueError(f"This place is not known: use one of {', '.join(PLACES)}.")
    if second:
        prompt = f"{with_article(prompt)} {PLACES[place]} {with_article(second)}"
    return prompt if style == ANY_STYLE else f"{prompt}, {style}"


def with_article(thing: str) -> str:
    """`owl` -> `an owl`; what has an article or a number keeps it."""
    first = thing.split()[0].lower()
    if first in ("a", "an", "the", "one", "two", "three") or first.isdigit():
        return thing
    return f"{'an' if first[0] in 'aeiou' else 'a'} {thing}"


def checked(prompt: str, seed: int, steps: int, guidance: float, scheduler: str, count: int = 1) -> dict[str, Any]:
    """The settings of a drawing, within what this Space draws. Raises ValueError."""
    if len(prompt) > MOST_LETTERS:
        most = f"at most {MOST_LETTERS} are accepted"
        raise ValueError(f"The prompt has {len(prompt):,} letters, and {most}: make it shorter.")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"This scheduler is not known: use one of {', '.join(SCHEDULERS)}.")
    return {
        "prompt": prompt,
        "seed": whole(seed, 0, 2**31 - 1, "The seed"),
        "num_inference_steps": whole(steps, 1, MOST_STEPS, "The number of steps"),
        "guidance_scale": number(guidance, 1, 10, "The guidance"),
        "num_images_per_prompt": whole(count, 1, MOST_IMAGES, "The number of pictures"),
    }


def pipeline_with(scheduler: str) -> Any:
    """The pipeline with a scheduler of its own, so that requests do not meet in it."""
    import diffusers

    pipe = load_pipeline()
    cls = getattr(diffusers, SCHEDULERS[scheduler] or "", type(pipe.scheduler))
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    settings = {name: pipe.config[name] for name in ("default_num_inference_steps", "default_guidance_scale")}
    own = type(pipe)(**parts, scheduler=cls.from_config(pipe.scheduler.config), **settings)
    own.set_progress_bar_config(disable=True)
    return own


def start_image(path: str | None, strength: float) -> dict[str, Any]:
    """Options of the pipeline that start from an uploaded image; none without it."""
    if not path:
        return {}
    square = ImageOps.fit(open_upload(path, 1024), (64, 64), Image.Resampling.LANCZOS)
    return {"image": square, "strength": number(strength, 0, 1, "The strength")}


@GPU
@friendly
def draw(
    prompt: str,
    seed: int = 1,
    steps: int = 10,
    guidance: float = 2.0,
    scheduler: str = "DPM-Solver++",
    count: int = 1,
    style: str = ANY_STYLE,
    second: str = "",
    place: str = "beside",
    picture: str | None = None,
    strength: float = 0.6,
) -> Iterator[tuple[Any, str]]:
    """Draw small pictures (64×64, as emoji) of a prompt by latent diffusion, with a preview after each step.

    Args:
        prompt: What to draw, at most 300 letters. The model knows what emoji show: animals, food, faces, things,
            symbols.
        seed: The same seed draws the same picture again.
        steps: Denoising steps, 1 to 50. Ten are enough.
        guidance: How closely to follow the prompt, 1 (freely) to 10.
        scheduler: DPM-Solver++, DDIM, DDPM, Euler, "Euler, ancestral" or UniPC.
        count: How many pictures to draw, 1 to 6, with the seeds from `seed` on.
        style: shaded, flat, soft 3d, cartoon, classic, blob, line art, ink, retro, or any.
        second: A second thing to draw, if any.
        place: Where the first is: beside, left of or above the second.
        picture: A picture to start from, if any.
        strength: How far to leave that picture: 0 not at all, 1 entirely.

    Returns:
        The pictures, and a line that says how long it took, and whether a discriminator sees the prompt in them.
    """
    asked = composed(prompt, style, second, place)
    options = checked(asked, seed, steps, guidance, scheduler, count) | start_image(picture, strength)
    if not is_loaded("pipeline", "emoji-text-to-image"):
        yield gr.skip(), status_html("Loading the model: this happens once …")
    pipe, started = pipeline_with(scheduler), time.perf_counter()
    for output in pipe.stream(**options):
        if hasattr(output, "step") and output.step < output.num_steps:
            yield output.images, status_html(f"Step {output.step} of {output.num_steps}")
    pictures = output.images
    if output.scores:
        pictures = [(image, verdict(score)) for image, score in zip(pictures, output.scores)]
    yield pictures, status_html(f"“{asked}”, drawn in {time.perf_counter() - started:.2f} s.")


def verdict(score: float) -> str:
    """What the discriminator says of a picture and its prompt."""
    return f"{'yes' if score > 0.5 else 'no'}, {score:.2f}"


@GPU
@friendly
def steps_sheet(
    prompt: str, seed: int = 1, guidance: float = 2.0, scheduler: str = "DPM-Solver++", style: str = ANY_STYLE,
    second: str = "", place: str = "beside",
) -> Image.Image:  # fmt: skip
    """Draw one prompt with 2, 4, 6, 10 and 20 denoising steps (rows) and four seeds (columns): see what more steps
    buy.

    Args:
        prompt: What to draw, at most 300 letters.
        seed: The first of the four seeds.
        guidance: How closely to follow the prompt, 1 (freely) to 10.
        scheduler: DPM-Solver++, DDIM, DDPM, Euler, "Euler, ancestral" or UniPC.
        style: shaded, flat, soft 3d, cartoon, classic, blob, line art, ink, retro, or any.
        second: A second thing to draw, if any.
        place: Where the first is: beside, left of or above the second.

    Returns:
        The sheet, one picture.
    """
    from hf_ae.plots import labelled_rows

    options = checked(composed(prompt, style, second, place), seed, 1, guidance, scheduler)
    pipe, rows = pipeline_with(scheduler), {}
    for steps in SHEET_STEPS:
        drawing = options | {"num_inference_steps": steps, "num_images_per_prompt": SHEET_SEEDS}
        rows[f"{steps} steps"] = pipe(**drawing, output_type="pt").images
    return labelled_rows(rows, cell=128)


@GPU
@friendly
def styles_sheet(
    prompt: str, seed: int = 1, steps: int = 10, guidance: float = 2.0, second: str = "", place: str = "beside"
) -> Image.Image:
    """Draw one prompt in every style (rows) with four seeds (columns).

    Args:
        prompt: What to draw, at most 300 letters.
        seed: The first of the four seeds.
        steps: Denoising steps, 1 to 50. Ten are enough.
        guidance: How closely to follow the prompt, 1 (freely) to 10.
        second: A second thing to draw, if any.
        place: Where the first is: beside, left of or above the second.

    Returns:
        The sheet, one picture.
    """
    from hf_ae.plots import labelled_rows

    pipe, rows = pipeline_with("DPM-Solver++"), {}
    for style in STYLES:
        asked = composed(prompt, style, second, place)
        drawing = checked(asked, seed, steps, guidance, "DPM-Solver++") | {"num_images_per_prompt": SHEET_SEEDS}
        rows[style] = pipe(**drawing, output_type="pt").images
    return labelled_rows(rows, cell=96)


first_drawing = remembered(lambda: [*draw(**FIRST)][-1])


def draw_first(*values: Any) -> Iterator[Any]:
    """What the page draws when it opens: once for all visitors, unless a link asks for something else."""
    if values[: len(FIRST)] == tuple(FIRST.values()) and not values[len(FIRST)]:
        yield first_drawing()
    else:
        yield from draw(*values)


def from_address(request: gr.Request) -> list[Any]:
    """The fields as the page's address (a share link) sets them; what it does not set, or sets badly, keeps its first
    value."""
    asked, values = dict(request.query_params), FIRST.copy()
    values["prompt"] = asked.get("prompt", "").strip()[:MOST_LETTERS] or FIRST["prompt"]
    limits = {
        "seed": (0, 2**31 - 1, int),
        "steps": (1, MOST_STEPS, int),
        "guidance": (1, 10, float),
        "count": (1, MOST_IMAGES, int),
    }
    for name, (low, high, kind) in limits.items():
        try:
            value = kind(asked[name])
        except (KeyError, ValueError):
            continue
        values[name] = value if low <= value <= high else FIRST[name]
    for name, known in {"scheduler": SCHEDULERS, "style": STYLES, "place": PLACES}.items():
        values[name] = asked[name] if asked.get(name) in known else FIRST[name]
    values["second"] = asked.get("second", "").strip()[:MOST_LETTERS]
    return list(values.values())


SHARE = """(prompt, seed, steps, guidance, scheduler, count, style, second, place) => {
    const link = new URL(window.location.href);
    const fields = {prompt, seed, steps, guidance, scheduler, count, style, second, place};
    link.search = new URLSearchParams(fields).toString();
    window.history.replaceState(null, "", link);
    const copied = navigator.clipboard ? navigator.clipboard.writeText(link.href) : Promise.reject();
    copied.catch(() => {});
    return link.href;
}"""


def build(demo: gr.Blocks) -> Any:
    """The tab. Returns the event of the first drawing."""
    intro(
        "Write a few words and watch a picture appear out of noise. The noise is not in the picture itself but in its "
        "<b>code</b>, a few numbers that a decoder turns into pixels: that is why it is quick, even without a GPU.",
        ("text", "prompt"),
        ("noise", "noisy code"),
        ("loop", "denoiser, step by step"),
        ("latents", "clean code"),
        ("decoder", "decoder"),
        ("image", "picture"),
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300):
            prompt = gr.Textbox(
                FIRST["prompt"], label="Prompt", placeholder="What shall it draw?", max_lines=3, elem_id="prompt"
            )
            styled = build_composition()
            with gr.Row():
                draw_button = gr.Button("Draw", variant="primary", elem_id="draw", scale=3, min_width=120)
                lucky = gr.Button("Another seed", elem_id="another-seed", scale=2, min_width=120)
            named = {"label": "Examples", "elem_id": "prompt-examples"}
            examples = gr.Examples([[text] for text in PROMPTS], prompt, api_visibility="private", **named)
            seed, *others = build_settings()
            with gr.Accordion("Start from a picture", open=False, elem_id="prompt-image"):
                start = upload(label="Picture to start from", height=200, elem_id="start-picture")
                strength = gr.Slider(0, 1, 0.6, step=0.05, label="Strength: how far to leave it", elem_id="strength")
        with gr.Column(scale=6, min_width=300):
            images = show_many("Pictures", "pictures", 3, elem_classes="emoji", buttons=["download", "fullscreen"])
            told = status("", "draw-status")
            fields = [prompt, seed, *others, *styled]
            extras = build_extras(fields)
    drawing = {"inputs": [*fields, start, strength], "outputs": [images, told], "show_progress_on": told, **SHARED}
    private = {"api_visibility": "private"}
    gr.on([draw_button.click, prompt.submit], draw, **drawing, api_name="draw")
    examples.load_input_event.then(draw, **drawing, **private)
    lucky.click(lambda: random.randrange(10_000), None, seed, **AT_ONCE, **private).then(draw, **drawing, **private)
    changes = [field.change for field in fields]
    gr.on(changes, lambda: [gr.update(visible=False)] * 2, None, extras, **AT_ONCE, **private)
    return demo.load(from_address, None, fields, **AT_ONCE, **private).then(draw_first, **drawing, **private)


def build_composition() -> list[gr.components.Component]:
    """Fields of the style, a second thing and its place."""
    style = gr.Radio([ANY_STYLE, *STYLES], value=FIRST["style"], label="Style", elem_id="style")
    with gr.Row():
        second = gr.Textbox(
            FIRST["second"], label="Second thing", placeholder="none", max_lines=1, elem_id="second", min_width=140
        )
        place = gr.Radio(
            list(PLACES), value=FIRST["place"], label="The first is … the second", elem_id="place", min_width=200
        )
    return [style, second, place]


def build_settings() -> list[gr.components.Component]:
    """Fields of what seldom changes: seed, steps, guidance, scheduler, number of images."""
    with gr.Accordion("More settings", open=False, elem_id="prompt-more"):
        with gr.Row():
            seed = gr.Number(FIRST["seed"], label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
            count = gr.Slider(1, MOST_IMAGES, FIRST["count"], step=1, label="Pictures", elem_id="count", min_width=160)
        steps = gr.Slider(1, MOST_STEPS, FIRST["steps"], step=1, label="Steps", elem_id="steps")
        guidance = gr.Slider(
            1, 10, FIRST["guidance"], step=0.5, label="Guidance: how closely to follow the prompt", elem_id="guidance"
        )
        scheduler = gr.Dropdown(list(SCHEDULERS), value=FIRST["scheduler"], label="Scheduler", elem_id="scheduler")
    return [seed, steps, guidance, scheduler, count]


def build_extras(fields: list[gr.components.Component]) -> list[gr.components.Component]:
    """Below the images: the sheet of steps and seeds, and the link to the drawing. Returns what another drawing makes
    stale."""
    with gr.Row():
        styles_button = gr.Button("Sheet: styles × seeds", size="sm", elem_id="styles-button", min_width=120)
        sheet_button = gr.Button("Sheet: steps × seeds", size="sm", elem_id="sheet-button", min_width=120)
        share_button = gr.Button("Copy a link to this", size="sm", elem_id="share", min_width=120)
    link = gr.Textbox(label="Link to this drawing", visible=False, interactive=False, buttons=["copy"], elem_id="link")
    sheet = show_one("Sheet", "sheet", visible=False, buttons=["download", "fullscreen"])
    prompt, seed, steps, guidance, scheduler, _, style, second, place = fields
    private = {"queue": False, "api_visibility": "private"}
    opening = sheet_button.click(lambda: gr.update(visible=True), None, sheet, **private)
    asked = [prompt, seed, guidance, scheduler, style, second, place]
    opening.then(steps_sheet, asked, sheet, api_name="steps_sheet", **SHARED)
    opening = styles_button.click(lambda: gr.update(visible=True), None, sheet, **private)
    asked = [prompt, seed, steps, guidance, second, place]
    opening.then(styles_sheet, asked, sheet, api_name="styles_sheet", **SHARED)
    sharing = share_button.click(None, fields, link, js=SHARE, api_visibility="private")
    sharing.then(lambda: gr.update(visible=True), None, link, **private)
    return [sheet, link]
