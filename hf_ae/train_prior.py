"""Train the prior of a VQ-VAE or VQ-VAE-2: `accelerate launch -m hf_ae.train_prior [RECIPE.yaml] [--flag value …]`.

images -> indices (the autoencoder stays as it is) -> GPT-2, one code after the other, given the class. The result is the whole
model with its prior: `AutoModel.from_pretrained(output_dir).generate(16, labels=[…])`.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

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
from hf_ae.data.images import (
    ImagesInMemory,
    batch_for,
    held_out_name,
    image_column,
    num_batches,
    open_dataset,
    pick_split,
    row_batches,
    to_pixel_values,
)
from hf_ae.evaluation.evaluate import load_model
from hf_ae.hub.push import check_login, push_folder
from hf_ae.models.modeling_code_prior import CodePrior
from hf_ae.models.modeling_vqvae import VQVAEModel
from hf_ae.plots import image_grid
from hf_ae.training.run import Run, averaged, begin, clear_output, end, make_accelerator, optimize, save_model, show_samples

PRIOR_FIELDS = ("prior_layers", "prior_hidden_size", "prior_heads")


@dataclass
class PriorArguments(TrainingArguments):
    """Train a prior over the codes of a VQ-VAE or VQ-VAE-2, so that it can generate pictures."""

    model: str | None = flag(None, "Folder or Hub id of a trained hf_ae_vqvae or hf_ae_vqvae2.")
    prior_overrides: str | None = flag(None, 'Size of the prior: "prior_layers=6,prior_hidden_size=256,prior_heads=4".')
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    label_column: str | None = flag(None, "Column of class labels; default: the only one of type ClassLabel. 'none': without classes.")
    label_dropout: float = flag(0.1, "Share of images shown without their class, which classifier-free guidance needs.")
    random_flip: bool = flag(False, "Mirror half of the images.")
    temperature: float = flag(1.0, "Default temperature of the finished model: below 1 its pictures are more typical, above 1 more varied.")
    guidance_scale: float = flag(1.0, "Default guidance of the finished model: above 1 the class counts more.")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout={self.label_dropout} must be at least 0 and less than 1.")


def main(argv: list[str] | None = None):
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(PriorArguments, sys.argv[1:] if argv is None else argv))


def train(args: PriorArguments):
    """Everything from the flags to a finished model folder."""
    output = Path(args.output_dir)
    resume_from = check_request(args, output)
    accelerator = make_accelerator(args, output)
    model, processor = load_codes_model(str(args.model))
    parts = open_dataset(str(args.dataset_name), args.dataset_config_name)
    dataset, held_out = pick_split(parts, args.train_split), args.eval_split or held_out_name(parts)
    labels, names = read_labels(dataset, args.label_column, args.max_train_samples)
    add_prior(model, args, names)
    if accelerator.is_main_process:
        clear_output(output, everything=args.overwrite_output_dir and resume_from is None)
    model.to(accelerator.device)
    codes = encode_images(model, processor, dataset, args, accelerator, args.max_train_samples, args.random_flip)
    test = None
    if args.validation_epochs and held_out is not None:
        split = pick_split(parts, held_out)
        held_out_codes = encode_images(model, processor, split, args, accelerator, args.max_eval_samples)[0]
        test = held_out_codes, read_labels(split, args.label_column, args.max_eval_samples)[0]
    if args.gradient_checkpointing:
        model.prior.gradient_checkpointing_enable()
    batches = num_batches(len(labels), args.train_batch_size, accelerator.num_processes)
    data = {"images": len(labels), "classes": len(names), "label_dropout": args.label_dropout, "random_flip": args.random_flip}
    run = begin(args, accelerator, model.prior, batches, data, resume_from)
    loop(args, run, codes, labels, (lambda: validate(args, run, model, test, output)) if args.validation_epochs else None, output)
    finish(args, run, model, processor, output)


def check_request(args, output: Path) -> Path | None:
    """Raise ValueError for what cannot work, before anything is loaded; returns the checkpoint to go on from."""
    if args.dataset_name is None:
        raise ValueError("Which dataset? Write --dataset_name with a Hub id or a folder.")
    if args.model is None:
        raise ValueError("Which model? Write --model with a folder or Hub id of a trained hf_ae_vqvae or hf_ae_vqvae2.")
    if args.push_to_hub:
        check_login()
    check_output_dir(output, args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    return find_checkpoint(args.resume_from_checkpoint, output)


def load_codes_model(name: str):
    """(model with discrete codes, frozen, in eval mode; its image processor)."""
    model, processor = load_model(name)
    if not isinstance(model, VQVAEModel):
        raise ValueError(f"The model {name} ({model.config.model_type}) has no discrete codes: train hf_ae_vqvae or hf_ae_vqvae2.")
    return model.requires_grad_(False), processor


def read_labels(dataset, column: str | None, limit: int | None) -> tuple[torch.Tensor, list[str]]:
    """(class number of each row, names of the classes); all zeros and no names where there are no classes."""
    import datasets

    count = min(limit or len(dataset), len(dataset))
    classes = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
    column = column or (classes[0] if len(classes) == 1 else "none")
    if column == "none":
        return torch.zeros(count, dtype=torch.int64), []
    if column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r}: write --label_column with one of {', '.join(dataset.column_names)}, or none.")
    kind, values = dataset.features[column], list(dataset[column])[:count]
    if isinstance(kind, datasets.ClassLabel):
        return torch.tensor(values), list(kind.names)
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"The column {column!r} holds no classes: write --label_column with a column of whole numbers or names.")
    names = sorted(set(dataset[column]))
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[value] for value in values]), [str(name) for name in names]


def add_prior(model: VQVAEModel, args, names: list[str]):
    """Give the model a new prior for classes of these names."""
    overrides = parse_overrides(args.prior_overrides)
    if unknown := [name for name in overrides if name not in PRIOR_FIELDS]:
        raise ValueError(f"prior_overrides: {unknown[0]!r} is no field of the prior: write some of {', '.join(PRIOR_FIELDS)}.")
    config = model.config
    for name in PRIOR_FIELDS:
        setattr(config, name, overrides.get(name, 6 if name == "prior_layers" else None))
    config.prior_classes = len(names)
    config.prior_temperature, config.prior_guidance_scale = args.temperature, args.guidance_scale
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.fill_defaults()
    config.check()
    set_seed(args.seed)
    model.prior = CodePrior(config)


@torch.no_grad()
def encode_images(model, processor, dataset, args, accelerator, limit: int | None, flip: bool = False) -> list[torch.Tensor]:
    """Codes of all images (images, codes), and with `flip` of the mirrored images. Each process encodes its share."""
    pixels = ImagesInMemory.load(dataset, image_column(dataset, args.image_column), processor, limit=limit).pixels
    rank, processes, versions = accelerator.process_index, accelerator.num_processes, []
    rows = torch.arange(rank, rank - len(pixels) % -processes + len(pixels), processes).clamp(max=len(pixels) - 1)
    quiet = not accelerator.is_main_process
    for mirrored in (False, True)[: 1 + flip]:
        parts = []
        for some in tqdm(rows.split(min(256, batch_for(pixels[0].numel()))), desc="encoding", disable=quiet, mininterval=1.0):
            values = to_pixel_values(pixels[some].flip(-1) if mirrored else pixels[some], model.device, model.config.pixel_range)
            with accelerator.autocast():
                parts.append(model.prior.to_row(model.levels_of(model.encode(values).indices)))
        shares = accelerator.gather(torch.cat(parts)).view(processes, len(rows), -1)
        versions.append(shares.transpose(0, 1).flatten(0, 1)[: len(pixels)].cpu().int())
    return versions


def loop(args, run: Run, codes: list[torch.Tensor], labels: torch.Tensor, measure, output: Path):
    """Epochs of codes with their classes through the prior."""
    device, no_class = run.accelerator.device, run.bare_model.num_classes
    versions = torch.stack(codes)

    def forward(rows):
        version = torch.randint(len(versions), (len(rows),))
        shown = torch.where(torch.rand(len(rows)) < args.label_dropout, no_class, labels[rows]) if no_class else None
        return run.model(versions[version, rows].long().to(device), None if shown is None else shown.to(device))

    def batches(size, epoch, **where):
        return row_batches(len(labels), size, epoch, **where)

    optimize(args, run, batches, forward, measure, output)


@torch.no_grad()
def validate(args, run: Run, model: VQVAEModel, test, output: Path):
    """Nats of held-out codes, and sample pictures, with the averaged weights if there are any."""
    accelerator, prior = run.accelerator, run.bare_model
    if not accelerator.is_main_process:
        return
    prior.eval()
    totals: dict[str, float] = {}
    with averaged(prior, run.ema), accelerator.autocast():
        for codes, labels in zip(*(part.split(256) for part in test)) if test else ():
            shown = labels.to(accelerator.device) if prior.num_classes else None
            for name, term in prior(codes.long().to(accelerator.device), shown).losses.items():
                totals[name] = totals.get(name, 0.0) + float(term) * len(codes) / len(test[0])
        picture = draw_samples(args, model)
    prior.train()
    tqdm.write(f"step {run.progress.step}: " + "  ".join(f"{name} {value:.2f} nats" for name, value in totals.items()))
    show_samples(args, run, lambda path: image_grid(picture, 10, path), output)
    if args.report_to != "none":
        accelerator.log({f"eval/{name}": value for name, value in totals.items()}, step=run.progress.step)


def draw_samples(args, model: VQVAEModel) -> torch.Tensor:
    """60 pictures in 0…1; the classes in turn."""
    low, high = model.config.pixel_range
    classes = list(range(min(10, model.config.prior_classes or 0))) or None
    pictures = model.generate(60, classes, seed=0)
    return (pictures.float().cpu() - low) / (high - low)


def finish(args, run: Run, model: VQVAEModel, processor, output: Path):
    """Save the whole model with its prior, beside the recipes and figures of both, and push it where that is asked."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.prior = run.bare_model
        if run.ema is not None:
            run.ema.copy_to(model.prior.parameters())
        source = Path(args.model)
        for name in ("recipe.yaml", "metrics.json", "reconstructions.png"):
            if (source / name).is_file() and source.resolve() != output.resolve():
                shutil.copyfile(source / name, output / name)
        save_model(model, output, args.save_dtype)
        processor.save_pretrained(output)
        image_grid(draw_samples(args, model.eval()), 10, output / "samples.png")
        write_recipe(args, output / "recipe-prior.yaml")
        write_card(output)
        (output / ".hf_ae_run").unlink(missing_ok=True)
        accelerator.print(f"The model with its prior is in {output}: AutoModel.from_pretrained({str(output)!r}).generate(16)")
        if args.push_to_hub:
            accelerator.print(f"Pushed to {push_folder(output, args.hub_model_id or output.resolve().name, args.hub_private)}")
    end(run)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
