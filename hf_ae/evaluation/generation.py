"""Generate many images with a model and measure them against real ones: `hf-ae evaluate MODEL --tasks generation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import class_columns, read_texts
from ..errors import require
from ..latents.sampling import FILE, KINDS, Sampler, encode_all, file_beside, fit, sample
from .feature_network import FeatureNetwork, features_of
from .fidelity import accuracy, distances, train_classifier
from .record import own_random_numbers

IMAGES = 10_000
"""Images to generate, where there are as many real ones."""


@dataclass
class ImageGenerator:
    """Something that generates images."""

    generate: Callable[[int, Tensor | None], Tensor]
    """(n, labels (n,) or None) -> images (n, channels, height, width) in 0…1."""
    name: str
    """What it samples from: a sampler of latents, a prior or prompts."""
    num_classes: int = 0
    """Classes that it can be asked for, the whole numbers from 0."""


def model_generator(model: Any, sampler: Sampler | None = None, seed: int = 0) -> ImageGenerator:
    """A model of hf_ae, with its own prior over codes, or a sampler of its latents (default: N(0, I)). Raises
    ValueError."""
    low, high = model.config.pixel_range
    by_itself = sampler is None and model.can_generate_images
    require(
        sampler is not None or by_itself or model.can_sample,
        "Only a variational autoencoder's latents follow N(0, I): fit a sampler to this one's (--sampler mixture).",
    )

    def generate(n: int, labels: Tensor | None = None) -> Tensor:
        return (sample(model, n, sampler, seed, labels) - low) / (high - low)

    if by_itself:
        return ImageGenerator(generate, "its own prior", model.config.prior_classes)
    return (
        ImageGenerator(generate, sampler.kind, sampler.num_classes) if sampler else ImageGenerator(generate, "prior")
    )


def pipeline_generator(pipe: Any, prompts: Sequence[str], seed: int = 0, batch: int = 50) -> ImageGenerator:
    """A text-to-image pipeline that draws an image for each of `prompts`, in turn."""

    def generate(n: int, labels: Tensor | None = None) -> Tensor:
        texts = [prompts[i % len(prompts)] for i in range(n)]
        starts = range(0, n, batch)
        return torch.cat(
            [pipe(texts[i : i + batch], seed=seed + i, output_type="pt").images.float().cpu() for i in starts]
        )

    pipe.set_progress_bar_config(disable=True)
    return ImageGenerator(generate, "prompts")


def check_sampler(wanted: str | None) -> None:
    """Raise ValueError for what `--sampler` does not know."""
    good = wanted in (None, "saved", *KINDS)
    require(good, f"sampler={wanted!r} is not known: write one of saved, {', '.join(KINDS)}.")


def find_sampler(
    model: Any, folder: str, wanted: str | None, train_pixels: Callable[[], Tensor], labels: Tensor | None = None
) -> Sampler | None:
    """What `--sampler` says: a kind, fitted now to the latents of `train_pixels()`, or `saved`. None for N(0, I) or an
    own prior. Default: the sampler beside the model, where there is one. Raises ValueError."""
    check_sampler(wanted)
    if wanted == "saved" or (wanted is None and file_beside(folder, FILE) is not None):
        return Sampler.load(folder)
    return None if wanted in (None, "prior") else fit(encode_all(model, train_pixels()), wanted, labels)


def measure_generation(
    generator: ImageGenerator, real: Tensor, train: Tensor | None, network: torch.nn.Module,
    labels: Tensor | None = None, train_labels: Tensor | None = None,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """(metrics, generated images): as many images as there are of `real` (images, channels, height, width), in 0…1.

    fid, kid, precision, recall, density, coverage in features of `network`; `floor`: the same for as many training
    images, which no generator should beat by much, left out without `train`; seconds_per_image. A generator with
    classes is asked for them in turn; with the `labels` (images,) of `real` and of `train` also
    classification_accuracy: of a classifier trained on generated images alone, on `real` (Ravuri and Vinyals 2019;
    floor: trained on real ones), and asked_class: the fraction of generated images that the classifier trained on real
    ones gives the class that was asked for (Shmelkov et al. 2018; floor: that of `real`).
    """
    asked = torch.arange(len(real)) % generator.num_classes if generator.num_classes else None
    started = time.perf_counter()
    images = eight_bits(generator.generate(len(real), asked))
    seconds = time.perf_counter() - started
    wanted = features_of(network, real)
    metrics: dict[str, Any] = {"images": len(real), "sampler": generator.name}
    metrics |= distances(wanted, features_of(network, images)) | {"seconds_per_image": seconds / len(images)}
    if train is None:
        return metrics, images
    metrics["floor"] = distances(wanted, features_of(network, train[: len(real)]))
    if asked is not None and labels is not None and train_labels is not None:
        classes = int(max(labels.max(), asked.max())) + 1

        def classifier(shown: Tensor, shown_labels: Tensor) -> FeatureNetwork:
            with own_random_numbers():
                return train_classifier(FeatureNetwork(classes, real.shape[1]), shown, shown_labels)

        of_generated, of_real = classifier(images, asked), classifier(train, train_labels)
        metrics["classification_accuracy"] = accuracy(of_generated, real, labels)
        metrics["asked_class"] = accuracy(of_real, images, asked)
        metrics["floor"] |= dict.fromkeys(("classification_accuracy", "asked_class"), accuracy(of_real, real, labels))
    return metrics, images


def eight_bits(images: Tensor) -> Tensor:
    """As an image file would hold them: 256 levels in 0…1."""
    return (images.clamp(0, 1) * 255).round() / 255


def captions_of(rows: Any) -> list[str]:
    """A caption for each row, for a pipeline to draw: the column `text`, or the names of the only column of
    classes."""
    classes = class_columns(rows)
    good = "text" in rows.column_names or len(classes) == 1
    require(good, "A pipeline draws captions, and the dataset has no column 'text', nor one of classes.")
    return read_texts(rows, "text" if "text" in rows.column_names else classes[0])
