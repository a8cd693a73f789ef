"""The command line: hf-ae demo | evaluate | compare | fit-sampler | reconstruct | compress | decompress | roundtrip | generate | push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_ae.training.arguments import one_line_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Model = Annotated[str, typer.Option("--model", help="Folder or Hub id of a model.")]
ImageFile = Annotated[Path, typer.Argument(help="Image file.")]
Quality = Annotated[float | None, typer.Option("--quality", help="0 (smallest files) to 1; default: the model's.")]
SamplerKind = Annotated[str | None, typer.Option("--sampler", help="Draw codes from: saved, prior, gaussian, mixture (fitted now).")]
Network = Annotated[str | None, typer.Option("--feature_network", help="A transformers image model; default: the small one that ships.")]
Palette = Annotated[bool, typer.Option("--palette", help="256 colours of latents with error diffusion (models not made for compression).")]


def main(argv: list[str] | None = None):
    """Run the command line. Bad input ends with one line and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        try:
            code = app(arguments or ["--help"], standalone_mode=False)
        except Exception as error:
            if hasattr(error, "format_message"):  # a wrong option or argument
                raise ValueError(f"{error.format_message()} See hf-ae --help.") from None
            raise
    sys.exit(code or 0)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model.")],
    dataset_name: Annotated[str, typer.Option("--dataset_name", help="Hub id of a dataset, or a folder.")],
    dataset_config_name: Annotated[str | None, typer.Option("--dataset_config_name", help="Where it has several.")] = None,
    image_column: Annotated[str | None, typer.Option("--image_column", help="Default: the only one with images.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split to measure on; default: test or validation.")] = None,
    train_split: Annotated[str, typer.Option("--train_split", help="Split to fit PCA on.")] = "train",
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="reconstruction,likelihood,compression,generation; default: what applies of the first three."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Importance samples an image for the likelihood.")] = 100,
    max_images: Annotated[int | None, typer.Option("--max_images", min=1, help="Measure the first images only.")] = None,
    binarize: Annotated[bool, typer.Option("--binarize", help="One fixed 0/1 draw of each pixel.")] = False,
    sampler: SamplerKind = None,
    label_column: Annotated[str | None, typer.Option("--label_column", help="Fit the sampler to each of these classes.")] = None,
    feature_network: Network = None,
):
    """Measure a model on a dataset, beside PCA; in a local folder, write metrics.json, pictures and the card."""
    options = {k: v for k, v in locals().items() if k not in ("model", "dataset_name")}
    from hf_ae.evaluation import evaluate as measuring

    metrics = measuring.evaluate(model, dataset_name, **options)
    titles = {"reconstruction": "model", "pca": f"PCA, {metrics.get('code_size')}", "denoising_input": "damaged", "denoising": "restored"}
    for row, title in titles.items():
        if row in metrics:
            print(f"{title:10}" + "".join(f"  {name} {value:.5g}" for name, value in metrics[row].items()))
    if "likelihood" in metrics:
        b = metrics["likelihood"]
        print(f"{'likelihood':10}  elbo {b['elbo']:.3f}  bound {b['log_likelihood_bound']:.3f} nats ({b['model']}, {b['samples']} samples)")
    for quality, values in metrics.get("compression", {}).get("qualities", {}).items():
        print(f"quality {quality:4}  {values['bytes']:.0f} bytes  {values['bpp']:.4f} bits per pixel  PSNR {values['psnr']:.2f} dB")
    if "generation" in metrics:
        for title, row in (("generated", metrics["generation"]), ("real", metrics["generation"]["floor"])):
            print(f"{title:10}" + "".join(f"  {name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))
    if Path(model).is_dir():
        print(f"Written to {model}: metrics.json, the card README.md and its pictures")


@app.command("fit-sampler")
def fit_sampler(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    dataset_name: Annotated[str, typer.Option("--dataset_name", help="Hub id of a dataset, or a folder.")],
    kind: Annotated[str, typer.Option("--kind", help="prior, gaussian or mixture.")] = "mixture",
    components: Annotated[int, typer.Option("--components", min=1, help="Gaussians of a mixture, for each class.")] = 10,
    train_split: Annotated[str, typer.Option("--train_split", help="Split whose codes to fit.")] = "train",
    dataset_config_name: Annotated[str | None, typer.Option("--dataset_config_name", help="Where it has several.")] = None,
    image_column: Annotated[str | None, typer.Option("--image_column", help="Default: the only one with images.")] = None,
    label_column: Annotated[str | None, typer.Option("--label_column", help="Fit each of these classes by itself.")] = None,
    max_images: Annotated[int | None, typer.Option("--max_images", min=1, help="Fit the first images only.")] = None,
    binarize: Annotated[bool, typer.Option("--binarize", help="One fixed 0/1 draw of each pixel.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the mixture's start.")] = 0,
):
    """Fit a distribution to the codes of training images, to draw new images from, and save it beside the model."""
    from hf_ae.latents import sampling

    options = {k: v for k, v in locals().items() if k not in ("model", "sampling")}
    print(f"Written: {sampling.fit_sampler(model, **options)}")


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of models.")],
    dataset_name: Annotated[str, typer.Option("--dataset_name", help="Hub id of a dataset, or a folder.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Table to write, .md or .json; a picture .png beside it.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split to measure on; default: test or validation.")] = None,
    max_images: Annotated[int | None, typer.Option("--max_images", min=1, help="Measure the first images only.")] = None,
    sampler: SamplerKind = None,
    feature_network: Network = None,
):
    """Measure several models on one dataset: one table of reconstruction, sample quality, mode coverage, speed and parameters."""
    from hf_ae.evaluation import compare as comparing

    if output is not None:
        comparing.check_output(output)
    rows, picture = comparing.compare(
        models, dataset_name, split=split, max_images=max_images, sampler=sampler, feature_network=feature_network
    )
    print(comparing.to_markdown(rows))
    if output is not None:
        print("Written: " + ", ".join(map(str, comparing.write(rows, picture, output))))


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write: originals above, reconstructions below.")] = Path(
        "reconstruction.png"
    ),
):
    """Send image files through a model and draw them beside what comes back."""
    from hf_ae.evaluation.evaluate import load_model
    from hf_ae.evaluation.evaluate import reconstruct as run
    from hf_ae.metrics import reconstruction_metrics
    from hf_ae.plots import labelled_rows

    loaded, processor = load_model(model)
    low, high = loaded.config.pixel_range
    pixels = (processor([str(p) for p in images], return_tensors="pt").pixel_values - low) / (high - low)
    rebuilt = run(loaded, pixels)
    check_writable(output)
    labelled_rows({"original": pixels, "reconstruction": rebuilt}, output, cell=112)
    for path, x, r in zip(images, pixels, rebuilt):
        print(f"{path}: PSNR {reconstruction_metrics(x[None], r[None])['psnr']:.2f} dB")
    print(f"Written: {output}")


@app.command()
def compress(
    image: ImageFile,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write, *.hfae.")],
    quality: Quality = None,
    palette: Palette = False,
):
    """Compress an image with an autoencoder into a small file that names the model."""
    from hf_ae.codec import compression as codec

    check_folder_of(output)
    data = codec.compress(codec.load_codec_model(model), image, quality, palette, model_id=model)
    output.write_bytes(data)
    print(f"Written: {output}, {len(data):,} bytes")


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(help="A file that hf-ae compress wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write.")],
    model: Annotated[str | None, typer.Option("--model", help="Folder or Hub id; default: the model that the file names.")] = None,
):
    """Turn a compressed file back into a picture."""
    from hf_ae.codec import compression as codec

    check_writable(output)
    if not file.is_file():
        raise ValueError(f"The file {file} does not exist.")
    picture = codec.decompress(file.read_bytes(), None if model is None else codec.load_codec_model(model))
    picture.save(output)
    print(f"Written: {output}, {picture.width}×{picture.height} pixels")


@app.command()
def roundtrip(
    image: ImageFile,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Panel: original, latents, decoded, and other formats.")] = Path(
        "roundtrip.png"
    ),
    quality: Quality = None,
    palette: Palette = False,
):
    """Compress and decompress an image, and draw what comes back beside JPEG, WebP and AVIF of the same size."""
    from hf_ae.codec.compression import load_codec_model
    from hf_ae.pipelines import VAERoundTripPipeline

    check_writable(output)
    result = VAERoundTripPipeline(load_codec_model(model))(image, quality, palette)
    for name, found in {model: result.decoded, **result.others}.items():
        print(f"{name}: {found.size:,} bytes, {found.bpp:.3f} bits per pixel, PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.3f}")
    result.panel.save(output)
    print(f"Written: {output}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Picture to write; several are put on one sheet.")] = Path("picture.png"),
    model: Annotated[str | None, typer.Option("--model", help="Folder or Hub id of a pipeline; default: emoji-text-to-image.")] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="What not to draw.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps; default: the pipeline's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale", help="How closely to follow the prompt; 1: freely.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same picture.")] = 0,
    images: Annotated[int, typer.Option("--images", min=1, help="Pictures to draw, with seeds from --seed on.")] = 1,
    height: Annotated[int | None, typer.Option("--height", help="In pixels; default: the size of training.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="In pixels.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Start from this picture.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="How far to leave --image: 0 not at all, 1 entirely.")] = 0.8,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="A diffusers scheduler class; default: the pipeline's.")] = None,
    steps_grid: Annotated[str | None, typer.Option("--steps-grid", help="Draw a sheet, one row for each: 10,15,20,30,40.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Columns of the sheet.")] = 4,
):
    """Draw a picture from a prompt with a text-to-image pipeline."""
    from hf_ae.diffusion import drawing

    check_writable(output)
    options: dict = dict(negative_prompt=negative_prompt, guidance_scale=guidance_scale, height=height, width=width)
    if image is not None:
        options |= dict(image=drawing.open_picture(image), strength=strength)
    pipe = drawing.load_pipeline(model, scheduler)
    if steps_grid is not None:
        drawing.steps_sheet(pipe, prompt, drawing.numbers(steps_grid), seed, seeds, options).save(output)
    else:
        drawing.pictures(pipe, prompt, steps, seed, images, options).save(output)
    print(f"Written: {output}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, a pipeline or a Space, exactly what the repository will hold.")],
    repo: Annotated[str, typer.Option("--repo", help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private when it is created.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check only; upload nothing.")] = False,
):
    """Check the folder of a model, a pipeline or a Space (weights load, card complete, no stray files) and upload it in one commit."""
    from hf_ae.hub.push import check_folder, push_folder

    files = check_folder(folder)
    address = push_folder(folder, repo, private, dry_run)
    print("\n".join(f"  {name}" for name in files))
    print(f"{'Checked, nothing uploaded' if dry_run else 'Uploaded'}: {len(files)} files, {address}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures.")] = Path("demo"),
    seconds: Annotated[int, typer.Option("--seconds", min=5, help="How long to train, about.")] = 60,
):
    """Show the product on what the checkout carries: prompts to pictures, a round trip, and a model trained, reloaded, evaluated."""
    from hf_ae.demo import run

    run(output, seconds)


def check_writable(path: Path):
    """Raise ValueError unless `path` can be written as a picture."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} has no ending of a picture, such as .png.")
    check_folder_of(path)


def check_folder_of(path: Path):
    """Raise ValueError unless a file can be written at `path`."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist.")


if __name__ == "__main__":
    main()
