"""What the commands share: the application, options of one name and meaning, and checks of paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def option(text: str, *names: str, **limits: Any) -> Any:
    """An option with this help text; it is named like its parameter, with hyphens, unless `names` says otherwise."""
    return typer.Option(*names, help=text, **limits)


ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a model.")]
Model = Annotated[str, option("Folder or Hub id of a model.")]
ImageFile = Annotated[Path, typer.Argument(help="Image file.")]
Dataset = Annotated[str, option("Hub id of a dataset, or a folder.", "--dataset_name")]
DatasetConfig = Annotated[str | None, option("Where the dataset has several.", "--dataset_config_name")]
ImageColumn = Annotated[str | None, option("Default: the only one with images.", "--image_column")]
LabelColumn = Annotated[str | None, option("Classes; for generation, to fit the sampler to each.", "--label_column")]
Split = Annotated[str | None, option("Split to measure on; default: test or validation.")]
TrainSplit = Annotated[str, option("Split to fit PCA and samplers on.", "--train_split")]
MaxImages = Annotated[int | None, option("Take the first images only.", "--max_images", min=1)]
Binarize = Annotated[bool, option("One fixed 0/1 draw of each pixel.", "--binarize")]
Quality = Annotated[float | None, option("0 (smallest files) to 1; default: the model's.")]
SamplerKind = Annotated[
    str | None, option("Draw latents from: saved, prior, gaussian, mixture (fitted now).", "--sampler")
]
Network = Annotated[
    str | None, option("An image model of transformers; default: one that ships.", "--feature_network")
]
Tasks = Annotated[
    str | None,
    option(
        "reconstruction,likelihood,compression (default), generation,representation,anomaly,disentanglement,repair."
    ),
]
Pipeline = Annotated[str | None, option("Folder or Hub id of a pipeline; default: emoji-text-to-image.", "--model")]
Table = Annotated[Path | None, option("Table to write, .md or .json; a figure .png beside it.", "-o", "--output")]
Device = Annotated[str | None, option("cuda, mps, xpu or cpu; default: the first that is there.")]
Replace = Annotated[bool, option("Put these figures in the place of fuller ones.", "--replace")]
OutputFile = Annotated[Path, option("File to write.", "-o", "--output")]
OutputFolder = Annotated[Path, option("Folder to write.", "-o", "--output")]
SkipBroken = Annotated[bool, option("Leave out images that cannot be read.", "--skip_broken_images")]


def check_image_path(path: Path) -> None:
    """Raise ValueError unless `path` can be written as an image; there are formats that Pillow only reads."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())  # which calls Image.init
    check(kind is not None, f"{path} has no ending of an image, such as .png.")
    check(kind in Image.SAVE, f"Pillow reads {kind} images and writes none: write {path.with_suffix('.png')}.")
    check_folder_of(path)


def check_folder_of(path: Path) -> None:
    """Raise ValueError unless a file can be written at `path`."""
    check(not path.is_dir(), f"{path} is a folder.")
    check(path.resolve().parent.is_dir(), f"The folder of {path} does not exist.")


def check(condition: bool, message: str) -> None:
    if not condition:
        from hf_ae.errors import UserError

        raise UserError(message)
