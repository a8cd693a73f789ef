"""How far single latents stand for single factors: six objectives on the generated sprites, three seeds each.

    hf-ae sprites -o sprites
    python benchmarks/disentanglement.py sprites [--seeds 3] [--only vae,capacity] [--max_train_steps N]

Prints a table of models × scores, the median and range over the seeds. What is trained stays in
outputs/disentanglement, and is not trained again: several processes can share the work by `--only`. The recipe is that
of sprites-beta-vae but for the objective; of each family the weight is one that its paper uses. Scores are of 10,000
images that the models have not seen.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hf_ae import train
from hf_ae.data import open_dataset, read_rows
from hf_ae.evaluation.disentanglement import all_scores
from hf_ae.latents import encode_images
from hf_ae.loading import load_model

RECIPE = Path(__file__).parent.parent / "model_cards" / "sprites-beta-vae" / "recipe.yaml"
MODELS = {
    "AE": ("hf_ae_autoencoder", ""), "VAE": ("hf_ae_vae", ""), "β-VAE, 4": ("hf_ae_beta_vae", "objective=beta,beta=4"),
    "capacity, 8 nats": ("hf_ae_beta_vae", ""),
    "total correlation, 6": ("hf_ae_beta_vae", "objective=total_correlation,beta=6"),
    "FactorVAE, 10": ("hf_ae_beta_vae", "objective=factor,beta=10"),
}  # fmt: skip
"""Title -> model_type, and what differs from the recipe."""
FACTORS = ("shape", "scale", "orientation", "x", "y")
PLACE = Path("outputs") / "disentanglement"


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="the folder that hf-ae sprites wrote")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="beginnings of the titles of the models to train, joined by commas")
    parser.add_argument("--max_train_steps", type=int, help="default: those of the recipe")
    args = parser.parse_args()
    wanted = (args.only or "").split(",")
    titles = [title for title in MODELS if any(title.lower().startswith(name.lower()) for name in wanted)]
    rows = open_dataset(args.dataset_name)["train"]
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for title in titles:
            folder = PLACE / f"{title.split(',')[0].replace(' ', '-')}-{seed}"
            scores = measured(folder, title, seed, rows, args)
            found.setdefault(title, []).append(scores)
            print(title, seed, {name: round(value, 3) for name, value in scores.items()}, flush=True)
    names = list(next(iter(found.values()))[0])
    print(f"\n| median of {args.seeds} seeds (range) | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for title, runs in found.items():
        values = np.array([[run[name] for name in names] for run in runs])
        cells = zip(np.median(values, 0), values.min(0), values.max(0))
        print(f"| {title} | " + " | ".join(f"{m:.3f} ({low:.2f} to {high:.2f})" for m, low, high in cells) + " |")


def measured(folder: Path, title: str, seed: int, rows: Any, args: argparse.Namespace) -> dict[str, float]:
    """The scores of a model, which is trained where it is not there yet."""
    if (folder / "scores.json").is_file():
        return json.loads((folder / "scores.json").read_text())
    recipe = yaml.safe_load(RECIPE.read_text())
    kind, differs = MODELS[title]
    overrides = recipe["config_overrides"]
    if not title.startswith("capacity"):
        overrides = re.sub(r",(objective|beta|capacity|capacity_steps)=[^,]*", "", overrides) + f",{differs}"
    command = [str(RECIPE), "--model_type", kind, "--config_overrides", overrides.strip(","), "--seed", str(seed)]
    command += ["--dataset_name", args.dataset_name, "--output_dir", str(folder)]
    command += ["--max_train_steps", str(args.max_train_steps)] if args.max_train_steps else []
    train.main([*command, "--resume_from_checkpoint", "latest"])
    model, processor = load_model(folder)
    unseen = rows.select(range(len(rows) - 10_000, len(rows)))
    images = read_rows(unseen, processor).float() / 255
    factors = np.stack([np.asarray(unseen[name]) for name in FACTORS], 1)
    scores = all_scores(encode_images(model, images).numpy(), factors, seed)
    (folder / "scores.json").write_text(json.dumps(scores))
    return scores


if __name__ == "__main__":
    main()
