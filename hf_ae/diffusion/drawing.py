"""`hf-ae generate`: a text-to-image pipeline and a prompt -> an image, or a sheet of steps and seeds."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from PIL import Image

from ..errors import UserError, require, user_input
from ..loading import opening, pipeline_image_processor
from ..plots import image_grid, labelled_rows


def whole_numbers(text: str) -> list[int]:
    """`"10,15,20"` -> [10, 15, 20]. Raises ValueError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"steps-grid {text!r} must be whole numbers with commas between, such as 10,20,40.") from error


def load_adapters(pipe: Any, source: str) -> None:
    """Low-rank adapters for the denoiser, of a folder or a Hub id. Raises ValueError."""
    if find_spec("peft") is None:
        raise UserError('Adapters need peft: pip install "hf_ae[lora]".')
    with opening("adapters", source):
        pipe.load_lora_weights(source)


def starting_image(pipe: Any, given: dict[str, Any], height: int | None, width: int | None) -> dict[str, Any]:
    """`image` and `mask_image`, cut to the size that is drawn. Raises ValueError."""
    if not given:
        return {}
    processor = pipeline_image_processor(pipe)
    own = processor.target_size()
    size = {"height": height or own[0], "width": width or own[1]}
    sizes = {name: one.size for name, one in given.items()}
    same = f"The mask has {sizes.get('mask_image')} pixels, the image {sizes.get('image')}: make them equally large."
    with user_input():
        require(len(set(sizes.values())) == 1, same)
        pixels = {name: processor.preprocess(one, size=size).pixel_values for name, one in given.items()}
    images = {name: processor.postprocess(values)[0] for name, values in pixels.items()}
    return images | ({"mask_image": images["mask_image"].convert("L")} if "mask_image" in images else {})


def draw(pipe: Any, prompt: str | None, steps: int | None, seed: int, count: int, options: dict[str, Any]) -> Any:
    """The pipeline's output, `count` images (count, channels, height, width) in 0…1 with the seeds from `seed` on."""
    options = dict(num_inference_steps=steps, num_images_per_prompt=count, output_type="pt", **options)
    with user_input():
        return pipe(prompt, seed=seed, **options)


def log_caption(prompt: str | None, output: Any) -> None:
    """Print what the pipeline's prior took the prompt for, if that is another text."""
    if prompt and output.captions and output.captions[0].lower() != prompt.lower():
        print(f"Drawn as: {output.captions[0]}")


def draw_images(
    pipe: Any, prompt: str | None, steps: int | None, seed: int, count: int, options: dict[str, Any]
) -> Image.Image:
    """One image, or several side by side."""
    output = draw(pipe, prompt, steps, seed, count, options)
    log_caption(prompt, output)
    if output.scores:
        said = ", ".join(f"{'yes' if score > 0.5 else 'no'} ({score:.2f})" for score in output.scores)
        print(f"Does it show the prompt? The discriminator says: {said}.")
    images = output.images
    return image_grid(images, 1 if count == 1 else min(count, 8), cell=images.shape[-2], gap=0 if count == 1 else 2)


def steps_sheet(
    pipe: Any, prompt: str | None, steps: list[int], seed: int, count: int, options: dict[str, Any]
) -> Image.Image:
    """One row for each number of steps, one column for each seed: what more steps buy."""
    outputs = {f"{n} steps": draw(pipe, prompt, n, seed, count, options) for n in steps}
    log_caption(prompt, next(iter(outputs.values())))
    return labelled_rows({name: output.images for name, output in outputs.items()}, cell=128)
