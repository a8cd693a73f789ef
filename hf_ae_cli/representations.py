"""Commands that use what models encode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from .options import (
    Dataset,
    DatasetConfig,
    Device,
    ImageColumn,
    MaxImages,
    ModelArgument,
    OutputFolder,
    SkipBroken,
    app,
    check,
    check_folder_of,
    option,
)


@app.command()
def encode(
    model: ModelArgument,
    dataset_name: Dataset,
    output: OutputFolder,
    dataset_config_name: DatasetConfig = None,
    image_column: ImageColumn = None,
    split: Annotated[str | None, option("Split to encode; default: all.")] = None,
    keep_columns: Annotated[str | None, option("Columns to keep beside the latents: a,b.", "--keep_columns")] = None,
    task: Annotated[int, option("This one of the tasks, from 0 on.", min=0)] = 0,
    num_tasks: Annotated[int, option("Tasks that share the work.", "--num_tasks", min=1)] = 1,
    max_images: MaxImages = None,
    skip_broken_images: SkipBroken = False,
    push_to_hub: Annotated[
        str | None, option("Dataset repository owner/name to upload to, when all is there.", "--push_to_hub")
    ] = None,
    device: Device = None,
) -> None:
    """Encode a dataset into parquet files of latents that load_dataset reads. Stopped, it goes on where it was."""
    from hf_ae.data import open_dataset, pick_split
    from hf_ae.hub.push import push_dataset
    from hf_ae.latents.encoding import encode_dataset, is_complete, write_card
    from hf_ae.loading import load_model, pick_device

    check(not output.is_file(), f"{output} is a file: write -o with a folder.")
    loaded, processor = load_model(model, pick_device(device))
    splits = open_dataset(dataset_name, dataset_config_name)
    for name in [split] if split else list(splits):
        rows = pick_split(splits, name)
        rows = rows if max_images is None else rows.select(range(min(max_images, len(rows))))
        how: dict[str, Any] = dict(image_column=image_column, output_dir=output, split=name, progress=True)
        columns = [column.strip() for column in (keep_columns or "").split(",") if column.strip()]
        how |= dict(task=task, num_tasks=num_tasks, skip_broken_images=skip_broken_images, processor=processor)
        codes = encode_dataset(loaded, rows, columns, **how)
        print(f"Written to {output}: {len(codes):,} of {len(rows):,} rows of the split {name!r}")
    write_card(output, model, dataset_name)
    if not is_complete(output):
        unsent = " Nothing is uploaded before that." if push_to_hub is not None else ""
        print(f"The other tasks have yet to write theirs.{unsent}")
    elif push_to_hub is not None:
        print(f"Uploaded: {push_dataset(output, push_to_hub)}")


@app.command()
def anomaly(
    model: ModelArgument,
    dataset_name: Dataset,
    output: Annotated[Path, option("Table to write: .parquet, .csv or .json.", "-o", "--output")] = Path(
        "scores.parquet"
    ),
    dataset_config_name: DatasetConfig = None,
    image_column: ImageColumn = None,
    split: Annotated[str | None, option("Split to look for outliers in; default: test or validation.")] = None,
    train_split: Annotated[
        str | None, option("Split of normal images, to fit to; default: train.", "--train_split")
    ] = None,
    score: Annotated[
        str | None,
        option("reconstruction, bound, gaussian, mixture, neighbors, joined by +; default: mixture+neighbors."),
    ] = None,
    contamination: Annotated[float | None, option("Fraction of the normal images to flag; default: 0.05.")] = None,
    refit: Annotated[bool, option("Fit anew, also where the model has a detector.", "--refit")] = False,
    max_images: MaxImages = None,
    device: Device = None,
) -> None:
    """Find the images of a dataset that are least like the normal ones: a table of scores, and a figure of the most
    unusual. A detector that is fitted for it is saved beside the model, where this is a folder."""
    check_folder_of(output)
    check(output.suffix in (".parquet", ".csv", ".json"), f"{output} must end in .parquet, .csv or .json.")
    from hf_ae.data import evaluation_split, open_dataset, pick_split
    from hf_ae.evaluation.anomaly import detector_of, score_table

    splits = open_dataset(dataset_name, dataset_config_name)
    split = evaluation_split(splits, split)
    rows = pick_split(splits, split)
    rows = rows if max_images is None else rows.select(range(min(max_images, len(rows))))
    options = {"score": score, "contamination": contamination}
    chosen = {name: value for name, value in options.items() if value is not None}
    detector = detector_of(model, splits, split, train_split, image_column, refit, chosen, device)
    table = score_table(detector, rows, image_column, output.with_suffix(".png"))
    {".parquet": table.to_parquet, ".csv": table.to_csv, ".json": table.to_json}[output.suffix](output)
    outliers = sum(table["outlier"])
    figure = f"; {output.with_suffix('.png')}" if detector.processor.feature_columns is None else ""
    print(f"Written: {output}, {outliers:,} of {len(rows):,} rows are outliers{figure}")


@app.command("map")
def map_command(
    model: ModelArgument,
    dataset_name: Dataset,
    output: Annotated[Path, option("Page to write, .html, or figure, .png.", "-o", "--output")] = Path("map.html"),
    dataset_config_name: DatasetConfig = None,
    image_column: ImageColumn = None,
    label_column: Annotated[str | None, option("Classes to colour by; default: label.", "--label_column")] = None,
    split: Annotated[str | None, option("Split to map; default: test or validation.")] = None,
    method: Annotated[
        str | None, option("pca, tsne, umap, or latents where there are two (the default there; else pca).")
    ] = None,
    max_images: Annotated[int, option("Take the first images only.", "--max_images", min=1)] = 4000,
    device: Device = None,
) -> None:
    """Map a dataset by its latents: a page to point at, or a figure, and how well the map keeps who is near whom."""
    check_folder_of(output)
    check(output.suffix in (".html", ".png"), f"{output} must end in .html or .png.")
    from hf_ae.evaluation.mapping import map_dataset

    how: dict[str, Any] = dict(image_column=image_column, label_column=label_column, split=split, method=method)
    how |= dict(config=dataset_config_name, max_images=max_images, device=device)
    quality, written = map_dataset(model, dataset_name, output, **how)
    print("  ".join(f"{name} {value:.3f}" for name, value in quality.items()))
    print(f"Written: {', '.join(map(str, written))}")
    if output.suffix == ".html" and len(written) == 1:
        print("Without the decoder: that needs two latents or --method pca, and pip install 'hf_ae[export]'.")


@app.command()
def sprites(
    output: OutputFolder = Path("sprites"), colored: Annotated[bool, option("Six colours too.", "--colored")] = False
) -> None:
    """Generate a dataset of 64×64 sprites of which every factor is known: shape, scale, orientation, place. 737,280
    images (120 MB, two minutes), or six times as many in colour."""
    from hf_ae.data.sprites import sprites as generate

    check(not output.exists() or (output.is_dir() and not any(output.iterdir())), f"{output} is there already.")
    print("Drawing …")
    rows = generate(colored)
    (output / "data").mkdir(parents=True)
    rows.to_parquet(output / "data" / "train-00000-of-00001.parquet")
    print(f"Written to {output}: {len(rows):,} images with {', '.join(rows.column_names[1:])}")
