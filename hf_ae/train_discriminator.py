"""Train the discriminator of a text-to-image pipeline: `accelerate launch -m hf_ae.train_discriminator [RECIPE.yaml]
[--flag value …]`.

image, prompt -> does the image show it? It learns from a dataset's images with right and wrong captions; the
pipeline's text encoder reads these and stays as it is. The result is the whole pipeline with its discriminator.
"""

from __future__ import annotations

import os
import random
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

from hf_ae import PromptDiscriminatorConfig, PromptDiscriminatorModel
from hf_ae.data import (
    ImagesInMemory,
    held_out_name,
    image_column,
    num_batches,
    open_dataset,
    pick_split,
    row_batches,
    to_pixel_values,
)
from hf_ae.diffusion.captions import Captions, split_list
from hf_ae.diffusion.text_encoders import KEEP_STATES, TextStates, tokenize
from hf_ae.errors import one_line_errors, require, user_input
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.hub.push import check_publishing, publish
from hf_ae.loading import image_processor_for, load_pipeline
from hf_ae.pipelines.image_io import decode, pixel_range
from hf_ae.training.arguments import TrainingArguments, flag, parse_arguments, parse_overrides
from hf_ae.training.checkpoints import keep, load_checkpoint
from hf_ae.training.optimizers import averaged
from hf_ae.training.output_folder import begin_run, check_request
from hf_ae.training.processes import on_main
from hf_ae.training.run import Run
from hf_ae.training.start import training
from hf_ae.training.tracking import log_evaluation, log_step


@dataclass
class DiscriminatorArguments(TrainingArguments):
    """Train a discriminator that says whether an image shows what a prompt says."""

    pretrained_pipeline: str | None = flag(None, "Folder or Hub id of the pipeline that gets the discriminator.")
    discriminator_overrides: str | None = flag(
        None, 'Fields of the PromptDiscriminatorConfig: "hidden_sizes=[64,128,256],num_layers=4".'
    )
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    caption_columns: str = flag("text", "Columns of right captions; each step draws one, then a caption of it.")
    wrong_columns: str | None = flag(
        None, "Columns of captions that are nearly right; those of other images are wrong captions, too."
    )
    reconstructed: float = flag(0.5, "Fraction of images shown as the autoencoder reconstructs them.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reconstructed <= 1, f"reconstructed={self.reconstructed} is a fraction: at most 1.")
        size = self.train_batch_size
        require(size >= 3, f"train_batch_size={size} must be at least 3: wrong captions are those of other images.")


@dataclass
class Pairs:
    """Images, as they are and reconstructed, uint8 (images, channels, height, width), and what they are called."""

    versions: list[Tensor]
    right: Captions
    right_states: TextStates
    wrong: Captions | None
    wrong_states: TextStates | None

    def batch(self, rows: Tensor, reconstructed: float, generator: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 images of `rows`, the states of three captions for each, and whether these are right (1 or 0): a right
        one, one that is nearly right (of another image where there is none), and one of another image."""
        version = torch.tensor([generator.random() < reconstructed for _ in rows])[:, None, None, None]
        images = torch.where(version, self.versions[1][rows], self.versions[0][rows])
        index = self.right.draw(rows, 0.0, generator)
        drawn = [index, index.roll(1), index.roll(2)]
        own = [{i for column in self.right.choices[row] for i in column} for row in rows.tolist()]
        labels = [torch.tensor([float(i in known) for i, known in zip(part.tolist(), own)]) for part in drawn]
        states = [self.right_states(part).float() for part in drawn]
        if self.wrong is not None and self.wrong_states is not None:
            nearly = self.wrong.draw(rows, 0.0, generator)
            there = nearly > 0
            found = self.wrong_states(nearly).float()
            states[1] = torch.where(there[:, None, None].to(found.device), found, states[1])
            labels[1] = torch.where(there, 0.0, labels[1])
        return images, torch.cat(states), torch.cat(labels)


def main(argv: list[str] | None = None) -> None:
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(DiscriminatorArguments, sys.argv[1:] if argv is None else argv))


def train(args: DiscriminatorArguments) -> None:
    """Everything from the flags to a finished pipeline folder."""
    check_publishing(args)
    question = "Which pipeline? Write --pretrained_pipeline with a folder or Hub id of a text-to-image pipeline."
    resume_from = check_request(args, {"pretrained_pipeline": question})
    with training(args) as accelerator:
        train_for(args, accelerator, resume_from)


def train_for(args: DiscriminatorArguments, accelerator: Accelerator, resume_from: Path | None) -> None:
    """The same where the output folder is this training's own."""
    folder, pipe = Path(args.output_dir), load_pipeline(str(args.pretrained_pipeline), device=accelerator.device)
    model = new_discriminator(args, pipe)
    splits = open_dataset(str(args.dataset_name), args.dataset_config_name)
    held_out = (args.eval_split or held_out_name(splits)) if args.validation_epochs else None
    if accelerator.is_main_process:
        begin_run(folder, replace=args.overwrite_output_dir and resume_from is None)
    accelerator.wait_for_everyone()
    pairs = read_pairs(args, pick_split(splits, args.train_split), pipe, args.max_train_samples)
    test = read_pairs(args, pick_split(splits, held_out), pipe, args.max_eval_samples) if held_out else None
    batches = num_batches(len(pairs.right), args.train_batch_size, accelerator.num_processes)
    data = {"images": len(pairs.right), "captions": len(pairs.right.texts), "reconstructed": args.reconstructed}
    with Run(args, accelerator, model.to(accelerator.device), batches, data) as run:
        if resume_from is not None:
            load_checkpoint(run, resume_from)
        take_steps(args, run, pairs, test)
        finish(args, run, pipe)


def new_discriminator(args: DiscriminatorArguments, pipe: Any) -> PromptDiscriminatorModel:
    """For the images and the text states of a pipeline. Raises ValueError where the fields do not fit."""
    require(pipe.prior is None, "This pipeline replaces prompts by known captions (its prior): train one without.")
    processor = image_processor_for(pipe.vae)
    fields = {
        "image_size": processor.size["height"], "num_channels": processor.num_channels,
        "text_width": pipe.text_encoder.config.hidden_size,
    }  # fmt: skip
    overrides, known = parse_overrides(args.discriminator_overrides), list(PromptDiscriminatorConfig.__annotations__)
    unknown = ", ".join(set(overrides) - set(known))
    require(not unknown, f"discriminator_overrides: {unknown} is no field of it: write some of {', '.join(known)}.")
    set_seed(args.seed)
    with user_input():
        return PromptDiscriminatorModel(PromptDiscriminatorConfig(**fields | overrides))


def read_pairs(args: DiscriminatorArguments, rows: Any, pipe: Any, limit: int | None) -> Pairs:
    """The images of a split, reconstructed too, and their captions."""
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    right = Captions(rows, split_list(args.caption_columns))
    wrong = Captions(rows, split_list(args.wrong_columns)) if args.wrong_columns else None
    column = image_column(rows, args.image_column)
    pixels = ImagesInMemory.load(rows, column, image_processor_for(pipe.vae)).pixels
    rebuilt = reconstructions(pipe.vae, pixels) if args.reconstructed else pixels
    return Pairs(
        [pixels, rebuilt], right, states_of(right, pipe), wrong, None if wrong is None else states_of(wrong, pipe)
    )


def states_of(captions: Captions, pipe: Any) -> TextStates:
    """Of all captions, by the pipeline's text encoder; half as many are kept as where there is one kind of them."""
    tokens = tokenize(pipe.tokenizer, captions.texts, pipe.device)
    return TextStates(pipe.text_encoder, tokens, keep=KEEP_STATES // 2)


@torch.no_grad()
def reconstructions(vae: Any, pixels: Tensor) -> Tensor:
    """uint8 images -> the same as the autoencoder reconstructs them."""
    parts = []
    for part in tqdm(pixels.split(32), desc="reconstructing", mininterval=1.0, leave=False):
        values = to_pixel_values(part, vae.device, pixel_range(vae))
        latents = vae.encode(values.to(vae.dtype)).latent_dist.mode()
        parts.append(decode(vae, latents).mul(255).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def take_steps(args: DiscriminatorArguments, run: Run, pairs: Pairs, test: Pairs | None) -> None:
    """Epochs of images with right and wrong captions, with logs and checkpoints, and validation in between."""
    accelerator = run.accelerator
    run.open()
    while run.unfinished:
        for rows in row_batches(len(pairs.right), args.train_batch_size, run.progress.epoch, **run.place):
            with accelerator.accumulate(run.model):
                generator = random.Random(int(torch.randint(2**62, ())))  # from the random state that checkpoints hold
                output, _ = judge(args, run, pairs, rows, generator)
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
        if run.validation_due and test is not None and accelerator.is_main_process:
            with run.clock.paused():
                validate(args, run, test)
    run.close()


def judge(
    args: DiscriminatorArguments, run: Run, pairs: Pairs, rows: Tensor, generator: random.Random
) -> tuple[Any, Tensor]:
    """The discriminator's output for a batch, and the labels of its pairs."""
    device = run.accelerator.device
    with run.accelerator.autocast(), torch.no_grad():
        images, states, labels = pairs.batch(rows, args.reconstructed, generator)
    labels = labels.to(device)
    return run.model(to_pixel_values(images, device, (-1.0, 1.0)), states.to(device), labels), labels


@torch.no_grad()
def validate(args: DiscriminatorArguments, run: Run, test: Pairs) -> None:
    """Losses, and the fraction of right answers, on held-out images, with the averaged weights if there are any."""
    model, totals, generator = (
        run.bare_model.eval(),
        dict.fromkeys(("right", "wrong", "accuracy"), 0.0),
        random.Random(0),
    )
    batches = list(row_batches(len(test.right), min(64, len(test.right)), 0))
    with averaged(model, run.ema), run.accelerator.autocast():
        for rows in batches:
            output, labels = judge(args, run, test, rows, generator)
            accuracy = ((output.logits > 0) == labels.bool()).float().mean()
            for name, value in {**output.losses, "accuracy": accuracy}.items():
                totals[name] += float(value) / len(batches)
    model.train()
    log_evaluation(run, totals)


def finish(args: DiscriminatorArguments, run: Run, pipe: Any) -> None:
    """Save the whole pipeline with its discriminator, beside its recipe and figures, and push it where that is
    asked."""
    folder, source = Path(args.output_dir), Path(str(args.pretrained_pipeline))

    def complete() -> None:
        if run.ema is not None:
            run.ema.copy_to(run.bare_model.parameters())
        pipe.register_modules(discriminator=run.bare_model.eval())
        for name in ("recipe.yaml", "metrics.json", "samples.png"):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
        save_pipeline(pipe, folder, args.save_dtype)
        run.print(f"The pipeline with its discriminator is in {folder}: pipe(prompt, num_candidates=4)")
        publish(args, run.print, "recipe-discriminator.yaml")

    on_main(run.accelerator, complete)
    run.end()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
