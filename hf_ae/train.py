"""Train any image autoencoder: `accelerate launch -m hf_ae.train [RECIPE.yaml] [--flag value …]`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers.utils import logging

import hf_ae
from hf_ae.data import (
    ImagesInMemory,
    ImageStream,
    batch_for,
    binarized_once,
    held_out_name,
    image_column,
    open_dataset,
    pick_split,
    to_pixel_values,
)
from hf_ae.hub import check_login, push_folder, write_card
from hf_ae.plots import labelled_rows
from hf_ae.pretraining import pretrain_layerwise
from hf_ae.training import (
    FiniteGuard,
    NonFiniteLossError,
    Progress,
    Run,
    TrainingArguments,
    averaged,
    check_output_dir,
    checkpoints,
    find_checkpoint,
    flag,
    load_checkpoint,
    make_ema,
    make_optimizers,
    make_schedulers,
    one_line_errors,
    parse_arguments,
    parse_overrides,
    save_checkpoint,
    save_model,
)


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """Train any image autoencoder of hf_ae on a Hub dataset or a local folder."""

    model_type: str = flag("hf_ae_autoencoder", f"One of {', '.join(hf_ae.MODELS)}.")
    config_overrides: str | None = flag(None, 'Fields of the configuration: "latent_dim=16,hidden_sizes=[512]".')
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    streaming: bool = flag(False, "Read images as they are needed instead of decoding all into memory.")
    shuffle_buffer_size: int = flag(1000, "Encoded images to draw from when streaming.")
    skip_broken_images: bool = flag(False, "Leave out images that cannot be read, instead of stopping.")
    random_flip: bool = flag(False, "Mirror half of the images.")
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
    run = start(args, accelerator, model, images, resume_from)
    try:
        loop(args, run, images, held_out, output)
    except NonFiniteLossError as error:
        good = next(reversed(checkpoints(output)), None)
        advice = f"The last good checkpoint is {good}." if good else "No checkpoint was written before."
        raise NonFiniteLossError(f"{error} {advice} Try a lower --learning_rate or --max_grad_norm 1.0.") from None
    finish(args, run, processor, output)


def start(args, accelerator, model, images, resume_from: Path | None) -> Run:
    """The model, its optimizers, schedules and moving average, new or as a checkpoint left them."""
    model.to(accelerator.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.pretrain_layerwise_epochs and resume_from is None:
        pretrain_layerwise(model, images, args, accelerator.device, accelerator.print)
    optimizers, ema = make_optimizers(model, args), make_ema(model, args)
    steps = args.max_train_steps
    if steps is None:
        batches = images.num_batches(args.train_batch_size, accelerator.num_processes)
        steps = max(1, args.num_train_epochs * batches // args.gradient_accumulation_steps)
    schedulers = make_schedulers(optimizers, args, steps)
    model = accelerator.prepare(model)
    if accelerator.scaler is not None:  # fp16 alone needs accelerate's wrapper, which costs a small model 5% of its time
        optimizers = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    data = {name: getattr(args, name) for name in ("train_batch_size", "gradient_accumulation_steps", "seed", "streaming")}
    data["images"] = None if args.streaming else len(images)
    run = Run(accelerator, model, optimizers, schedulers, ema, Progress(), steps, data)
    set_seed(args.seed, device_specific=True)
    if resume_from is not None:
        load_checkpoint(run, resume_from)
        accelerator.print(f"Going on from {resume_from.name}.")
    if args.report_to != "none":
        accelerator.init_trackers("hf_ae", config=trackable(args))
    return run


def loop(args, run: Run, images, held_out, output: Path):
    """Epochs of steps, with reports, checkpoints and validation in between."""
    accelerator, model, progress = run.accelerator, run.model, run.progress
    config = run.bare_model.config
    share = dict(seed=args.seed, rank=accelerator.process_index, processes=accelerator.num_processes)
    changes = dict(flip=args.random_flip, shift=args.random_shift, binarize=args.binarize)
    parameters, guard, clock = list(model.parameters()), FiniteGuard(accelerator.device), Clock()
    bar = tqdm(total=run.total_steps, initial=progress.step, disable=not accelerator.is_main_process, mininterval=1.0, desc="training")
    model.train()
    with bar:
        while progress.step < run.total_steps:
            for pixels in images.batches(args.train_batch_size, progress.epoch, start=progress.batch, **share):
                with accelerator.accumulate(model):
                    result = model(to_pixel_values(pixels, accelerator.device, config.pixel_range, **changes))
                    accelerator.backward(result.loss)
                    if accelerator.sync_gradients:
                        if args.max_grad_norm is not None:
                            accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                        for optimizer in run.optimizers:
                            optimizer.step()
                            optimizer.zero_grad()
                progress.batch += 1
                clock.saw(len(pixels) * accelerator.num_processes)
                guard.watch(progress.step + 1, result.loss, result.losses)
                if not accelerator.sync_gradients:
                    continue
                for scheduler in run.schedulers:
                    scheduler.step()
                if run.ema is not None:
                    run.ema.step(parameters)
                progress.step += 1
                bar.update()
                if progress.step % args.logging_steps == 0:
                    report(args, run, bar, result)
                if args.checkpointing_steps and progress.step % args.checkpointing_steps == 0:
                    guard.check()
                    save_checkpoint(run, output, args.checkpoints_total_limit)
                if progress.step >= run.total_steps:
                    break
            else:
                progress.epoch, progress.batch = progress.epoch + 1, 0
            due = args.validation_epochs and progress.epoch % args.validation_epochs == 0
            if held_out is not None and (due or progress.step >= run.total_steps):
                with clock.paused():
                    validate(args, run, held_out, output)
        guard.check()
    accelerator.print(clock.summary())
    if args.streaming and images.decode.skipped:
        accelerator.print(f"Skipped {images.decode.skipped} images of the stream that cannot be read, repeats included.")


class Clock:
    """Counts images and the time that training took, without validation."""

    def __init__(self):
        self.begun, self.images, self.first = time.perf_counter(), 0, None

    def saw(self, images: int):
        self.images += images
        if self.first is None:  # the first step also compiles and allocates
            self.first = (time.perf_counter(), self.images)

    @contextlib.contextmanager
    def paused(self):
        stopped = time.perf_counter()
        yield
        pause = time.perf_counter() - stopped
        self.begun += pause
        if self.first is not None:
            self.first = (self.first[0] + pause, self.first[1])

    def summary(self) -> str:
        if self.first is None:
            return "Nothing was left to train."
        now = time.perf_counter()
        rate = (self.images - self.first[1]) / max(now - self.first[0], 1e-9)
        return f"Trained on {self.images:,} images in {now - self.begun:.1f} s ({rate:,.0f} images/s after the first step)."


def make_model(args):
    """A new model of `args.model_type`, with its overrides."""
    if args.model_type not in hf_ae.MODELS:
        raise ValueError(f"model_type={args.model_type!r} is not known: write one of {', '.join(hf_ae.MODELS)}.")
    set_seed(args.seed)
    cls = hf_ae.MODELS[args.model_type]
    return cls(cls.config_class(**parse_overrides(args.config_overrides)))


def check_request(args, output: Path) -> Path | None:
    """Raise ValueError for what cannot work, before anything is loaded; returns the checkpoint to go on from."""
    if args.dataset_name is None:
        raise ValueError("Which dataset? Write --dataset_name with a Hub id or a folder.")
    if args.streaming and args.max_train_steps is None:
        raise ValueError("A stream has no known length: write --max_train_steps.")
    if args.push_to_hub:
        check_login()
    check_output_dir(output, args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    return find_checkpoint(args.resume_from_checkpoint, output)


def clear_output(output: Path, everything: bool):
    """Mark the folder as a run's; remove what an earlier run left there if it is to be replaced."""
    (output / ".hf_ae_run").touch()
    for cut_off in output.glob(".partial-checkpoint-*"):
        shutil.rmtree(cut_off, ignore_errors=True)
    for old in [*checkpoints(output), output / "samples"] if everything else []:
        shutil.rmtree(old, ignore_errors=True)


def make_accelerator(args, output: Path) -> Accelerator:
    """The accelerator, with the tracker that `args.report_to` names."""
    logging.disable_progress_bar()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output / "logs",
    )
    if args.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"report_to={args.report_to!r} needs that tracker: pip install {args.report_to}")
    return accelerator


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
        images = ImagesInMemory.load(dataset, column, processor, args.skip_broken_images, limit, progress)
    name = args.eval_split or held_out_name(parts)
    if not args.validation_epochs or name is None:
        if args.validation_epochs and not quiet:
            print(f"The dataset has only {', '.join(parts)}: training without evaluation (--eval_split names another split).")
        return images, None
    held_out = pick_split(parts, name)
    pixels = ImagesInMemory.load(held_out, column, processor, args.skip_broken_images, args.max_eval_samples, progress).pixels
    return images, binarized_once(pixels) if args.binarize else pixels


def report(args, run: Run, bar, output):
    """Loss terms to the progress bar and the tracker."""
    terms = {name: float(term.detach()) for name, term in output.losses.items()}
    bar.set_postfix(loss=f"{float(output.loss.detach()):.4g}", refresh=False)
    if args.report_to != "none":
        terms = {f"train/{name}": value for name, value in terms.items()}
        rate = run.schedulers[0].get_last_lr()[0]
        run.accelerator.log({"train/loss": float(output.loss.detach()), "learning_rate": rate, **terms}, step=run.progress.step)


@torch.no_grad()
def validate(args, run: Run, pixels: torch.Tensor, output: Path):
    """Losses on held-out images, and a picture of some of them, with the averaged weights if there are any."""
    accelerator, progress = run.accelerator, run.progress
    if not accelerator.is_main_process:
        return
    model = run.bare_model
    model.eval()
    totals: dict[str, float] = {}
    with averaged(model, run.ema):
        for batch in pixels.split(batch_for(pixels[0].numel())):
            values = to_pixel_values(batch, accelerator.device, model.config.pixel_range)
            with accelerator.autocast():
                losses = model(values).losses
            for name, term in losses.items():
                totals[name] = totals.get(name, 0.0) + float(term) * len(batch) / len(pixels)
        picture = draw_samples(model, to_pixel_values(pixels[:12], accelerator.device, model.config.pixel_range))
    model.train()
    tqdm.write(f"step {progress.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in totals.items()))
    (output / "samples").mkdir(exist_ok=True)
    picture_path = output / "samples" / f"step-{progress.step:07d}.png"
    sheet = labelled_rows(picture, picture_path)
    if args.report_to != "none":
        accelerator.log({f"eval/{name}": value for name, value in totals.items()}, step=progress.step)
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"eval/samples": np.asarray(sheet)[None]}, step=progress.step, **layout)


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


def finish(args, run: Run, processor, output: Path):
    """Save the final model as a complete model repository, and push it where that is asked."""
    accelerator, model = run.accelerator, run.bare_model
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if run.ema is not None:
            run.ema.copy_to(model.parameters())
        for measured in ("metrics.json", "reconstructions.png", "latent_plane.png"):  # of earlier weights
            (output / measured).unlink(missing_ok=True)
        save_model(model, output, args.save_dtype)
        processor.save_pretrained(output)
        write_recipe(args, output / "recipe.yaml")
        write_card(output)
        (output / ".hf_ae_run").unlink(missing_ok=True)
        accelerator.print(f"The model is in {output}: measure it with  hf-ae evaluate {output} --dataset_name {args.dataset_name}")
        if args.push_to_hub:
            repo = args.hub_model_id or output.resolve().name
            accelerator.print(f"Pushed to {push_folder(output, repo, args.hub_private)}")
    run.model = model
    accelerator.free_memory()  # gloo can hang when the wrapper of several processes outlives the process group
    accelerator.wait_for_everyone()
    accelerator.end_training()


def write_recipe(args, path: Path):
    """The flags that differ from their defaults, as a recipe that trains the same model again."""
    machine = {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "report_to",
    }
    kept = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in machine and (value != field.default or field.name == "model_type"):
            kept[field.name] = value
    path.write_text(yaml.safe_dump(kept, sort_keys=False))


def trackable(args) -> dict:
    """Arguments as trackers take them."""
    return {k: str(v) if isinstance(v, dict) else v for k, v in dataclasses.asdict(args).items() if v is not None}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
