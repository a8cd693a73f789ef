"""Draw many pictures from a model and measure them against real ones: `hf-ae evaluate MODEL --tasks generation`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..diffusion.captions import picture_processor
from ..data.images import ImagesInMemory, binarized_once, held_out_name, image_column, pick_split, read_texts
from .feature_network import FeatureNetwork, features_of, load_feature_network
from .fidelity import accuracy, distances, train_classifier
from ..latents.sampling import FILE, KINDS, Sampler, encode_all, fit, read_labels, sample

IMAGES = 10_000
"""Pictures to draw, where there are as many real ones."""


@dataclass
class Drawer:
    """Something that draws pictures."""

    draw: Callable[[int, torch.Tensor | None], torch.Tensor]
    """(n, labels or None) -> pictures (n, channels, height, width) in 0…1."""
    name: str
    """How it draws: by which sampler, prior or prompts."""
    num_classes: int = 0
    """Classes that it can draw on request, the whole numbers from 0."""


def drawer_of(model, sampler: Sampler | None = None, seed: int = 0) -> Drawer:
    """A model of hf_ae, with its own `generate`, or a sampler of its codes (default: N(0, I)). Raises ValueError."""
    low, high = model.config.pixel_range
    own = sampler is None and hasattr(model, "generate")
    if sampler is None and not own and not hasattr(model.config, "kl_weight"):
        raise ValueError("Only a variational autoencoder's codes follow N(0, I): fit a sampler to this one's (--sampler mixture).")

    def draw(n, labels=None):
        return (sample(model, n, sampler, seed, labels) - low) / (high - low)

    classes = (getattr(model.config, "prior_classes", 0) or 0) if own else ((sampler.num_classes if sampler else 0) or 0)
    return Drawer(draw, "its own prior" if own else sampler.kind if sampler else "prior", classes)


def drawer_of_pipeline(pipe, prompts: list[str], seed: int = 0, batch: int = 50) -> Drawer:
    """A text-to-image pipeline that draws a picture for each of `prompts`, in turn."""

    def draw(n, labels=None):
        texts = [prompts[i % len(prompts)] for i in range(n)]
        parts = [pipe(texts[i : i + batch], seed=seed + i, output_type="pt").images.float().cpu() for i in range(0, n, batch)]
        return torch.cat(parts)

    pipe.set_progress_bar_config(disable=True)
    return Drawer(draw, "prompts")


def find_sampler(model, folder: str, wanted: str | None, train_pixels: Callable, labels=None) -> Sampler | None:
    """What `--sampler` says: a kind, fitted now to the codes of `train_pixels()`, or `saved`. None for N(0, I) or an own prior.

    Default: the sampler beside the model, where there is one.
    """
    if wanted is not None and wanted not in (*KINDS, "saved"):
        raise ValueError(f"sampler={wanted!r} is not known: write one of saved, {', '.join(KINDS)}.")
    if wanted == "saved" or (wanted is None and (Path(folder) / FILE).is_file()):
        return Sampler.load(folder)
    if wanted in (None, "prior"):
        return None
    return fit(encode_all(model, train_pixels()), wanted, labels)


def measure_generation(drawer: Drawer, real: torch.Tensor, train: torch.Tensor, network, labels=None, train_labels=None):
    """(metrics, pictures): as many pictures as there are of `real` (images, channels, height, width), in 0…1.

    fid, kid, precision, recall, density, coverage in features of `network`; `floor`: the same for as many training pictures,
    which no generator should beat by much; seconds_per_image. A drawer with classes is asked for them in turn; with the
    `labels` (images,) of `real` and of `train` also classification_accuracy: of a classifier trained on drawn pictures alone, on
    `real` (Ravuri and Vinyals 2019; floor: trained on real ones), and asked_class: the share of drawn pictures that the
    classifier trained on real ones gives the class that was asked for (Shmelkov et al. 2018; floor: that of `real`).
    """
    asked = torch.arange(len(real)) % drawer.num_classes if drawer.num_classes else None
    started = time.perf_counter()
    pictures = eight_bits(drawer.draw(len(real), asked))
    seconds = time.perf_counter() - started
    wanted = features_of(network, real)
    metrics: dict = {"images": len(real), "sampler": drawer.name, **distances(wanted, features_of(network, pictures))}
    metrics["seconds_per_image"] = seconds / len(pictures)
    metrics["floor"] = distances(wanted, features_of(network, train[: len(real)]))
    if asked is not None and labels is not None and train_labels is not None:

        def classifier(shown, classes):
            torch.manual_seed(0)
            return train_classifier(FeatureNetwork(int(max(labels.max(), asked.max())) + 1, real.shape[1]), shown, classes)

        of_drawn, of_real = classifier(pictures, asked), classifier(train, train_labels)
        metrics |= {"classification_accuracy": accuracy(of_drawn, real, labels), "asked_class": accuracy(of_real, pictures, asked)}
        metrics["floor"] |= dict.fromkeys(("classification_accuracy", "asked_class"), accuracy(of_real, real, labels))
    return metrics, pictures


def eight_bits(pictures: torch.Tensor) -> torch.Tensor:
    """As an image file would hold them: 256 levels in 0…1."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def evaluate_generation(request, model, processor, parts, dataset, column: str, pixels: torch.Tensor):
    """The task `generation` of an evaluation: (metrics, pictures). `pixels` are those of the evaluated split."""
    if request.train_split not in parts:
        raise ValueError(f"generation needs training pictures to compare with: there is no split {request.train_split!r} (--train_split).")
    train = pick_split(parts, request.train_split)
    real = pixels[:IMAGES]

    def train_pixels(limit=None):
        found = ImagesInMemory.load(train, image_column(train, column), processor, limit=limit).pixels
        return binarized_once(found) if request.binarize else found

    classes = None if request.label_column is None else read_labels(train, request.label_column)
    name = request.label_column or "label"
    known = [read_labels(rows, name)[: len(real)] if name in rows.column_names else None for rows in (dataset, train)]
    drawer = drawer_of(model, find_sampler(model, request.model, request.sampler, train_pixels, classes))
    network = load_feature_network(request.feature_network)
    floor = train_pixels(len(real)).float() / 255
    metrics, pictures = measure_generation(drawer, real.float() / 255, floor, network, *known)
    return {**metrics, "features": request.feature_network or "hf_ae"}, pictures


def evaluate_pipeline(request, pipe, parts):
    """The same for a text-to-image pipeline that draws the captions of the evaluated split."""
    dataset = pick_split(parts, request.split or held_out_name(parts) or next(iter(parts)))
    processor, captions = pipeline_processor(pipe), captions_of(dataset)
    limit = min(request.max_images or IMAGES, len(dataset))

    def load(rows):
        return ImagesInMemory.load(rows, image_column(rows, request.image_column), processor, limit=limit).pixels.float() / 255

    drawer = drawer_of_pipeline(pipe, captions[:limit])
    network = load_feature_network(request.feature_network)
    metrics, pictures = measure_generation(drawer, load(dataset), load(pick_split(parts, request.train_split)), network)
    return {**metrics, "features": request.feature_network or "hf_ae"}, pictures


def captions_of(dataset) -> list[str]:
    """A caption for each row, for a pipeline to draw: the column `text`, or the names of the only column of classes."""
    import datasets

    classes = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
    if "text" not in dataset.column_names and len(classes) != 1:
        raise ValueError("A pipeline draws captions, and the dataset has no column 'text', nor one of classes.")
    return read_texts(dataset, "text" if "text" in dataset.column_names else classes[0])


def pipeline_processor(pipe):
    """The image processor for pictures of the size that a pipeline draws."""
    size, scale = pipe.unet.config.sample_size, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return picture_processor(pipe.vae, (size if isinstance(size, int) else size[0]) * scale)
