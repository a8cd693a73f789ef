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
    loaded, _ = load_model(model, pick_device(device))
    splits = open_dataset(dataset_name, dataset_config_name)
    for name in [split] if split else list(splits):
        rows = pick_split(splits, name)
        rows = rows if max_images is None else rows.select(range(min(max_images, len(rows))))
        how: dict[str, Any] = dict(image_column=image_column, output_dir=output, split=name, progress=True)
        columns = [column.strip() for column in (keep_columns or "").split(",") if column.strip()]
        how |= dict(task=task, num_tasks=num_tasks, skip_broken_images=skip_broken_images)
        codes = encode_dataset(loaded, rows, columns, **how)
        print(f"Written to {output}: {len(codes):,} of {len(rows):,} rows of the split {name!r}")
    write_card(output, model, dataset_name)
    if not is_complete(output):
        print("The other tasks have yet to write theirs.")
    elif push_to_hub is not None:
        print(f"Uploaded: {push_dataset(output, push_to_hub)}")


@app.command()
def sprites(
    output: OutputFolder = Path("sprites"), colored: Annotated[bool, option("Six colours too.", "--colored")] = False
) -> None:
    """Generate a dataset of 64×64 sprites of which every factor is known: shape, scale, orientation, place."""
    from hf_ae.data.sprites import sprites as generate

    check(not output.exists() or (output.is_dir() and not any(output.iterdir())), f"{output} is there already.")
    print("Drawing …")
    rows = generate(colored)
    (output / "data").mkdir(parents=True)
    rows.to_parquet(output / "data" / "train-00000-of-00001.parquet")
    print(f"Written to {output}: {len(rows):,} images with {', '.join(rows.column_names[1:])}")
