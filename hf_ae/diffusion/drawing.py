"""`hf-ae generate`: a text-to-image pipeline and a prompt -> an image, or a sheet of steps and seeds."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..errors import UserError, user_input
from ..plots import image_grid, labelled_rows


def whole_numbers(text: str) -> list[int]:
    """`"10,15,20"` -> [10, 15, 20]. Raises ValueError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"steps-grid {text!r} must be whole numbers with commas between, such as 10,20,40.") from error


def draw(pipe: Any, prompt: str, steps: int | None, seed: int, count: int, options: dict[str, Any]) -> Any:
    """The pipeline's output, `count` images (count, channels, height, width) in 0…1 with the seeds from `seed` on."""
    options = dict(num_inference_steps=steps, num_images_per_prompt=count, output_type="pt", **options)
    with user_input():
        return pipe(prompt, seed=seed, **options)


def log_caption(prompt: str, output: Any) -> None:
    """Print what the pipeline's prior took the prompt for, if that is another text."""
    if output.captions and output.captions[0].lower() != prompt.lower():
        print(f"Drawn as: {output.captions[0]}")


def draw_images(
    pipe: Any, prompt: str, steps: int | None, seed: int, count: int, options: dict[str, Any]
) -> Image.Image:
    """One image, or several side by side."""
    output = draw(pipe, prompt, steps, seed, count, options)
    log_caption(prompt, output)
    images = output.images
    return image_grid(images, 1 if count == 1 else min(count, 8), cell=images.shape[-2], gap=0 if count == 1 else 2)


def steps_sheet(
    pipe: Any, prompt: str, steps: list[int], seed: int, count: int, options: dict[str, Any]
) -> Image.Image:
    """One row for each number of steps, one column for each seed: what more steps buy."""
    outputs = {f"{n} steps": draw(pipe, prompt, n, seed, count, options) for n in steps}
    log_caption(prompt, next(iter(outputs.values())))
    return labelled_rows({name: output.images for name, output in outputs.items()}, cell=128)
