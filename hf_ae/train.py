"""Train any image autoencoder: `accelerate launch -m hf_ae.train [RECIPE.yaml] [--flag value …]`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

import hf_ae
from hf_ae.training.arguments import (
    TrainingArguments,
    check_output_dir,
    find_checkpoint,
    flag,
    one_line_errors,
    parse_arguments,
    parse_overrides,
    write_recipe,
)
from hf_ae.hub.cards import write_card
from hf_ae.training.collapse import Watch, generative_collapse
from hf_ae.data.images import (
    ImagesInMemory,
    ImageStream,
    RandomCrops,
    batch_for,
    binarized_once,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    to_pixel_values,
)
from hf_ae.evaluation.evaluate import load_model
from hf_ae.hub.push import check_login, push_folder
from hf_ae.plots import labelled_rows
from hf_ae.training.layerwise import pretrain_layerwise
from hf_ae.training.run import Run, averaged, begin, clear_output, end, make_accelerator, optimize, save_model, show_samples


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """Train any image autoencoder of hf_ae on a Hub dataset or a local folder."""

    model_type: str = flag("hf_ae_autoencoder", f"One of {', '.join(hf_ae.MODELS)}.")
    pretrained_model: str | None = flag(None, "Folder or Hub id of a model to fine-tune; its configuration counts, with your overrides.")
    config_overrides: str | None = flag(None, 'Fields of the configuration: "latent_dim=16,hidden_sizes=[512]".')
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    streaming: bool = flag(False, "Read images as they are needed instead of decoding all into memory.")
    shuffle_buffer_size: int = flag(1000, "Encoded images to draw from when streaming.")
    skip_broken_images: bool = flag(False, "Leave out images that cannot be read, instead of stopping.")
    random_crop: bool = flag(False, "Cut a window of the model's size out of each image, at a random place, instead of scaling it.")
    random_flip: bool = flag(False, "Mirror half of the images.")
    random_symmetry: bool = flag(False, "Turn and mirror images: one of the eight symmetries of the square for each (square images).")
    random_colors: bool = flag(False, "Shuffle the colour channels of two images in three.")
    random_shift: int = flag(0, "Move each image by up to so many pixels.")
    binarize: bool = flag(False, "Draw each pixel as 0 or 1: anew in training, once for evaluation.")
    pretrain_layerwise_epochs: int = flag(0, "First train each layer of an mlp as a shallow autoencoder, so many epochs each.")


def main(argv: list[str] | None = None):
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(ImageTrainingArguments, sys.argv[1:] if argv is None else argv))


def train(args: ImageTrainingArguments):
    """Everything from the flags to a finished model folder."""
    output, model = Path(args.output_dir), make_model(args)
    resume_from = check_request(args, output)
    accelerator = make_accelerator(args, output)
    processor = hf_ae.AutoencoderImageProcessor.from_config(model.config)
    images, held_out = load_images(args, processor, quiet=not accelerator.is_main_process)
    if accelerator.is_main_process:
        clear_output(output, everything=args.overwrite_output_dir and resume_from is None)
    if getattr(model.config, "objective", None) == "total_correlation" and not args.streaming:
        model.config.dataset_size = model.config.dataset_size or len(images)
    model.to(accelerator.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.pretrain_layerwise_epochs and resume_from is None:
        pretrain_layerwise(model, images, args, accelerator.device, accelerator.print)
    batches = 0 if args.streaming else images.num_batches(args.train_batch_size, accelerator.num_processes)
    data = {"streaming": args.streaming, "images": None if args.streaming else len(images)}
    run = begin(args, accelerator, model, batches, data, resume_from)
    loop(args, run, images, held_out, output)
    if args.streaming and images.decode.skipped:
        accelerator.print(f"Skipped {images.decode.skipped} images of the stream that cannot be read, repeats included.")
    finish(args, run, processor, output, images)


def loop(args, run: Run, images, held_out, output: Path):
    """Epochs of batches through the model."""
    device, pixel_range = run.accelerator.device, run.bare_model.config.pixel_range
    changes = dict(flip=args.random_flip, symmetry=args.random_symmetry, colors=args.random_colors)
    changes |= dict(shift=args.random_shift, binarize=args.binarize)

    watch = Watch(run.bare_model, run.accelerator.print)

    def forward(pixels):
        output = run.model(to_pixel_values(pixels, device, pixel_range, **changes))
        if run.progress.step % args.logging_steps == 0:
            watch(output.losses, run.progress.step)
        return output

    def measure():
        validate(args, run, held_out, output)

    optimize(args, run, images.batches, forward, None if held_out is None else measure, output)


def make_model(args):
    """A new model of `args.model_type`, or the one to fine-tune, with its overrides."""
    if args.model_type not in hf_ae.MODELS:
        raise ValueError(f"model_type={args.model_type!r} is not known: write one of {', '.join(hf_ae.MODELS)}.")
    source = load_model(args.pretrained_model)[0] if args.pretrained_model else None
    known = {} if source is None else {f.name: getattr(source.config, f.name) for f in dataclasses.fields(source.config) if f.init}
    set_seed(args.seed)
    cls = hf_ae.MODELS[args.model_type] if source is None else type(source)
    config = cls.config_class(**{**known, **parse_overrides(args.config_overrides)})
    if args.random_symmetry and config.image_hw[0] != config.image_hw[1]:
        raise ValueError(f"random_symmetry turns images by 90°, so image_size={config.image_size} must be square: use random_flip.")
    model = cls(config)
    if source is not None:
        try:
            model.load_state_dict(source.state_dict())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"config_overrides change the shape of the weights of {args.pretrained_model}: {reason}") from None
    return model


def check_request(args, output: Path) -> Path | None:
    """Raise ValueError for what cannot work, before anything is loaded; returns the checkpoint to go on from."""
    if args.dataset_name is None:
        raise ValueError("Which dataset? Write --dataset_name with a Hub id or a folder.")
    if args.streaming and args.max_train_steps is None:
        raise ValueError("A stream has no known length: write --max_train_steps.")
    if args.streaming and args.random_crop:
        raise ValueError("random_crop needs the images in memory: leave out --streaming.")
    if args.push_to_hub:
        check_login()
    check_output_dir(output, args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    return find_checkpoint(args.resume_from_checkpoint, output)


def load_images(args, processor, quiet: bool):
    """Training images (in memory or streamed), and uint8 evaluation images or None."""
    parts = open_dataset(args.dataset_name, args.dataset_config_name, args.streaming)
    dataset = pick_split(parts, args.train_split)
    column, limit = image_column(dataset, args.image_column), args.max_train_samples

    def progress(iterator, total):
        return tqdm(iterator, total=total, desc="decoding", disable=quiet, mininterval=1.0)

    if args.streaming:
        images = ImageStream(dataset, column, processor, args.skip_broken_images, limit, args.shuffle_buffer_size)
    else:
        kind = RandomCrops if args.random_crop else ImagesInMemory
        images = kind.load(dataset, column, processor, args.skip_broken_images, limit, progress)
    name = args.eval_split or held_out_name(parts)
    if not args.validation_epochs or name is None:
        if args.validation_epochs and not quiet:
            print(f"The dataset has only {', '.join(parts)}: training without evaluation (--eval_split names another split).")
        return images, None
    held_out = pick_split(parts, name)
    pixels = ImagesInMemory.load(held_out, column, processor, args.skip_broken_images, args.max_eval_samples, progress).pixels
    return images, binarized_once(pixels) if args.binarize else pixels


@torch.no_grad()
def validate(args, run: Run, pixels: torch.Tensor, output: Path):
    """Losses on held-out images, and a picture of some of them, with the averaged weights if there are any."""
    accelerator, progress = run.accelerator, run.progress
    if not accelerator.is_main_process:
        return
    model = run.bare_model
    model.eval()
    totals: dict[str, float] = {}
    codes = None  # of the first batch
    with averaged(model, run.ema):
        for batch in pixels.split(batch_for(pixels[0].numel())):
            values = to_pixel_values(batch, accelerator.device, model.config.pixel_range)
            with accelerator.autocast():
                result = model(values)
            codes = result.latents if codes is None else codes
            for name, term in {**result.losses, **(result.measures or {})}.items():
                totals[name] = totals.get(name, 0.0) + float(term) * len(batch) / len(pixels)
        picture = draw_samples(model, to_pixel_values(pixels[:12], accelerator.device, model.config.pixel_range))
    model.train()
    tqdm.write(f"step {progress.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in totals.items()))
    for warning in generative_collapse(model, totals, codes):
        tqdm.write(f"warning: {warning}")
    show_samples(args, run, partial(labelled_rows, picture), output)
    if args.report_to != "none":
        accelerator.log({f"eval/{name}": value for name, value in totals.items()}, step=progress.step)


def draw_samples(model, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows for a sample picture, in 0…1: original, what the encoder saw where that differs, reconstruction, samples."""
    low, high = model.config.pixel_range
    rows = {"original": values}
    if hasattr(model.config, "corruption"):
        rows["damaged"] = model.corrupt(values, torch.Generator(values.device).manual_seed(0))
        rows["reconstruction"] = model(rows["damaged"], corrupt=False).reconstruction
    else:
        rows["reconstruction"] = model(values).reconstruction
    if hasattr(model.config, "kl_weight"):
        z = torch.randn(len(values), *model.config.code_shape, generator=torch.Generator().manual_seed(0))
        rows["decoded\nN(0, 1)"] = model.decode(z.to(values.device)).sample
    return {name: (pixels - low) / (high - low) for name, pixels in rows.items()}


@torch.no_grad()
def count_codes(model, images, device, most: int = 10_000):
    """How often up to `most` training images use each codeword: the frequencies that the codec codes indices with."""
    size = min(64, most)
    for pixels in itertools.islice(images.batches(size, epoch=0), most // size):
        model.count_indices(model.eval().encode(to_pixel_values(pixels, device, model.config.pixel_range)).indices)


@torch.no_grad()
def latent_scale(model, images, most: int = 1024) -> float:
    """1 / standard deviation of the latents of up to `most` training images: a VAE's `scaling_factor`."""
    batches, latents = images.batches(min(64, most), epoch=0), []
    for pixels in itertools.islice(batches, most // 64):
        values = to_pixel_values(pixels, model.device, model.config.pixel_range)
        latents.append(model.eval().encode(values).latents)
    return round(1 / torch.cat(latents).std().clamp(min=1e-6).item(), 6)


def finish(args, run: Run, processor, output: Path, images):
    """Save the final model as a complete model repository, and push it where that is asked."""
    accelerator, model = run.accelerator, run.bare_model
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if run.ema is not None:
            run.ema.copy_to(model.parameters())
        for measured in (
            "metrics.json",
            "reconstructions.png",
            "latent_plane.png",
            "samples.png",
            "sampler.safetensors",
        ):  # of earlier weights
            (output / measured).unlink(missing_ok=True)
        if hasattr(model.config, "kl_weight") and model.config.latent_channels is not None:
            model.config.scaling_factor = latent_scale(model, images)
        if hasattr(model, "count_indices"):
            count_codes(model, images, accelerator.device)
        save_model(model, output, args.save_dtype)
        processor.save_pretrained(output)
        write_recipe(args, output / "recipe.yaml")
        write_card(output)
        (output / ".hf_ae_run").unlink(missing_ok=True)
        accelerator.print(f"The model is in {output}: measure it with  hf-ae evaluate {output} --dataset_name {args.dataset_name}")
        if args.push_to_hub:
            repo = args.hub_model_id or output.resolve().name
            accelerator.print(f"Pushed to {push_folder(output, repo, args.hub_private)}")
    end(run)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
