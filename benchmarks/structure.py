"""Natural images fill a thin sheet in the space of all pixels: how far other images lie from it.

    python benchmarks/structure.py FASHION_MNIST MNIST [-o structure.png] [--images 1000]

Kinds of images: the test split; another dataset; the test split with the phases of its frequencies scrambled (the same
spectrum), and with its pixels shuffled (the same gray values); random pixels. Prints, for each kind, the squared error
of fashion-conv-ae, the bits of a file of fashion-compressive, and the distance to the nearest training image, and
draws that beside examples. Then, of an AE, a VAE and a β-VAE, where random codes (of a normal distribution with the
mean and variance of each latent) and codes halfway between two test images lead to: the distance of the decoded images
to the nearest training image, beside that of reconstructed test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ae.codec import compress
from hf_ae.data import open_dataset, read_rows
from hf_ae.latents import decode, encode_images, random_latents, reconstruct
from hf_ae.loading import load_model
from hf_ae.models.image_processing import AutoencoderImageProcessor
from hf_ae.plots import new_figure, to_images

CARDS = Path("model_cards")
FAMILIES = {"AE": "fashion-conv-ae", "VAE": "fashion-vae", "β-VAE": "fashion-beta-vae"}


def main() -> None:
    """Print both tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="Fashion-MNIST: Hub id or folder")
    parser.add_argument("other", help="another dataset, such as MNIST")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("-o", "--output", type=Path, default=Path("structure.png"))
    args = parser.parse_args()
    model, processor = load_model(CARDS / "fashion-conv-ae")
    splits = open_dataset(args.dataset_name)
    train = load(splits["train"], processor, None)
    kinds = kinds_of(
        load(splits["test"], processor, args.images), load(open_dataset(args.other)["test"], processor, args.images)
    )
    codec, found = load_model(CARDS / "fashion-compressive")[0], {}
    print(
        "| | squared error | bits of a file | distance to the nearest training image |\n| --- | ---: | ---: | ---: |"
    )
    for name, images in kinds.items():
        error = (reconstruct(model, images) - images).square().flatten(1).sum(1)
        pictures = to_images(images[:100], images.shape[-1])
        files = torch.tensor([8 * len(compress(codec, picture.convert("L"), 0.5)) for picture in pictures]).float()
        found[name] = (images, error, files, distances(images, train))
        print(f"| {name} | {' | '.join(f'{values.mean():.1f}' for values in found[name][1:])} |", flush=True)
    draw(found, args.output)
    print("\n| distance to the nearest training image | reconstructed | halfway | random codes |")
    print("| --- | ---: | ---: | ---: |")
    for title, folder in FAMILIES.items():
        means = codes_of(folder, kinds["test images"], train)
        print(f"| {title} | {' | '.join(f'{value:.2f}' for value in means)} |", flush=True)


def load(rows: Any, processor: AutoencoderImageProcessor, limit: int | None) -> Tensor:
    """Images in 0…1."""
    return read_rows(rows, processor, limit=limit).float() / 255


def kinds_of(real: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Name -> images, the most natural first."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.fft.fft2(real)
    turns = torch.fft.fft2(
        torch.rand(real.shape, generator=generator)
    ).angle()  # of real noise: symmetric, as it must be
    scrambled = torch.fft.ifft2(spectrum.abs() * torch.exp(1j * turns)).real
    least, most = (function(scrambled, (2, 3), keepdim=True) for function in (torch.amin, torch.amax))
    scrambled = (scrambled - least) / (most - least)
    order = torch.rand(len(real), real[0].numel(), generator=generator).argsort(1)
    return {
        "test images": real, "another dataset": other, "phases scrambled": scrambled.float(),
        "pixels shuffled": real.flatten(1).gather(1, order).view_as(real),
        "random pixels": torch.rand(real.shape, generator=generator),
    }  # fmt: skip


def distances(images: Tensor, train: Tensor) -> Tensor:
    """Of each image the Euclidean distance to the nearest of `train`, in pixels from 0 to 1: (images,)."""
    return torch.cat([torch.cdist(part.flatten(1), train.flatten(1)).amin(1) for part in images.split(200)])


def codes_of(folder: str, test: Tensor, train: Tensor) -> list[float]:
    """Mean distances of test images' reconstructions, of what lies halfway between two, and of random codes."""
    model, _ = load_model(CARDS / folder)
    latents = encode_images(model, test)
    pairs = latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))]
    drawn = [latents, (latents + pairs) / 2, random_latents(model, len(test), like=latents)]
    return [float(distances(decode(model, codes), train).mean()) for codes in drawn]


def draw(found: dict[str, Any], path: Path) -> None:
    """A row for each kind: examples, and the three numbers."""
    figure = new_figure(13, 6.5)
    grid = figure.add_gridspec(len(found), 4, width_ratios=[2.2, 1, 1, 1])
    titles = ("squared error of an autoencoder", "bits of a file", "distance to the nearest\ntraining image")
    for row, (name, (images, *_)) in enumerate(found.items()):
        axis = figure.add_subplot(grid[row, 0])
        axis.imshow(np.concatenate([image[0].numpy() for image in images[:8]], 1), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center")
    for column, title in enumerate(titles, 1):
        axis = figure.add_subplot(grid[:, column])
        values = [found[name][column].numpy() for name in found]
        axis.boxplot(
            values[::-1], orientation="horizontal", showfliers=False, widths=0.5, medianprops={"color": "#d62728"}
        )
        axis.set(title=title, yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
