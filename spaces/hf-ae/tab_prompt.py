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
PROMPTS = [
    "birthday cake", "a slice of pizza", "cat face", "rocket", "rainbow", "octopus", "something sweet", "in love",
    "halloween",
]  # fmt: skip
FIRST = {"prompt": "birthday cake", "seed": 1, "steps": 10, "guidance": 2.0, "scheduler": "DPM-Solver++", "count": 1}
"""What the page draws when it opens."""


def checked(prompt: str, seed: int, steps: int, guidance: float, scheduler: str, count: int = 1) -> dict[str, Any]:
    """The settings of a drawing, within what this Space draws. Raises ValueError."""
    prompt = str(prompt or "").strip()
    if not prompt:
        raise ValueError("Write what to draw first, such as: birthday cake.")
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
    picture: str | None = None,
    strength: float = 0.6,
) -> Iterator[tuple[Any, str]]:
    """Draw small pictures (64×64, in the style of emoji) of a prompt by latent diffusion, with a preview after each
    step.

    Args:
        prompt: What to draw, at most 300 letters. The model knows what emoji show: animals, food, faces, things,
            symbols.
        seed: The same seed draws the same picture again.
        steps: Denoising steps, 1 to 50. Ten are enough.
        guidance: How closely to follow the prompt, 1 (freely) to 10.
        scheduler: DPM-Solver++, DDIM, DDPM, Euler, "Euler, ancestral" or UniPC.
        count: How many pictures to draw, 1 to 6, with the seeds from `seed` on.
        picture: A picture to start from, if any.
        strength: How far to leave that picture: 0 not at all, 1 entirely.

    Returns:
        The pictures, and a line that says what the prompt was taken for and how long it took.
    """
    options = checked(prompt, seed, steps, guidance, scheduler, count) | start_image(picture, strength)
    if not is_loaded("pipeline", "emoji-text-to-image"):
        yield gr.skip(), status_html("Loading the model: this happens once …")
    pipe, started = pipeline_with(scheduler), time.perf_counter()
    for output in pipe.stream(**options):
        if hasattr(output, "step") and output.step < output.num_steps:
            yield output.images, status_html(f"Step {output.step} of {output.num_steps}")
    taken = (output.captions or [""])[0]
    drawn_as = f"Drawn as “{taken}”, " if taken and taken.lower() != options["prompt"].lower() else "Drawn "
    yield output.images, status_html(f"{drawn_as}in {time.perf_counter() - started:.2f} s.")


@GPU
@friendly
def steps_sheet(prompt: str, seed: int = 1, guidance: float = 2.0, scheduler: str = "DPM-Solver++") -> Image.Image:
    """Draw one prompt with 2, 4, 6, 10 and 20 denoising steps (rows) and four seeds (columns): see what more steps
    buy.

    Args:
        prompt: What to draw, at most 300 letters.
        seed: The first of the four seeds.
        guidance: How closely to follow the prompt, 1 (freely) to 10.
        scheduler: DPM-Solver++, DDIM, DDPM, Euler, "Euler, ancestral" or UniPC.

    Returns:
        The sheet, one picture.
    """
    from hf_ae.plots import labelled_rows

    options = checked(prompt, seed, 1, guidance, scheduler)
    pipe, rows = pipeline_with(scheduler), {}
    for steps in SHEET_STEPS:
        drawing = options | {"num_inference_steps": steps, "num_images_per_prompt": SHEET_SEEDS}
        rows[f"{steps} steps"] = pipe(**drawing, output_type="pt").images
    return labelled_rows(rows, cell=128)


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
    values["scheduler"] = asked["scheduler"] if asked.get("scheduler") in SCHEDULERS else FIRST["scheduler"]
    return list(values.values())


SHARE = """(prompt, seed, steps, guidance, scheduler, count) => {
    const link = new URL(window.location.href), fields = {prompt, seed, steps, guidance, scheduler, count};
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
            fields = [prompt, seed, *others]
            extras = build_extras(fields)
    drawing = {"inputs": [*fields, start, strength], "outputs": [images, told], "show_progress_on": told, **SHARED}
    private = {"api_visibility": "private"}
    gr.on([draw_button.click, prompt.submit], draw, **drawing, api_name="draw")
    examples.load_input_event.then(draw, **drawing, **private)
    lucky.click(lambda: random.randrange(10_000), None, seed, **AT_ONCE, **private).then(draw, **drawing, **private)
    changes = [field.change for field in fields]
    gr.on(changes, lambda: [gr.update(visible=False)] * 2, None, extras, **AT_ONCE, **private)
    return demo.load(from_address, None, fields, **AT_ONCE, **private).then(draw_first, **drawing, **private)


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
        sheet_button = gr.Button("Sheet: steps × seeds", size="sm", elem_id="sheet-button", min_width=120)
        share_button = gr.Button("Copy a link to this", size="sm", elem_id="share", min_width=120)
    link = gr.Textbox(label="Link to this drawing", visible=False, interactive=False, buttons=["copy"], elem_id="link")
    sheet = show_one("What more steps buy", "sheet", visible=False, buttons=["download", "fullscreen"])
    prompt, seed, _, guidance, scheduler, _ = fields
    private = {"queue": False, "api_visibility": "private"}
    opening = sheet_button.click(lambda: gr.update(visible=True), None, sheet, **private)
    opening.then(steps_sheet, [prompt, seed, guidance, scheduler], sheet, api_name="steps_sheet", **SHARED)
    sharing = share_button.click(None, fields, link, js=SHARE, api_visibility="private")
    sharing.then(lambda: gr.update(visible=True), None, link, **private)
    return [sheet, link]
