"""Train the prior of a VQ-VAE or VQ-VAE-2: `accelerate launch -m hf_ae.train_prior [RECIPE.yaml] [--flag value …]`.

images -> indices (the autoencoder stays as it is) -> GPT-2, one code after the other, given the class. The result is
the whole model with its prior: `AutoModel.from_pretrained(output_dir).generate(16, labels=[…])`.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from hf_ae.data import (
    batch_for,
    class_columns,
    held_out_name,
    num_batches,
    open_dataset,
    pick_split,
    read_labels,
    read_rows,
    row_batches,
    to_pixel_values,
)
from hf_ae.errors import one_line_errors, require, user_input
from hf_ae.hub.push import check_publishing, publish
from hf_ae.loading import load_model
from hf_ae.models.modeling_code_prior import CodePrior
from hf_ae.plots import image_grid
from hf_ae.training.arguments import TrainingArguments, flag, parse_arguments, parse_overrides
from hf_ae.training.checkpoints import keep, load_checkpoint, save_model
from hf_ae.training.optimizers import averaged
from hf_ae.training.output_folder import begin_run, check_request
from hf_ae.training.processes import on_main
from hf_ae.training.run import Run
from hf_ae.training.start import training
from hf_ae.training.tracking import log_evaluation, log_step, show_samples

PRIOR_FIELDS = ("prior_layers", "prior_hidden_size", "prior_heads")


@dataclass
class PriorArguments(TrainingArguments):
    """Train a prior over the codes of a VQ-VAE or VQ-VAE-2, so that it can generate images."""

    model: str | None = flag(None, "Folder or Hub id of a trained hf_ae_vqvae or hf_ae_vqvae2.")
    prior_overrides: str | None = flag(
        None, 'Size of the prior: "prior_layers=6,prior_hidden_size=256,prior_heads=4".'
    )
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    label_column: str | None = flag(
        None, "Column of classes; default: the only ClassLabel one. 'none': without classes."
    )
    label_dropout: float = flag(
        0.1, "Fraction of images shown without their class, for classifier-free guidance.", least=0
    )
    random_flip: bool = flag(False, "Mirror half of the images.")
    temperature: float = flag(
        1.0, "Default of the finished model: below 1 more typical images, above 1 more varied ones.", above=0
    )
    guidance_scale: float = flag(1.0, "Default of the finished model: above 1 the class counts more.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.label_dropout < 1, f"label_dropout={self.label_dropout} must be less than 1.")


@dataclass
class Codes:
    """The codes of a split (images, codes), of the images as they are and maybe mirrored, with the labels
    (images,)."""

    versions: list[Tensor]
    labels: Tensor


def main(argv: list[str] | None = None) -> None:
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(PriorArguments, sys.argv[1:] if argv is None else argv))


def train(args: PriorArguments) -> None:
    """Everything from the flags to a finished model folder."""
    check_publishing(args)
    question = "Which model? Write --model with a folder or Hub id of a trained hf_ae_vqvae or hf_ae_vqvae2."
    resume_from = check_request(args, {"model": question})
    with training(args) as accelerator:
        train_model(args, accelerator, resume_from)


def train_model(args: PriorArguments, accelerator: Accelerator, resume_from: Path | None) -> None:
    """The same where the output folder is this training's own."""
    model, processor = load_model(str(args.model))
    kind = model.config.model_type
    discrete = "has no discrete codes: train hf_ae_vqvae or hf_ae_vqvae2"
    require(model.has_discrete_codes, f"The model {args.model} ({kind}) {discrete}.")
    model.requires_grad_(False)
    splits = open_dataset(str(args.dataset_name), args.dataset_config_name)
    held_out = (args.eval_split or held_out_name(splits)) if args.validation_epochs else None
    if held_out:
        pick_split(splits, held_out)  # which raises before anything is encoded
    column = label_column(pick_split(splits, args.train_split), args.label_column)
    names = read_labels(splits, args.train_split, column)[1] if column else []
    add_prior(model, args, names)
    if accelerator.is_main_process:
        begin_run(Path(args.output_dir), replace=args.overwrite_output_dir and resume_from is None)
    model.to(accelerator.device)

    def encode(split: str, limit: int | None, flip: bool = False) -> Codes:
        rows = pick_split(splits, split)
        pixels = read_rows(rows, processor, args.image_column, limit)
        labels = read_labels(splits, split, column)[0][: len(pixels)] if column else torch.zeros(len(pixels)).long()
        return Codes(encode_images(model, pixels, accelerator, flip), labels)

    codes = encode(args.train_split, args.max_train_samples, args.random_flip)
    test = encode(held_out, args.max_eval_samples) if held_out else None
    if args.gradient_checkpointing:
        model.prior.gradient_checkpointing_enable()
    count = len(codes.labels)
    batches = num_batches(count, args.train_batch_size, accelerator.num_processes)
    data = {
        "images": count, "classes": len(names), "label_dropout": args.label_dropout, "random_flip": args.random_flip,
    }  # fmt: skip
    with Run(args, accelerator, model.prior, batches, data) as run:
        if resume_from is not None:
            load_checkpoint(run, resume_from)
        take_steps(args, run, model, codes, test)
        finish(args, run, model, processor)


def take_steps(args: PriorArguments, run: Run, model: Any, codes: Codes, test: Codes | None) -> None:
    """Epochs of codes with their classes through the prior, with logs and checkpoints, and validation in between."""
    accelerator, device, count = run.accelerator, run.accelerator.device, len(codes.labels)
    no_class, versions = run.bare_model.num_classes, torch.stack(codes.versions)
    run.open()
    while run.unfinished:
        for rows in row_batches(count, args.train_batch_size, run.progress.epoch, **run.place):
            with accelerator.accumulate(run.model):
                version, labels = torch.randint(len(versions), (len(rows),)), None
                if no_class:
                    dropped = torch.rand(len(rows)) < args.label_dropout
                    labels = torch.where(dropped, no_class, codes.labels[rows]).to(device)
                output = run.model(versions[version, rows].long().to(device), labels)
                accelerator.backward(output.loss)
                run.update_weights()
            if run.step_done(output, len(rows)):
                if run.every(args.logging_steps):
                    log_step(run, output)
                keep(run)
            if not run.unfinished:
                break
        else:
            run.next_epoch()
        if run.validation_due and accelerator.is_main_process:
            with run.clock.paused():
                validate(run, model, test)
    run.close()


def label_column(rows: Any, wanted: str | None) -> str | None:
    """The column of the classes: `wanted`, or the only ClassLabel one; None for 'none', or where there is none."""
    classes = class_columns(rows)
    column = wanted or (classes[0] if len(classes) == 1 else "none")
    return None if column == "none" else column


def add_prior(model: Any, args: PriorArguments, names: list[str]) -> None:
    """Give the model a new prior for classes of these names. Raises ValueError."""
    overrides, config = parse_overrides(args.prior_overrides), model.config
    unknown = ", ".join(name for name in overrides if name not in PRIOR_FIELDS)
    choice = f"write some of {', '.join(PRIOR_FIELDS)}"
    require(not unknown, f"prior_overrides: {unknown} is no field of the prior: {choice}.")
    for name in PRIOR_FIELDS:
        setattr(config, name, overrides.get(name, 6 if name == "prior_layers" else None))
    config.prior_classes = len(names)
    config.prior_temperature, config.prior_guidance_scale = args.temperature, args.guidance_scale
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    with user_input():
        config.fill_defaults()
        config.check()
    set_seed(args.seed)
    model.prior = CodePrior(config)


@torch.no_grad()
def encode_images(model: Any, pixels: Tensor, accelerator: Accelerator, flip: bool = False) -> list[Tensor]:
    """Codes of uint8 images (images, codes), and with `flip` of the mirrored images, in float32 as the codec makes
    them. Each process encodes its part."""
    rank, processes, versions = accelerator.process_index, accelerator.num_processes, []
    each = -(-len(pixels) // processes)  # images of a process; the last ones repeat an image
    rows = (torch.arange(each) * processes + rank).clamp(max=len(pixels) - 1)
    hidden, most = not accelerator.is_main_process, min(256, batch_for(pixels[0].numel()))
    for mirrored in (False, True) if flip else (False,):
        parts = []
        with tqdm(rows.split(most), desc="encoding", disable=hidden, mininterval=1.0) as bar:
            for some in bar:
                shown = pixels[some].flip(-1) if mirrored else pixels[some]
                values = to_pixel_values(shown, model.device, model.config.pixel_range)
                parts.append(model.prior.to_row(model.levels_of(model.encode(values).indices)))
        gathered = accelerator.gather(torch.cat(parts)).view(processes, each, -1)
        versions.append(gathered.transpose(0, 1).flatten(0, 1)[: len(pixels)].cpu().int())
    return versions


@torch.no_grad()
def validate(run: Run, model: Any, test: Codes | None) -> None:
    """Nats of held-out codes, and sample images, with the averaged weights if there are any."""
    accelerator, prior = run.accelerator, run.bare_model.eval()
    totals: dict[str, float] = {}
    batches = [] if test is None else list(zip(test.versions[0].split(256), test.labels.split(256)))
    count = sum(len(labels) for _, labels in batches)
    with averaged(prior, run.ema), accelerator.autocast():
        for codes, labels in batches:
            shown = labels.to(accelerator.device) if prior.num_classes else None
            for name, term in prior(codes.long().to(accelerator.device), shown).losses.items():
                totals[name] = totals.get(name, 0.0) + float(term) * len(codes) / count
        images = draw_samples(model)
    prior.train()
    log_evaluation(run, totals, " nats")
    show_samples(run, lambda path: image_grid(images, 10, path))


def draw_samples(model: Any) -> Tensor:
    """60 images in 0…1; the classes in turn."""
    low, high = model.config.pixel_range
    classes = list(range(min(10, model.config.prior_classes or 0))) or None
    return (model.generate(60, classes, seed=0).float().cpu() - low) / (high - low)


def finish(args: PriorArguments, run: Run, model: Any, processor: Any) -> None:
    """Save the whole model with its prior, beside the recipes and figures of both, and push it where that is asked."""
    folder, source = Path(args.output_dir), Path(str(args.model))

    def complete() -> None:
        model.prior = run.bare_model
        if run.ema is not None:
            run.ema.copy_to(model.prior.parameters())
        for name in ("recipe.yaml", "metrics.json", "reconstructions.png"):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
        save_model(model, folder, args.save_dtype)
        processor.save_pretrained(folder)
        image_grid(draw_samples(model.eval()), 10, folder / "samples.png")
        use = f"AutoModel.from_pretrained({str(folder)!r}).generate(16)"
        run.print(f"The model with its prior is in {folder}: {use}")
        publish(args, run.print, "recipe-prior.yaml")

    on_main(run.accelerator, complete)
    run.end()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
