"""`make demo`: the product on what the checkout carries, without a network."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SAMPLE = CHECKOUT / "tests" / "data" / "fashion_mnist_sample"
EMOJI = CHECKOUT / "tests" / "data" / "noto_emoji_sample"


def run(output: Path, seconds: int):
    """Evaluate shipped checkpoints on bundled images, then train, reload and evaluate a new model. Prints each picture."""
    if not SAMPLE.is_dir():
        raise ValueError("hf-ae demo runs in a checkout of the project, which carries the sample it needs.")
    import torch

    from .evaluation.evaluate import evaluate, load_model

    output.mkdir(parents=True, exist_ok=True)
    print("1. Pictures from prompts, by emoji-text-to-image")
    draw_prompts(output / "prompts.png")

    print("\n2. A picture through a file and back, by emoji-compressive")
    compress(output / "file_and_back.png")

    print("\n3. Shipped models on 12 held-out images of the bundled sample")
    round_trip(output / "shipped_models.png")

    print(f"\n4. A variational autoencoder, trained for about {seconds} s on the bundled 2,000 images of Fashion-MNIST")
    trained = output / "my-vae"
    started = time.perf_counter()
    train(trained, steps=seconds * 25)
    print(f"   trained in {time.perf_counter() - started:.0f} s, start-up included")

    print("\n5. Reloaded from its folder and measured on 500 held-out images")
    metrics = evaluate(trained, str(SAMPLE), tasks="reconstruction")
    print(f"   PSNR {metrics['reconstruction']['psnr']:.2f} dB; PCA with as many components: {metrics['pca']['psnr']:.2f} dB")
    model = load_model(trained)[0]
    with torch.no_grad():
        samples = model.decode(torch.randn(40, *model.config.code_shape, generator=torch.Generator().manual_seed(1))).sample
    from .plots import image_grid

    image_grid(samples, 10, output / "new_images.png", cell=56)
    print("\nPictures:")
    for path in (
        output / "prompts.png",
        output / "file_and_back.png",
        output / "shipped_models.png",
        trained / "reconstructions.png",
        output / "new_images.png",
    ):
        if path.is_file():
            print(f"   {path}")
    print(f"The trained model, ready for  hf-ae push {trained} --repo you/my-vae :\n   {trained}")


PROMPTS = ["a slice of pizza", "red heart", "rocket", "birthday cake", "cat face", "sunflower", "crying face", "rainbow", "guitar",
           "kitten", "automobile", "halloween", "cold", "in love", "something sweet", "party"]  # fmt: skip


def draw_prompts(path: Path):
    """One picture for each prompt, by the shipped text-to-image pipeline."""
    from .diffusion.drawing import DEFAULT, load_pipeline
    from .plots import image_grid

    if not (DEFAULT / "model_index.json").is_file():
        return
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    pixels = pipe(PROMPTS, seed=[0] * len(PROMPTS), output_type="pt").images
    print(f"   {len(PROMPTS)} pictures in {time.perf_counter() - started:.1f} s")
    image_grid(pixels, 8, path, cell=128, gap=12, captions=PROMPTS)


def compress(path: Path):
    """A bundled emoji beside what comes back from its compressed file, and the same as JPEG, WebP and AVIF."""
    from .data.images import image_column, open_dataset
    from .models.image_processing import to_mode
    from .pipelines.vae_roundtrip import VAERoundTripPipeline

    folder = CHECKOUT / "model_cards" / "emoji-compressive"
    if not (folder / "model.safetensors").is_file():
        return
    rows = next(iter(open_dataset(str(EMOJI)).values()))
    picture = to_mode(rows[0][image_column(rows)], 3).resize((64, 64))
    result = VAERoundTripPipeline.from_pretrained(folder)(picture, quality=0.5)
    print(f"   {result.decoded.size} bytes, PSNR {result.decoded.psnr:.1f} dB; in other formats, at the nearest size that they can have:")
    for name, other in result.others.items():
        print(f"   {name} {other.size} bytes, PSNR {other.psnr:.1f} dB")
    result.panel.save(path)


def round_trip(path: Path):
    """One row for each shipped Fashion-MNIST model, of the same held-out images."""
    from .data.images import ImagesInMemory, image_column, open_dataset, pick_split
    from .evaluation.evaluate import load_model, reconstruct
    from .metrics import reconstruction_metrics
    from .plots import labelled_rows

    folders = sorted(p for p in (CHECKOUT / "model_cards").glob("fashion-*") if (p / "model.safetensors").is_file())
    if not folders:
        return
    dataset = pick_split(open_dataset(str(SAMPLE)), "test")
    processor = load_model(folders[0])[1]
    images = ImagesInMemory.load(dataset, image_column(dataset), processor).pixels.float() / 255
    rows = {"original": images[:12]}
    for folder in folders:
        model, _ = load_model(folder)
        rebuilt = reconstruct(model, images)
        name = folder.name.removeprefix("fashion-")
        rows[name] = rebuilt[:12]
        print(f"   {folder.name:20} PSNR {reconstruction_metrics(images, rebuilt)['psnr']:.2f} dB on {len(images)} images")
    labelled_rows(rows, path)


def train(folder: Path, steps: int):
    """The training script as a user starts it."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "-m", "hf_ae.train",
        "--model_type", "hf_ae_vae", "--config_overrides", "network=conv,hidden_sizes=[32,64],latent_dim=16,kl_weight=0.2",
        "--dataset_name", str(SAMPLE), "--output_dir", str(folder), "--overwrite_output_dir", "--max_train_steps", str(steps),
        "--train_batch_size", "64", "--learning_rate", "0.002", "--validation_epochs", "0", "--random_flip",
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise ValueError("The training did not finish: see the lines above.")
