"""Train any image autoencoder: `accelerate launch -m hf_ae.train [RECIPE.yaml] [--flag value …]`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

import hf_ae
from hf_ae.data import (
    ImagesInMemory,
    ImageStream,
    RandomCrops,
    binarized_once,
    each_batch,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    read_table,
    rows_to_values,
    table_processor,
    to_pixel_values,
)
from hf_ae.errors import UserError, one_line_errors, require, user_input
from hf_ae.hub.cards import write_card
from hf_ae.hub.push import check_publishing, publish
from hf_ae.hub.remote_code import carried_code
from hf_ae.loading import load_model
from hf_ae.plots import labelled_rows
from hf_ae.training.arguments import TrainingArguments, flag, parse_arguments, parse_overrides, write_recipe
from hf_ae.training.checkpoints import keep, load_checkpoint, save_model
from hf_ae.training.collapse import Watch, generative_collapse
from hf_ae.training.layerwise import check_network, pretrain_layerwise
from hf_ae.training.optimizers import averaged
from hf_ae.training.output_folder import begin_run, check_request
from hf_ae.training.processes import on_main
from hf_ae.training.run import Run
from hf_ae.training.start import training
from hf_ae.training.tracking import log_evaluation, log_step, show_samples

MEASURED = (
    "metrics.json", "reconstructions.png", "latent_plane.png", "samples.png", "sampler.safetensors",
    "anomaly_detector.safetensors",
)  # fmt: skip
"""Files that tell of earlier weights."""
OF_IMAGES = (
    "image_column", "streaming", "skip_broken_images", "random_crop", "random_flip", "random_symmetry",
    "random_colors", "random_shift", "binarize",
)  # fmt: skip
"""Flags that a table does not take."""


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """Train any image autoencoder of hf_ae on a Hub dataset or a local folder."""

    model_type: str = flag("hf_ae_autoencoder", f"One of {', '.join(hf_ae.MODELS)}.", choices=tuple(hf_ae.MODELS))
    pretrained_model: str | None = flag(
        None, "Folder or Hub id of a model to fine-tune, as configured, with overrides."
    )
    config_overrides: str | None = flag(None, 'Fields of the configuration: "latent_dim=16,hidden_sizes=[512]".')
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    feature_columns: str | None = flag(None, "Columns of numbers, a,b,c: a table of these instead of images.")
    streaming: bool = flag(False, "Read images as they are needed instead of decoding all into memory.")
    shuffle_buffer_size: int = flag(1000, "Encoded images to draw from when streaming.", least=1)
    skip_broken_images: bool = flag(False, "Leave out images that cannot be read, instead of stopping.")
    random_crop: bool = flag(False, "Cut a window of the model's size out of each image, instead of scaling it.")
    random_flip: bool = flag(False, "Mirror half of the images.")
    random_symmetry: bool = flag(False, "One of the eight symmetries of the square for each image (square images).")
    random_colors: bool = flag(False, "Shuffle the colour channels of two images in three.")
    random_shift: int = flag(0, "Move each image by up to so many pixels.", least=0)
    binarize: bool = flag(False, "Draw each pixel as 0 or 1: anew in training, once for evaluation.")
    pretrain_layerwise_epochs: int = flag(0, "First train each layer of an mlp as a shallow autoencoder.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [name for name in OF_IMAGES if self.feature_columns and getattr(self, name)]
        require(not wrong, f"feature_columns are a table, and {', '.join(wrong)} is for images: leave one out.")
        good = not self.streaming or self.max_train_steps is not None
        require(good, "A stream has no known length: write --max_train_steps.")
        require(
            not (self.streaming and self.random_crop), "random_crop needs the images in memory: leave out --streaming."
        )
        whole = not (self.streaming or self.random_crop)
        why = "pretrain_layerwise_epochs needs all images in memory: leave out --streaming and --random_crop."
        require(whole or not self.pretrain_layerwise_epochs, why)


def main(argv: list[str] | None = None) -> None:
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(ImageTrainingArguments, sys.argv[1:] if argv is None else argv))


def train(args: ImageTrainingArguments) -> None:
    """Everything from the flags to a finished model folder."""
    check_publishing(args)
    resume_from = check_request(args, {})
    with training(args) as accelerator:
        train_model(args, accelerator, resume_from)


def train_model(args: ImageTrainingArguments, accelerator: Accelerator, resume_from: Path | None) -> None:
    """The same where the output folder is this training's own."""
    model = make_model(args)
    images: Any
    if args.feature_columns:
        processor, images, held_out = load_table(args)
    else:
        processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
        images, held_out = load_images(args, processor, progress=accelerator.is_main_process)
    if accelerator.is_main_process:
        begin_run(Path(args.output_dir), replace=args.overwrite_output_dir and resume_from is None)
    if model.needs_dataset_size and not args.streaming:
        model.config.dataset_size = model.config.dataset_size or len(images)
    model.to(accelerator.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.pretrain_layerwise_epochs and resume_from is None:
        pretrain_layerwise(model, images.pixels, args, args.pretrain_layerwise_epochs, accelerator.print)
    batches = 0 if args.streaming else images.num_batches(args.train_batch_size, accelerator.num_processes)
    data = {"streaming": args.streaming, "images": None if args.streaming else len(images)}
    if args.streaming:
        data["shuffle_buffer_size"] = args.shuffle_buffer_size
    with Run(args, accelerator, model, batches, data) as run:
        if resume_from is not None:
            load_checkpoint(run, resume_from)
        take_steps(args, run, images, held_out)
        if args.streaming and images.skipped:
            accelerator.print(f"Skipped {images.skipped} images of the stream that cannot be read, repeats included.")
        finish(args, run, processor, images)


def take_steps(args: ImageTrainingArguments, run: Run, images: Any, held_out: Tensor | None) -> None:
    """Epochs of batches through the model, with logs and checkpoints, and validation in between."""
    accelerator, model = run.accelerator, run.bare_model
    changes: dict[str, Any] = dict(flip=args.random_flip, symmetry=args.random_symmetry, colors=args.random_colors)
    changes |= dict(shift=args.random_shift, binarize=args.binarize)
    watch = Watch(model, run.print)
    run.open()
    while run.unfinished:
        for pixels in images.batches(args.train_batch_size, run.progress.epoch, **run.place):
            with accelerator.accumulate(run.model):
                output = run.model(to_pixel_values(pixels, accelerator.device, model.config.pixel_range, **changes))
                accelerator.backward(output.loss)
                run.update_weights()
            if run.step_done(output, len(pixels)):
                if run.every(args.logging_steps):
                    log_step(run, output)
                    watch(run.progress.step)
                keep(run)
            if not run.unfinished:
                break
        else:
            run.next_epoch()
        if run.validation_due and held_out is not None and accelerator.is_main_process:
            with run.clock.paused():
                validate(run, held_out)
    run.close()


def make_model(args: ImageTrainingArguments) -> Any:
    """A new model of `args.model_type`, or the one to fine-tune, with its overrides. Raises ValueError."""
    source = load_model(args.pretrained_model)[0] if args.pretrained_model else None
    known = {}
    if source is not None:
        known = {f.name: getattr(source.config, f.name) for f in dataclasses.fields(source.config) if f.init}
    set_seed(args.seed)
    cls: Any = hf_ae.MODELS[args.model_type] if source is None else type(source)
    if args.feature_columns and source is None:
        known = dict(image_size=[1, len(columns_of(args))], num_channels=1, network="mlp", pixel_range=[-1.0, 1.0])
    with user_input():
        config = cls.config_class(**{**known, **parse_overrides(args.config_overrides)})
    square = config.image_hw[0] == config.image_hw[1]
    size = f"image_size={config.image_size} must be square: use random_flip"
    require(square or not args.random_symmetry, f"random_symmetry turns images by 90°, so {size}.")
    if args.pretrain_layerwise_epochs:
        check_network(config)
    model = cls(config)
    if source is not None:
        try:
            model.load_state_dict(source.state_dict())
        except RuntimeError as error:
            reason, name = str(error).strip().splitlines()[-1].strip(), args.pretrained_model
            raise UserError(f"config_overrides change the shape of the weights of {name}: {reason}") from error
    return model


def load_images(args: ImageTrainingArguments, processor: Any, progress: bool) -> tuple[Any, Tensor | None]:
    """Training images (in memory or streamed), and uint8 evaluation images or None."""
    splits = open_dataset(str(args.dataset_name), args.dataset_config_name, args.streaming)
    rows = pick_split(splits, args.train_split)
    name = (args.eval_split or held_out_name(splits)) if args.validation_epochs else None
    held_out = None if name is None else pick_split(splits, name)
    column, skip, limit = image_column(rows, args.image_column), args.skip_broken_images, args.max_train_samples
    advice = "Leave such rows out with --skip_broken_images."
    images: Any
    if args.streaming:
        images = ImageStream(rows, column, processor, skip, limit, args.shuffle_buffer_size, advice)
    else:
        if progress:
            note_lost_colors(rows, column, processor)
        kind = RandomCrops if args.random_crop else ImagesInMemory
        images = kind.load(rows, column, processor, skip, limit, progress, advice)
    if held_out is None:
        if args.validation_epochs and progress:
            only = ", ".join(splits)
            print(f"The dataset has only {only}: training without evaluation (--eval_split names another split).")
        return images, None
    pixels = ImagesInMemory.load(held_out, column, processor, skip, args.max_eval_samples, progress, advice).pixels
    return images, binarized_once(pixels) if args.binarize else pixels


def columns_of(args: ImageTrainingArguments) -> list[str]:
    """The names in `args.feature_columns`."""
    return [name.strip() for name in (args.feature_columns or "").split(",") if name.strip()]


def load_table(args: ImageTrainingArguments) -> tuple[Any, ImagesInMemory, Tensor | None]:
    """(processor with the standardisation of the training rows, these rows, evaluation rows or None)."""
    splits, columns = open_dataset(str(args.dataset_name), args.dataset_config_name), columns_of(args)
    rows = pick_split(splits, args.train_split)
    rows = rows.select(range(min(len(rows), args.max_train_samples or len(rows))))
    table = read_table(rows, columns)
    processor = table_processor(table, columns)
    with user_input():
        values = processor.standardized(table)
    name = (args.eval_split or held_out_name(splits)) if args.validation_epochs else None
    held_out = None if name is None else rows_to_values(pick_split(splits, name), processor)[: args.max_eval_samples]
    return processor, ImagesInMemory(values), held_out


def note_lost_colors(rows: Any, column: str, processor: Any) -> None:
    """Say so where the first image has colours and the model is gray."""
    try:
        first = rows[0][column]
    except (OSError, ValueError, SyntaxError):  # unreadable, which is said when it is its turn
        return
    if processor.num_channels == 1 and getattr(first, "mode", "L") not in ("1", "L", "LA", "I", "F", "I;16"):
        print(
            "The images have colours and become gray: for a model of colours write num_channels=3 in config_overrides."
        )


@torch.no_grad()
def validate(run: Run, pixels: Tensor) -> None:
    """Losses on held-out images, and a figure of some of them, with the averaged weights if there are any. Of a model
    that denoises: losses on images that are always damaged in the same way."""
    accelerator, model = run.accelerator, run.bare_model.eval()
    totals: dict[str, float] = {}
    latents = None  # of the first batch
    how = {"corrupt": True} if model.can_denoise else {}
    with averaged(model, run.ema), fixed_random(accelerator.device):
        for batch in each_batch(pixels):
            values = to_pixel_values(batch, accelerator.device, model.config.pixel_range)
            with accelerator.autocast():
                output = model(values, **how)
            latents = output.latents if latents is None else latents
            for name, term in {**output.losses, **(output.measures or {})}.items():
                totals[name] = totals.get(name, 0.0) + float(term) * len(batch) / len(pixels)
        shown = to_pixel_values(pixels[:12], accelerator.device, model.config.pixel_range)
        samples = None if pixels.is_floating_point() else draw_samples(model, shown)  # a table is no picture
    model.train()
    log_evaluation(run, totals)
    for warning in generative_collapse(model, totals, latents):
        run.print(f"warning: {warning}")
    if samples is not None:
        show_samples(run, partial(labelled_rows, samples))


@contextlib.contextmanager
def fixed_random(device: torch.device) -> Iterator[None]:
    """Always the same random numbers inside; outside they go on as if there had been none."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def draw_samples(model: Any, values: Tensor) -> dict[str, Tensor]:
    """Rows of a figure, in 0…1: original, what the encoder saw where that differs, reconstruction, samples."""
    low, high = model.config.pixel_range
    rows = {"original": values}
    if model.can_denoise:
        rows["damaged"] = model.corrupt(values, torch.Generator(values.device).manual_seed(0))
        rows["reconstruction"] = model(rows["damaged"], corrupt=False).reconstruction
    else:
        rows["reconstruction"] = model(values).reconstruction
    if model.can_sample:
        z = torch.randn(len(values), *model.config.latent_shape, generator=torch.Generator().manual_seed(0))
        rows["decoded\nN(0, 1)"] = model.decode(z.to(values.device)).sample
    return {name: (pixels - low) / (high - low) for name, pixels in rows.items()}


@torch.no_grad()
def count_codes(model: Any, images: Any, most: int = 10_000) -> None:
    """How often up to `most` training images use each codeword: the frequencies that the codec codes indices with."""
    size = min(64, most)
    for pixels in itertools.islice(images.batches(size, epoch=0, full=False), most // size):
        values = to_pixel_values(pixels, model.device, model.config.pixel_range)
        model.count_indices(model.eval().encode(values).indices)


@torch.no_grad()
def latent_scale(model: Any, images: Any, most: int = 1024) -> float:
    """1 / standard deviation of the latents of up to `most` training images: a VAE's `scaling_factor`. Of one number
    alone it is 1."""
    latents, size = [], min(64, most)
    for pixels in itertools.islice(images.batches(size, epoch=0, full=False), most // size):
        values = to_pixel_values(pixels, model.device, model.config.pixel_range)
        latents.append(model.eval().encode(values).latents)
    values = torch.cat(latents)
    return round(1 / values.std().clamp(min=1e-6).item(), 6) if values.numel() > 1 else 1.0


def finish(args: ImageTrainingArguments, run: Run, processor: Any, images: Any) -> None:
    """Save the final model as a complete model repository, and push it where that is asked."""

    def complete() -> None:
        model, folder = run.bare_model, Path(args.output_dir)
        if run.ema is not None:
            run.ema.copy_to(model.parameters())
        for name in MEASURED:
            (folder / name).unlink(missing_ok=True)
        old_code = set(carried_code(folder))
        save_model(model, folder, args.save_dtype)
        processor.save_pretrained(folder)
        for path in old_code.difference(carried_code(folder)):
            path.unlink()  # of another version
        write_recipe(args, folder / "recipe.yaml")
        write_card(folder)
        if measure(model, images):  # only now, since it reads the data again
            save_model(model, folder, args.save_dtype)
        command = "use it with  hf-ae encode" if args.feature_columns else "measure it with  hf-ae evaluate"
        advice = f"{command} {folder} --dataset_name {args.dataset_name}"
        advice += f" -o {folder}-codes" if args.feature_columns else ""
        run.print(f"The model is in {folder}: {advice}")
        publish(args, run.print)

    on_main(run.accelerator, complete)
    run.end()


def measure(model: Any, images: Any) -> bool:
    """Give a finished model what is measured on training images, where its kind has such things; whether it has."""
    if model.can_sample and model.config.latent_channels is not None:
        model.config.scaling_factor = latent_scale(model, images)
    if model.has_discrete_codes:
        count_codes(model, images)
    return bool(model.has_discrete_codes or (model.can_sample and model.config.latent_channels is not None))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
