"""Samples and reconstructions of hf_ae's and of pythae's models: same network, images, epochs and feature network.

    python benchmarks/generation.py [--pythae PYTHON] [--epochs 4] [--images 60000] [--samples 5000] [--seeds 1]
        [-o FILE]

Fashion-MNIST; encoder and decoder of two 4×4 convolutions a side (32 and 64 channels, SiLU), latents of 16 values, or
for VQ-VAEs 7×7 indices of 512 vectors of 64 (VQ-VAE-2: 32, and 4×4 more above them); batch 128; for VAE-GANs the same
discriminator. Weights of the loss are each library's defaults. pythae trains with Adam at 1e-3 (its default rate is
1e-4), hf_ae with `--optimizer muon` at 3e-3 and, but for codebooks, `--use_ema`. Priors over codes (pythae's PixelCNN,
hf_ae's GPT-2 with classes) train for as many epochs again. FID, precision, recall and coverage against the test split,
in features of the network that hf_ae ships. PYTHON is the interpreter of an environment with pythae 0.1.2 (`pip
install torch==2.13.0 pythae`), which draws into files. Results are added to the file of -o.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CHANNELS, LATENT, CODEBOOK, BATCH, RATE = (32, 64), 16, 512, 128, 1e-3
DATASET = "zalando-datasets/fashion_mnist"
MUON_RATE, PRIOR_RATE, PRIOR = 0.003, 0.002, "prior_layers=4,prior_hidden_size=192,prior_heads=3"
CONV = "network=conv,hidden_sizes=[32,64]"
OURS = {
    "VAE": ("hf_ae_vae", f"{CONV},latent_dim={LATENT}"),
    "VAE-GAN": ("hf_ae_vaegan", f"{CONV},latent_dim={LATENT},discriminator_channels=[32,64,128]"),
    "VQ-VAE": ("hf_ae_vqvae", f"{CONV},latent_channels=64,codebook_size={CODEBOOK}"),
    "VQ-VAE-2": ("hf_ae_vqvae2", f"{CONV},latent_channels=64,codebook_size={CODEBOOK}"),
}
SAMPLERS = {"VAE": ("prior", "mixture"), "VAE-GAN": ("prior",), "VQ-VAE": (None,), "VQ-VAE-2": (None,)}
THEIRS = {"VAE": ("prior", "mixture"), "VAE-GAN": ("prior",), "VQ-VAE": ("pixelcnn",)}


def load_images(split: str, limit: int) -> Tensor:
    """uint8 (images, 1, 28, 28)."""
    from hf_ae import AutoencoderConfig, AutoencoderImageProcessor
    from hf_ae.data import open_dataset, read_rows

    dataset = open_dataset(DATASET)[split]
    processor = AutoencoderImageProcessor.from_config(AutoencoderConfig())
    return read_rows(dataset, processor, limit=limit)


# hf_ae


def ours(
    kind: str, args: argparse.Namespace, train_pixels: Tensor, test: Tensor, network: nn.Module, seed: int = 0
) -> dict[str, dict]:
    """Rows of the table for one of our models."""
    from hf_ae.evaluation.generation import measure_generation, model_generator
    from hf_ae.latents import reconstruct
    from hf_ae.latents.sampling import encode_all, fit
    from hf_ae.loading import load_model
    from hf_ae.train import ImageTrainingArguments, train
    from hf_ae.train_prior import PriorArguments
    from hf_ae.train_prior import train as train_prior

    model_type, overrides = OURS[kind]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        common = dict(dataset_name=DATASET, max_train_samples=args.images, num_train_epochs=args.epochs)
        common |= dict(train_batch_size=BATCH, optimizer="muon", validation_epochs=0, seed=seed)
        own = dict(model_type=model_type, config_overrides=overrides, learning_rate=MUON_RATE)
        own["use_ema"] = not kind.startswith("VQ")  # codebooks are moving averages already
        train(ImageTrainingArguments(**common, **own, output_dir=folder))
        if kind == "VQ-VAE-2":
            own = dict(model=folder, prior_overrides=PRIOR, learning_rate=PRIOR_RATE, use_ema=True)
            train_prior(PriorArguments(**common, **own, output_dir=f"{folder}/prior"))
        seconds = time.perf_counter() - started
        model, _ = load_model(f"{folder}/prior" if kind == "VQ-VAE-2" else folder)
    error = (reconstruct(model, test) - test).square().mean().item()
    about = {"parameters": count(model.encoder, model.decoder), "train_s": seconds, "reconstruction_mse": error}
    rows = {}
    for sampler in SAMPLERS[kind]:
        fitted = fit(encode_all(model, train_pixels), sampler) if sampler == "mixture" else None
        if sampler is None and not model.can_generate_images:
            found = {"note": "reconstruction alone: VQ-VAE-2 has the prior"}
        else:
            found, _ = measure_generation(model_generator(model, fitted), test, train_pixels.float() / 255, network)
        rows[f"hf_ae {kind}" + (f", {sampler}" if sampler else "")] = {**about, **found}
    return rows


def count(*modules: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


# pythae, in its own process and environment: this part imports nothing of hf_ae


def encoder_layers(values: int | None) -> list[nn.Module]:
    a, b = CHANNELS
    down = [nn.Conv2d(1, a, 4, 2, 1), nn.SiLU(), nn.Conv2d(a, b, 4, 2, 1), nn.SiLU()]
    return [*down, nn.Conv2d(b, 64, 1)] if values is None else [*down, nn.Flatten(), nn.Linear(b * 49, values)]


def decoder_layers(vector: bool) -> list[nn.Module]:
    a, b = CHANNELS
    start = [nn.Linear(LATENT, b * 49), nn.Unflatten(1, (b, 7, 7))] if vector else [nn.Conv2d(64, b, 1)]
    up = [nn.ConvTranspose2d(b, a, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(a, 1, 4, 2, 1)]
    return [*start, nn.SiLU(), *up, nn.Sigmoid()]


def discriminator_layers() -> list[nn.Module]:
    pairs = pairwise((1, 32, 64, 128))
    norms = (nn.Identity(), nn.GroupNorm(8, 64), nn.GroupNorm(8, 128))
    return [nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), norm, nn.LeakyReLU(0.2)) for (a, b), norm in zip(pairs, norms)]


def pythae_model(kind: str) -> Any:
    """A model of pythae with the networks above."""
    from pythae.models import VAE, VAEGAN, VQVAE, VAEConfig, VAEGANConfig, VQVAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder

    discrete = kind == "VQ-VAE"

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*encoder_layers(None if discrete else 2 * LATENT))

        def forward(self, x: Tensor) -> ModelOutput:
            output = self.layers(x)
            if discrete:
                return ModelOutput(embedding=output)
            mean, logvar = output.chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*decoder_layers(not discrete))

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    class Discriminator(BaseDiscriminator):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(discriminator_layers()), nn.Conv2d(128, 1, 3, padding=1)
            self.depth = len(self.layers)

        def forward(self, x: Tensor, output_layer_levels: list[int] | None = None) -> ModelOutput:
            for layer in self.layers:
                x = layer(x)
            output = ModelOutput(embedding=self.head(x).mean((1, 2, 3)).sigmoid()[:, None])
            for level in output_layer_levels or []:
                output[f"embedding_layer_{level}"] = x
            return output

    common = dict(input_dim=(1, 28, 28), latent_dim=LATENT)
    if kind == "VAE":
        return VAE(VAEConfig(**common), encoder=Encoder(), decoder=Decoder())
    if kind == "VAE-GAN":
        config = VAEGANConfig(**common, reconstruction_layer=3)
        return VAEGAN(config, encoder=Encoder(), decoder=Decoder(), discriminator=Discriminator())
    return VQVAE(VQVAEConfig(**common, num_embeddings=CODEBOOK), encoder=Encoder(), decoder=Decoder())


def run_pythae(kind: str, folder: Path, epochs: int, samples: int, seed: int) -> None:
    """Train, reconstruct and draw: `folder`/*.npy hold uint8 images, about.json the rest."""
    from pythae.models import VAEGAN
    from pythae.pipelines import TrainingPipeline
    from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig, NormalSampler, PixelCNNSampler
    from pythae.trainers import BaseTrainerConfig, CoupledOptimizerAdversarialTrainerConfig

    torch.manual_seed(seed)
    train, test = (torch.from_numpy(np.load(folder / f"{name}.npy")).float() / 255 for name in ("train", "test"))
    model, common = pythae_model(kind), dict(output_dir=str(folder / "run"), num_epochs=epochs, no_cuda=True)
    common |= dict(per_device_train_batch_size=BATCH, learning_rate=RATE, seed=seed)
    kinds = {True: CoupledOptimizerAdversarialTrainerConfig, False: BaseTrainerConfig}
    started = time.perf_counter()
    TrainingPipeline(model=model, training_config=kinds[isinstance(model, VAEGAN)](**common))(train_data=train)
    about = {"train_s": time.perf_counter() - started, "parameters": count(model.encoder, model.decoder)}
    model.eval()
    with torch.no_grad():
        rebuilt = [rebuild(model, x, kind) for x in test.split(500)]
    np.save(folder / "rebuilt.npy", (torch.cat(rebuilt) * 255).round().byte().numpy())
    for sampler in THEIRS[kind]:
        if sampler == "prior":
            drawer = NormalSampler(model)
        elif sampler == "mixture":
            drawer = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=10))
            drawer.fit(train)
        else:
            drawer = PixelCNNSampler(model)
            drawer.fit(train, training_config=BaseTrainerConfig(**{**common, "output_dir": str(folder / "prior")}))
        started = time.perf_counter()
        with torch.no_grad():
            drawn = drawer.sample(samples, batch_size=500)
        about[f"{sampler}_s"] = (time.perf_counter() - started) / samples
        np.save(folder / f"{sampler}.npy", (drawn.clamp(0, 1) * 255).round().byte().numpy())
    (folder / "about.json").write_text(json.dumps(about))


def rebuild(model: Any, x: Tensor, kind: str) -> Tensor:
    """A reconstruction from latents without noise, as hf_ae's in evaluation."""
    return model({"data": x}).recon_x if kind == "VQ-VAE" else model.decoder(model.encoder(x).embedding).reconstruction


def theirs(
    kind: str, args: argparse.Namespace, train_pixels: Tensor, test: Tensor, network: nn.Module, seed: int = 0
) -> dict[str, dict]:
    """Rows of the table for one of pythae's models."""
    from hf_ae.evaluation.generation import ImageGenerator, measure_generation

    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), {}
        np.save(folder / "train.npy", train_pixels.numpy())
        np.save(folder / "test.npy", (test * 255).round().byte().numpy())
        flags = {"run": kind, "folder": name, "epochs": args.epochs, "samples": len(test), "seed": seed}
        command = [args.pythae, __file__, *(f"--{flag}={value}" for flag, value in flags.items())]
        environment = {**os.environ, "PYTHONPATH": args.pythae_path or os.environ.get("PYTHONPATH", "")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            return {f"pythae {kind}": {"note": (done.stderr.strip().splitlines() or ["failed"])[-1]}}
        read = {path.stem: torch.from_numpy(np.load(path)).float() / 255 for path in folder.glob("*.npy")}
        about = json.loads((folder / "about.json").read_text())
    about["reconstruction_mse"] = (read["rebuilt"] - test).square().mean().item()
    for sampler in THEIRS[kind]:
        generator = ImageGenerator(lambda n, labels=None, images=read[sampler]: images[:n], sampler)
        found, _ = measure_generation(generator, test, train_pixels.float() / 255, network)
        found["seconds_per_image"] = about[f"{sampler}_s"]
        common = {key: about[key] for key in ("train_s", "parameters", "reconstruction_mse")}
        rows[f"pythae {kind}, {sampler}"] = common | found
    return rows


COLUMNS = (
    "fid", "kid", "precision", "recall", "coverage", "reconstruction_mse", "seconds_per_image", "train_s",
    "parameters",
)  # fmt: skip


def print_table(rows: dict[str, dict]) -> None:
    """As Markdown, with the spread of FID and its floor below."""
    print("| | " + " | ".join(COLUMNS) + " |\n| --- |" + " ---: |" * len(COLUMNS))
    for name, row in rows.items():
        cells = [f"{row[c]:.4g}" if isinstance(row.get(c), float) else f"{row.get(c, '')}" for c in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |" + (f" {row['note']}" if "note" in row else ""))
    for name, row in rows.items():
        found = [f"{fid:.3g}" for fid in row.get("fid_of_seeds", [])]
        if len(found) > 1:
            print(f"{name}, FID of {len(found)} trainings: {', '.join(found)}")
    floors = [row["floor"]["fid"] for row in rows.values() if "floor" in row]
    if floors:
        print(f"Real training images against the test split: FID {floors[0]:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythae", help="interpreter of an environment with pythae")
    parser.add_argument("--pythae-path", help="folder that holds pythae, put before the interpreter's own")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=1, help="train each model so often: how far does FID spread?")
    parser.add_argument("--kinds", nargs="*", default=list(OURS), help="VAE, VAE-GAN, VQ-VAE, VQ-VAE-2")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/generation.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return run_pythae(args.run, Path(args.folder), args.epochs, args.samples, args.seed)
    from hf_ae.evaluation.feature_network import load_feature_network

    network = load_feature_network()
    train_pixels, test = load_images("train", args.images), load_images("test", args.samples).float() / 255
    rows = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for kind in args.kinds:
        found: dict[str, dict] = {}
        for seed in range(args.seeds):
            trained = ours(kind, args, train_pixels, test, network, seed)
            if args.pythae and kind in THEIRS:
                trained |= theirs(kind, args, train_pixels, test, network, seed)
            for name, row in trained.items():
                first = found.setdefault(name, row)
                if "fid" in row:
                    first.setdefault("fid_of_seeds", []).append(row["fid"])
                    print(f"seed {seed}: {name}, FID {row['fid']:.2f}", flush=True)
        for name, row in found.items():
            rows[name] = {**row, "epochs": args.epochs, "images": args.images}
            print(name, json.dumps(row), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
