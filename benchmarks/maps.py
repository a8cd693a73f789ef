"""Maps in two dimensions: an autoencoder with two latents beside PCA, t-SNE and UMAP.

    python benchmarks/maps.py FASHION_MNIST [--model model_cards/fashion-ae-2d] [--latents model_cards/fashion-conv-ae]
        [--images 4000] [-o map.png]

Prints, for each map, trustworthiness and continuity (12 neighbours) and the accuracy of the 10 nearest neighbours on
the first test images; where a map also takes new images, that accuracy from the whole training split to the whole test
split; and of those that can draw, the squared error of a test image as a fraction of that of PCA with two components.
t-SNE and UMAP are of the images, and of the latents of another model (--latents). Draws all maps side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ae.data import open_dataset, read_labels, read_rows
from hf_ae.latents import encode_images, reconstruct
from hf_ae.latents.maps import map_latents, map_quality, neighbor_accuracy
from hf_ae.loading import load_model
from hf_ae.metrics import pca_reconstruction
from hf_ae.plots import new_figure, scatter_of_classes


def main() -> None:
    """Print the table and draw the maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="Hub id or folder, with columns of images and classes")
    parser.add_argument("--model", default="model_cards/fashion-ae-2d")
    parser.add_argument("--latents", default="model_cards/fashion-conv-ae")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("-o", "--output", type=Path, default=Path("map.png"))
    args = parser.parse_args()
    (model, processor), (other, _) = load_model(args.model), load_model(args.latents)
    splits = open_dataset(args.dataset_name)
    train, test = (read_rows(splits[split], processor).float() / 255 for split in ("train", "test"))
    labels = {split: read_labels(splits, split, "label") for split in ("train", "test")}
    some, classes, names = test[: args.images], labels["test"][0], labels["test"][1]
    maps: dict[str, Any] = {"PCA of the images": map_latents(some.flatten(1), "pca").points}
    maps[Path(args.model).name] = encode_images(model, some).double().numpy()
    for method, title in (("tsne", "t-SNE"), ("umap", "UMAP")):
        maps[f"{title} of the images"] = map_latents(some.flatten(1), method).points
        maps[f"{title} of {Path(args.latents).name}"] = map_latents(encode_images(other, some), method).points
    new = new_images(model, train, test, labels["train"][0], classes)
    print("| | trustworthiness | continuity | 10-NN here | 10-NN, new images | squared error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, points in maps.items():
        quality = map_quality(some, points, classes[: len(some)])
        cells = [f"{value:.3f}" for value in quality.values()] + new.get(name.split(" ")[0], ["", ""])
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    draw(maps, classes[: len(some)].tolist(), names, args.output)


def new_images(model: Any, train: Tensor, test: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, list[str]]:
    """Name -> (accuracy from the training split to the test split, squared error as a fraction of PCA's), as text."""
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=0).fit(train.flatten(1).numpy())
    planes = {
        "PCA": [pca.transform(x.flatten(1).numpy()) for x in (train, test)],
        Path(model.name_or_path).name: [encode_images(model, x).numpy() for x in (train, test)],
    }
    rebuilt = {"PCA": pca_reconstruction(train, test, 2), Path(model.name_or_path).name: reconstruct(model, test)}
    errors = {name: float((x - test).square().sum() / len(test)) for name, x in rebuilt.items()}  # type: ignore
    return {
        name: [
            f"{neighbor_accuracy(there, wanted.numpy(), (here, labels.numpy())):.3f}",
            f"{errors[name]:.2f}, {errors[name] / errors['PCA']:.2f} of PCA's",
        ]
        for name, (here, there) in planes.items()
    }


def draw(maps: dict[str, Any], labels: list[int], names: list[str], path: Path) -> None:
    """All maps side by side."""
    figure = new_figure(15, 9.5)
    axes = figure.subplots(2, 3).flat
    order = sorted(maps, key=lambda name: name.startswith(("t-SNE", "UMAP")))
    for axis, name in zip(axes, order):
        scatter_of_classes(axis, maps[name], labels, names if name == order[2] else ())
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(path)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
