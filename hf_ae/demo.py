"""`make demo`: the product on what the checkout carries, without a network."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from .data import image_column, open_dataset, pick_split, read_rows
from .errors import require
from .evaluation.evaluate import evaluate
from .latents import decode, random_latents, reconstruct
from .loading import CHECKOUT, DEFAULT_PIPELINE, load_model, load_pipeline
from .metrics import reconstruction_metrics
from .models.image_processing import to_mode
from .pipelines import VAERoundTripPipeline
from .plots import image_grid, labelled_rows

SAMPLE = CHECKOUT / "tests" / "data" / "fashion_mnist_sample"
EMOJI = CHECKOUT / "tests" / "data" / "noto_emoji_sample"
PROMPTS = [
    "a slice of pizza", "red heart", "rocket", "birthday cake", "cat face", "sunflower", "crying face", "rainbow",
    "guitar", "kitten", "automobile", "halloween", "cold", "in love", "something sweet", "party",
]  # fmt: skip


def run(output: Path, seconds: int) -> None:
    """Draw, compress and reconstruct with shipped checkpoints, then train, reload and evaluate a new model. Prints
    where each figure is."""
    require(SAMPLE.is_dir(), "hf-ae demo runs in a checkout of the project, which carries the sample it needs.")
    require(not output.is_file(), f"{output} is a file: write -o with a folder.")
    output.mkdir(parents=True, exist_ok=True)
    print("1. Images from prompts, by emoji-text-to-image")
    draw_prompts(output / "prompts.png")

    print("\n2. An image through a file and back, by emoji-compressive")
    compress(output / "file_and_back.png")

    print("\n3. Shipped models on 500 held-out images of the bundled sample, the first 12 drawn")
    round_trip(output / "shipped_models.png")

    print(
        f"\n4. A variational autoencoder, trained for about {seconds} s on the bundled 2,000 images of Fashion-MNIST"
    )
    trained = output / "my-vae"
    started = time.perf_counter()
    train(trained, steps=seconds * 25)
    print(f"   trained in {time.perf_counter() - started:.0f} s, start-up included")

    print("\n5. Reloaded from its folder and measured on 500 held-out images")
    metrics = evaluate(trained, str(SAMPLE), tasks="reconstruction")
    ours, pca = metrics["reconstruction"]["psnr"], metrics["pca"]["psnr"]
    print(f"   PSNR {ours:.2f} dB; PCA with as many components: {pca:.2f} dB")
    model = load_model(trained)[0]
    image_grid(decode(model, random_latents(model, 40, seed=1)), 10, output / "new_images.png", cell=56)
    print("\nFigures:")
    names = ("prompts.png", "file_and_back.png", "shipped_models.png", "my-vae/reconstructions.png", "new_images.png")
    for path in (output / name for name in names):
        if path.is_file():
            print(f"   {path}")
    print(f"The trained model, ready for  hf-ae push {trained} --repo you/my-vae :\n   {trained}")


def draw_prompts(path: Path) -> None:
    """One image for each prompt, by the shipped text-to-image pipeline."""
    if not (DEFAULT_PIPELINE / "model_index.json").is_file():
        return
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    pixels = pipe(PROMPTS, seed=[0] * len(PROMPTS), output_type="pt").images
    print(f"   {len(PROMPTS)} images in {time.perf_counter() - started:.1f} s")
    image_grid(pixels, 8, path, cell=128, gap=12, captions=PROMPTS)


def compress(path: Path) -> None:
    """A bundled emoji beside what comes back from its compressed file, and the same as JPEG, WebP and AVIF."""
    folder = CHECKOUT / "model_cards" / "emoji-compressive"
    if not (folder / "model.safetensors").is_file():
        return
    rows = next(iter(open_dataset(str(EMOJI)).values()))
    image = to_mode(rows[0][image_column(rows)], 3).resize((64, 64))
    result = VAERoundTripPipeline.from_pretrained(folder)(image, quality=0.5)
    found = f"{result.decoded.size} bytes, PSNR {result.decoded.psnr:.1f} dB"
    print(f"   {found}; in other formats, at the nearest size that they can have:")
    for name, other in result.others.items():
        print(f"   {name} {other.size} bytes, PSNR {other.psnr:.1f} dB")
    result.panel.save(path)


def round_trip(path: Path) -> None:
    """One row for each shipped Fashion-MNIST model, of the same held-out images."""
    folders = sorted(p for p in (CHECKOUT / "model_cards").glob("fashion-*") if (p / "model.safetensors").is_file())
    rows = pick_split(open_dataset(str(SAMPLE)), "test")
    drawn: dict[str, torch.Tensor] = {}
    for folder in folders:
        model, processor = load_model(folder)
        images = read_rows(rows, processor).float() / 255
        rebuilt = reconstruct(model, images)
        drawn.setdefault("original", images[:12])
        drawn[folder.name.removeprefix("fashion-")] = rebuilt[:12]
        psnr = reconstruction_metrics(images, rebuilt)["psnr"]
        print(f"   {folder.name:20} PSNR {psnr:.2f} dB on {len(images)} images")
    if drawn:
        labelled_rows(drawn, path)


def train(folder: Path, steps: int) -> None:
    """The training script as a user starts it."""
    launch = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no -m hf_ae.train"
    model = "--model_type hf_ae_vae --config_overrides network=conv,hidden_sizes=[32,64],latent_dim=16,kl_weight=0.2"
    how = f"--max_train_steps {steps} --train_batch_size 64 --learning_rate 0.002 --validation_epochs 0 --random_flip"
    where = ["--dataset_name", str(SAMPLE), "--output_dir", str(folder), "--overwrite_output_dir"]
    flags = [*launch.split(), *model.split(), *how.split(), *where]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    require(subprocess.run(command).returncode == 0, "The training did not finish: see the lines above.")
