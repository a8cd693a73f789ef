"""Commands on models and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    Binarize,
    Dataset,
    DatasetConfig,
    Device,
    ImageColumn,
    ImageFile,
    LabelColumn,
    MaxImages,
    Model,
    ModelArgument,
    Network,
    OutputFile,
    OutputFolder,
    Pipeline,
    Quality,
    Replace,
    SamplerKind,
    Split,
    Table,
    Tasks,
    TrainSplit,
    app,
    check,
    check_folder_of,
    check_image_path,
    option,
)  # fmt: skip


@app.command()
def evaluate(
    model: ModelArgument,
    dataset_name: Dataset,
    dataset_config_name: DatasetConfig = None,
    image_column: ImageColumn = None,
    split: Split = None,
    train_split: TrainSplit = "train",
    tasks: Tasks = None,
    samples: Annotated[int, option("Importance samples an image for the likelihood.", min=1)] = 100,
    max_images: MaxImages = None,
    binarize: Binarize = False,
    sampler: SamplerKind = None,
    label_column: LabelColumn = None,
    feature_network: Network = None,
    corrupt: Annotated[str | None, option("What to repair, as gaussian:0.5; default: the model's own.")] = None,
    outliers: Annotated[str | None, option("Dataset whose images are outliers, for anomaly.")] = None,
    normal_class: Annotated[
        str | None, option("Class of the normal images, for anomaly; all others are outliers.", "--normal_class")
    ] = None,
    factor_columns: Annotated[
        str | None, option("Factors a,b for disentanglement; default: columns of whole numbers.", "--factor_columns")
    ] = None,
    device: Device = None,
    replace: Replace = False,
) -> None:
    """Measure a model on a dataset, beside PCA; in a local folder, write metrics.json, figures and the card."""
    from hf_ae.evaluation import evaluate as evaluation

    data: dict[str, Any] = dict(
        dataset_config_name=dataset_config_name, image_column=image_column, split=split, train_split=train_split
    )
    how: dict[str, Any] = dict(tasks=tasks, samples=samples, max_images=max_images, binarize=binarize)
    generation: dict[str, Any] = dict(sampler=sampler, label_column=label_column, feature_network=feature_network)
    run: dict[str, Any] = dict(device=device, replace=replace)
    rest: dict[str, Any] = dict(corrupt=corrupt, outliers=outliers, normal_class=normal_class)
    rest |= dict(factor_columns=factor_columns)
    metrics = evaluation.evaluate(model, dataset_name, **run, **data, **how, **generation, **rest)
    print(evaluation.summary(metrics))


@app.command("fit-sampler")
def fit_sampler(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    dataset_name: Dataset,
    kind: Annotated[str, option("prior, gaussian or mixture.")] = "mixture",
    components: Annotated[int, option("Gaussians of a mixture, for each class.", min=1)] = 10,
    train_split: TrainSplit = "train",
    dataset_config_name: DatasetConfig = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    max_images: MaxImages = None,
    binarize: Binarize = False,
    seed: Annotated[int, option("Of the mixture's start.")] = 0,
    device: Device = None,
) -> None:
    """Fit a distribution to the latents of training images, to draw new images from, and save it beside the model."""
    from hf_ae.latents import sampling

    columns = (dataset_config_name, image_column, label_column)
    path = sampling.fit_sampler(
        model, dataset_name, kind, components, train_split, *columns, max_images, binarize, seed, device
    )
    print(f"Written: {path}")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of models.")],
    dataset_name: Dataset,
    output: Table = None,
    split: Split = None,
    max_images: MaxImages = None,
    sampler: SamplerKind = None,
    feature_network: Network = None,
    device: Device = None,
) -> None:
    """Measure several models on one dataset: one table of reconstruction, sample quality, mode coverage, speed and
    parameters."""
    from hf_ae.evaluation import compare as comparison

    if output is not None:
        comparison.check_output(output)
    table, figure = comparison.compare(models, dataset_name, split, max_images, sampler, feature_network, device)
    print(comparison.to_markdown(table))
    if output is not None:
        print("Written: " + ", ".join(map(str, comparison.write(table, figure, output))))


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Model,
    output: OutputFile = Path("reconstruction.png"),
    device: Device = None,
) -> None:
    """Send image files through a model and draw them beside what comes back."""
    from hf_ae.errors import user_input
    from hf_ae.latents import reconstruct as reconstruct_images
    from hf_ae.loading import load_model, pick_device
    from hf_ae.metrics import reconstruction_metrics
    from hf_ae.plots import labelled_rows

    check_image_path(output)
    loaded, processor = load_model(model, pick_device(device))
    low, high = loaded.config.pixel_range
    with user_input():
        values = processor.preprocess(images, return_tensors="pt").pixel_values
    pixels = (values - low) / (high - low)
    rebuilt = reconstruct_images(loaded, pixels)
    labelled_rows({"original": pixels, "reconstruction": rebuilt}, output, cell=112)
    for path, x, r in zip(images, pixels, rebuilt):
        print(f"{path}: PSNR {reconstruction_metrics(x[None], r[None])['psnr']:.2f} dB")
    print(f"Written: {output}")


@app.command()
def compress(
    image: ImageFile, model: Model, output: OutputFile, quality: Quality = None, device: Device = None
) -> None:
    """Compress an image with an autoencoder into a small file that names the model: its Hub id, or a relative path as
    it is written here."""
    check_folder_of(output)
    image_name = output.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".avif")
    check(not image_name, f"{output} would be no {output.suffix} image: write {output.with_suffix('.hfae')}.")
    from hf_ae import codec
    from hf_ae.loading import load_autoencoder, pick_device

    name = codec.shared_name(model)
    loaded = load_autoencoder(model, device=pick_device(device, float64=True))
    data = codec.compress(loaded, image, quality, model_id=name)
    output.write_bytes(data)
    print(f"Written: {output}, {len(data):,} bytes")
    if not name:
        print("It names no model, since the path of this one is nobody else's business: decompress it with --model.")


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(help="A file that hf-ae compress wrote.")],
    output: OutputFile,
    model: Annotated[str | None, option("Folder or Hub id; default: the model that the file names.")] = None,
    device: Device = None,
) -> None:
    """Turn a compressed file back into an image."""
    check_image_path(output)
    check(file.is_file(), f"The file {file} does not exist.")
    from hf_ae import codec
    from hf_ae.errors import UserError
    from hf_ae.loading import load_autoencoder, pick_device

    data = file.read_bytes()
    name = model or codec.unpack(data).model_id
    check(bool(name), f"{file} names no model: write --model with the one it was made with.")
    try:
        loaded = load_autoencoder(name, device=pick_device(device, float64=True))
    except UserError as error:
        advice = "" if model else f" {file} names it so: write --model where it lies elsewhere."
        raise UserError(f"{error}{advice}") from error
    image = codec.decompress(data, loaded)
    image.save(output)
    print(f"Written: {output}, {image.width}×{image.height} pixels")


@app.command()
def roundtrip(
    image: ImageFile,
    model: Model,
    output: OutputFile = Path("roundtrip.png"),
    quality: Quality = None,
    device: Device = None,
) -> None:
    """Compress and decompress an image, and draw what comes back beside JPEG, WebP and AVIF of the same size."""
    check_image_path(output)
    from hf_ae.errors import user_input
    from hf_ae.loading import load_autoencoder, pick_device
    from hf_ae.pipelines import VAERoundTripPipeline

    pipe = VAERoundTripPipeline(load_autoencoder(model, device=pick_device(device, float64=True)))
    with user_input():
        result = pipe(image, quality)
    for name, found in {model: result.decoded, **result.others}.items():
        quality_reached = f"PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.3f}"
        print(f"{name}: {found.size:,} bytes, {found.bpp:.3f} bits per pixel, {quality_reached}")
    result.panel.save(output)
    print(f"Written: {output}")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; without one, variations of --image.")] = None,
    output: OutputFile = Path("image.png"),
    model: Pipeline = None,
    negative_prompt: Annotated[str | None, option("What not to draw.")] = None,
    steps: Annotated[int | None, option("Denoising steps; default: the pipeline's.")] = None,
    guidance_scale: Annotated[float | None, option("How closely to follow the prompt; 1: freely.")] = None,
    seed: Annotated[int, option("The same seed gives the same image.")] = 0,
    images: Annotated[int, option("Images to draw, with seeds from --seed on.", min=1)] = 1,
    height: Annotated[int | None, option("In pixels; default: the size of training.")] = None,
    width: Annotated[int | None, option("In pixels.")] = None,
    image: Annotated[Path | None, option("Start from this image, cut to the size that is drawn.")] = None,
    strength: Annotated[float, option("How far to leave --image: 0 not at all, 1 entirely.")] = 0.8,
    mask: Annotated[Path | None, option("An image as large as --image, white where to paint it anew.")] = None,
    candidates: Annotated[int, option("Images for each one that the discriminator keeps.", min=1)] = 1,
    lora: Annotated[str | None, option("Folder or Hub id of adapters (LoRA) to draw with.")] = None,
    scheduler: Annotated[str | None, option("A diffusers scheduler class; default: the pipeline's.")] = None,
    steps_grid: Annotated[str | None, option("Draw a sheet, one row for each: 10,15,20,30,40.")] = None,
    seeds: Annotated[int, option("Columns of the sheet.", min=1)] = 4,
    device: Device = None,
) -> None:
    """Draw an image from a prompt with a text-to-image pipeline."""
    check_image_path(output)
    from hf_ae.diffusion.drawing import draw_images, load_adapters, starting_image, steps_sheet, whole_numbers
    from hf_ae.errors import user_input
    from hf_ae.loading import load_pipeline, pick_device
    from hf_ae.models.image_processing import open_image

    check(bool(prompt or image), 'Write what to draw: hf-ae generate "a prompt".')
    options: dict[str, Any] = dict(
        negative_prompt=negative_prompt, guidance_scale=guidance_scale, height=height, width=width,
        num_candidates=candidates,
    )  # fmt: skip
    counts = None if steps_grid is None else whole_numbers(steps_grid)
    with user_input():
        given = {name: open_image(path) for name, path in {"image": image, "mask_image": mask}.items() if path}
    pipe = load_pipeline(model, scheduler, pick_device(device))
    if lora is not None:
        load_adapters(pipe, lora)
    options |= starting_image(pipe, given, height, width) | {"strength": strength}
    if counts:
        steps_sheet(pipe, prompt, counts, seed, seeds, options).save(output)
    else:
        draw_images(pipe, prompt, steps, seed, images, options).save(output)
    print(f"Written: {output}")


@app.command()
def export(
    model: ModelArgument,
    output: Annotated[Path, option("Folder to write.", "-o", "--output")],
    format: Annotated[str, option("onnx, or torch for programs of torch.export.")] = "onnx",
) -> None:
    """Write the encoder and the decoder of a model as ONNX or torch.export programs, and compare what they compute."""
    from hf_ae.export import differences
    from hf_ae.export import export as write
    from hf_ae.loading import image_processor_for, load_autoencoder

    loaded = load_autoencoder(model)
    check(hasattr(loaded, "codec_method"), f"{model} is a model of diffusers: hf-ae export takes those of hf_ae.")
    files = write(loaded, output, format)
    image_processor_for(loaded).save_pretrained(output)
    for name, found in differences(loaded, files).items():
        largest = ", ".join(f"{key} {value.max():.1e}" for key, value in found.items())
        print(f"Written: {files[name]}, largest difference from the model: {largest}")


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model, a pipeline or a Space, exactly what the repository will hold.")
    ],
    repo: Annotated[str, option("owner/name on the Hub.")],
    private: Annotated[bool, option("Make the repository private when it is created.", "--private")] = False,
    dry_run: Annotated[bool, option("Check only; upload nothing.", "--dry-run")] = False,
) -> None:
    """Check the folder of a model, a pipeline or a Space (weights load, card complete, no stray files), write the code
    that it carries, and upload it in one commit."""
    from hf_ae.hub.push import check_folder, push_folder

    files = check_folder(folder, dry_run)
    address = push_folder(folder, repo, private, dry_run)
    print("\n".join(f"  {name}" for name in files))
    print(f"{'Checked, nothing uploaded' if dry_run else 'Uploaded'}: {len(files)} files, {address}")


@app.command()
def demo(
    output: OutputFolder = Path("demo"), seconds: Annotated[int, option("How long to train, about.", min=5)] = 60
) -> None:
    """Show the product on what the checkout carries: prompts to images, a round trip, and a model trained, reloaded,
    evaluated."""
    from hf_ae.demo import run

    run(output, seconds)
