"""`hf-ae generate`: a text-to-image pipeline and a prompt -> a picture, or a sheet of steps and seeds."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..models.image_processing import open_image, to_mode
from ..plots import image_grid, labelled_rows

DEFAULT = Path(__file__).resolve().parent.parent.parent / "model_cards" / "emoji-text-to-image"
"""The pipeline that a checkout carries."""


def load_pipeline(name: str | None = None, scheduler: str | None = None):
    """The text-to-image pipeline of a folder or Hub id, with another diffusers scheduler where asked. Raises ValueError."""
    import diffusers

    from ..pipelines import TextToImagePipeline

    if name is None and not (DEFAULT / "model_index.json").is_file():
        raise ValueError("Which pipeline? Write --model with a folder or a Hub id.")
    name = str(DEFAULT) if name is None else name
    if name.count("/") != 1 and not Path(name).is_dir():
        raise ValueError(f"The pipeline {name} is neither a folder nor a Hub id (owner/name).")
    try:
        pipe = TextToImagePipeline.from_pretrained(name)
    except Exception as error:  # not there, damaged, offline: each library has its own exceptions
        raise ValueError(f"The pipeline {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if scheduler is not None:
        cls = getattr(diffusers, scheduler, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
            raise ValueError(f"diffusers has no scheduler {scheduler!r}: write DDIMScheduler, DPMSolverMultistepScheduler, …")
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
    return pipe


def open_picture(path: Path) -> Image.Image:
    """An image file as RGB, transparency on white."""
    return to_mode(open_image(path), 3)


def numbers(text: str) -> list[int]:
    """`"10,15,20"` -> [10, 15, 20]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"steps-grid {text!r} must be whole numbers with commas between, such as 10,20,40.") from None


def draw(pipe, prompt: str, steps: int | None, seed: int, count: int, options: dict):
    """The pipeline's output, `count` pictures (count, channels, height, width) in 0…1 with the seeds from `seed` on."""
    return pipe(prompt, seed=seed, num_inference_steps=steps, num_images_per_prompt=count, output_type="pt", **options)


def say_caption(prompt: str, output):
    """Print what the pipeline's prior took the prompt for, if that is another text."""
    if output.captions and output.captions[0].lower() != prompt.lower():
        print(f"Drawn as: {output.captions[0]}")


def pictures(pipe, prompt: str, steps: int | None, seed: int, count: int, options: dict) -> Image.Image:
    """One picture, or several side by side."""
    output = draw(pipe, prompt, steps, seed, count, options)
    say_caption(prompt, output)
    images = output.images
    return image_grid(images, 1 if count == 1 else min(count, 8), cell=images.shape[-2], gap=0 if count == 1 else 2)


def steps_sheet(pipe, prompt: str, steps: list[int], seed: int, count: int, options: dict) -> Image.Image:
    """One row for each number of steps, one column for each seed: what more steps buy."""
    outputs = {f"{number} steps": draw(pipe, prompt, number, seed, count, options) for number in steps}
    say_caption(prompt, next(iter(outputs.values())))
    return labelled_rows({name: output.images for name, output in outputs.items()}, cell=128)
