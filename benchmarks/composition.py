"""How well a pipeline composes: names and styles never seen together, two things, counts and colours.

`python benchmarks/text_to_image_styles.py EMOJI_STYLES` prints these figures; see there.
"""

import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judges import BATCH, Features, StyleClassifier, pixels_of
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from hf_ae.data import open_dataset
from hf_ae.loading import DEFAULT_PIPELINE

sys.path.insert(0, str(DEFAULT_PIPELINE))
import scenes

WINDOWS = {"left": (slice(16, 48), slice(0, 32)), "right": (slice(16, 48), slice(32, 64))}
WINDOWS |= {"above": (slice(0, 32), slice(16, 48)), "below": (slice(32, 64), slice(16, 48))}
"""(rows, columns) of a 64×64 image where a thing of a pair may be."""
PLACES = {"left of": ("left", "right"), "above": ("above", "below")}
NUMBERS = {1: "a", 2: "two", 3: "three"}


class World:
    """The real images of all styles, without skin tones; and the judges."""

    def __init__(self, emoji_styles: str, held_out: str) -> None:
        splits = open_dataset(emoji_styles)
        self.train = splits["train"].filter(lambda tone: not tone, input_columns="skin_tone")
        self.test = splits["test"]
        self.features, self.held_out = Features(), json.loads(Path(held_out).read_text())
        self.names = [name.lower() for part in (self.train, self.test) for name in part["text"]]
        self.styles = [style for part in (self.train, self.test) for style in part["style"]]
        self.count = len(self.train)

    @cached_property
    def images(self) -> Tensor:
        """(n, 3, 64, 64) in 0…1, the train split first."""
        return torch.cat([pixels_of(self.train), pixels_of(self.test)])

    @cached_property
    def real(self) -> Tensor:
        """Features of all images."""
        return self.features(self.images)

    @cached_property
    def classifier(self) -> StyleClassifier:
        return StyleClassifier.load()

    @cached_property
    def cutouts(self) -> scenes.Scenes:
        """What draws real scenes of the train split."""
        listed = {kind: {tuple(pair) for pair in pairs} for kind, pairs in self.held_out.items()}
        return scenes.Scenes(self.train, listed, seed=7)

    def small(self, style: str) -> tuple[list[str], Tensor]:
        """The common things of a style, as small as in scenes, and their features."""
        names = [name for name in scenes.COMMON if name in self.cutouts.by_style[style]]
        images = pixels_of_list([self.cutouts.cutout(self.cutouts.by_style[style][name]) for name in names], 30)
        return names, self.features(F.pad(images, (1, 1, 1, 1), value=1.0))


def pixels_of_list(images: list[Any], size: int) -> Tensor:
    """RGBA images -> (n, 3, size, size) in 0…1, on white."""
    white = [scenes.on_white(image).resize((size, size)) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in white])).movedim(-1, 1) / 255


def draw(pipe: Any, prompts: list[str], seed: int = 0, **options: Any) -> Tensor:
    """One image for each prompt, with seeds from `seed` on: (n, 3, height, width) in 0…1."""
    pipe.set_progress_bar_config(disable=True)
    parts = [
        pipe(
            prompts[i : i + BATCH],
            seed=list(range(seed + i, seed + min(i + BATCH, len(prompts)))),
            output_type="pt",
            **options,
        )
        for i in range(0, len(prompts), BATCH)
    ]
    return torch.cat([part.images.float() for part in parts])


def named(
    world: World, images: Tensor, names: list[str], rows: Iterable[int] | None = None
) -> tuple[list[bool], list[bool]]:
    """Whether the nearest real image, and one of the nearest five, has the name."""
    ranked = (world.features(images) @ world.real.T).topk(5).indices.tolist()
    found = [[world.names[i] for i in row] for row in ranked]
    return [row[0] == name for row, name in zip(found, names)], [name in row for row, name in zip(found, names)]


def judged(world: World, images: Tensor, names: list[str], styles: list[str]) -> dict[str, float]:
    """Fractions of images whose name, whose style and both of these are recognised."""
    first, five = named(world, images, names)
    styled = [a == b for a, b in zip(world.classifier.styles(images), styles)]
    both = [a and b for a, b in zip(first, styled)]
    figures = {"top1": first, "top5": five, "style": styled, "both": both}
    return {name: statistics.mean(values) for name, values in figures.items()}


def styles(pipe: Any, world: World) -> dict:
    """Names in a style they were never seen in: the test split."""
    names, asked = [name.lower() for name in world.test["text"]], list(world.test["style"])
    drawn = draw(pipe, [f"{name}, {style}" for name, style in zip(names, asked)])
    real = world.images[world.count :]
    right = [a == b for a, b in zip(world.classifier.styles(real), asked)]
    figures = judged(world, drawn, names, asked)
    rebuilt = torch.cat([pipe.vae(part * 2 - 1).reconstruction for part in real.split(BATCH)]) / 2 + 0.5
    figures |= {"style_of_real": statistics.mean(right), "style_share": figures["style"] / statistics.mean(right)}
    return figures | {"reconstructions": judged(world, rebuilt, names, asked), "pairs": len(names)}


def seen(pipe: Any, world: World, count: int = 300, **options: Any) -> dict:
    """Names in a style they were seen in."""
    rows = random.Random(0).sample(range(world.count), count)
    names, asked = [world.names[i] for i in rows], [world.styles[i] for i in rows]
    prompts = [f"{name}, {style}" for name, style in zip(names, asked)]
    return judged(world, draw(pipe, prompts, **options), names, asked)


def unseen_pairs(world: World, count: int) -> list[tuple[str, str, str, str]]:
    """(thing, thing, style, place) of scenes whose things were never seen together."""
    chance, asked = random.Random(0), []
    while len(asked) < count:
        a, b = chance.sample(chance.choice(world.held_out["pairs"]), 2)
        style, place = chance.choice(list(world.cutouts.by_style)), chance.choice(list(PLACES))
        if {a, b} <= set(world.cutouts.by_style[style]):
            asked.append((a, b, style, place))
    return asked


def prompt_of(a: str, b: str, style: str, place: str) -> str:
    return f"{scenes.with_article(a)} {place} {scenes.with_article(b)}, {style}"


def pairs(pipe: Any, world: World, count: int = 300) -> dict:
    """Two things that were never seen together, beside or above each other; and real scenes of such, as a ceiling."""
    asked = unseen_pairs(world, count)
    prompts = [prompt_of(*one) for one in asked]
    made = [real_pair(world, *one) for one in asked]
    real = torch.from_numpy(np.stack([np.asarray(image) for image in made])).movedim(-1, 1) / 255
    return {**placed(world, draw(pipe, prompts), asked), "real": placed(world, real, asked), "prompts": count}


def real_pair(world: World, a: str, b: str, style: str, place: str) -> Any:
    """A scene of two real emoji, as those of the training."""
    cutouts = [world.cutouts.cutout(world.cutouts.by_style[style][name]) for name in (a, b)]
    return world.cutouts.placed(cutouts, scenes.PLACES["beside" if place == "left of" else "above"], 30)


def placed(world: World, images: Tensor, asked: list[tuple[str, str, str, str]]) -> dict[str, float]:
    """Fractions of scenes where both things are recognised in windows of their own, and of these those where the
    windows are the asked ones. A thing is recognised if it is the nearest of all common things of its style."""
    crops = torch.stack([images[:, :, rows, columns] for rows, columns in WINDOWS.values()], 1)
    features = world.features(crops.flatten(0, 1)).view(len(images), len(WINDOWS), -1)
    small = {style: world.small(style) for style in {one[2] for one in asked}}
    both, right = [], []
    for row, (a, b, style, place) in zip(features, asked):
        names, known = small[style]
        seen_in = {
            name: {window for window, i in zip(WINDOWS, (row @ known.T).argmax(1).tolist()) if names[i] == name}
            for name in (a, b)
        }
        both.append(any(x != y for x in seen_in[a] for y in seen_in[b]))
        first, second = PLACES[place]
        right.append(first in seen_in[a] and second in seen_in[b])
    return {"both": statistics.mean(both), "place": sum(right) / max(1, sum(both))}


def counts(pipe: Any, world: World, each: int = 60) -> dict:
    """One, two and three of things that are drawn in one piece: do as many pieces lie on the white?"""
    chance, asked = random.Random(0), []
    while len(asked) < 3 * each:
        number, style = len(asked) % 3 + 1, chance.choice(list(world.cutouts.by_style))
        name = chance.choice([name for name in scenes.COMMON if name in world.cutouts.by_style[style]])
        if pieces(pixels_of_list([world.cutouts.cutout(world.cutouts.by_style[style][name])], 64)[0]) == 1:
            asked.append((number, name, style))
    prompts = [
        f"{NUMBERS[number]} {scenes.plural(name)}, {style}" if number > 1 else f"{name}, {style}"
        for number, name, style in asked
    ]
    hits = [pieces(image) == number for image, (number, _, _) in zip(draw(pipe, prompts), asked)]
    return {NUMBERS[n]: statistics.mean(hits[n - 1 :: 3]) for n in NUMBERS} | {"all": statistics.mean(hits)}


def pieces(image: Tensor) -> int:
    """Pieces of at least a hundredth of an image that white separates."""
    inked = ndimage.binary_dilation((image.min(0).values < 0.85).numpy())
    labels, number = ndimage.label(inked)
    return sum(bool((labels == i).sum() >= 41) for i in range(1, number + 1))


def colors(pipe: Any, world: World) -> dict:
    """Pairs of a thing and a colour that were never seen: is the nearest of all common things in all colours it?"""
    asked = [tuple(pair) for pair in world.held_out["colors"] if pair[0] in world.cutouts.by_style["shaded"]]
    prompts = [f"{scenes.with_article(color)} {name.removeprefix('red ')}, shaded" for name, color in asked]
    known = [name for name in scenes.COMMON if name in world.cutouts.by_style["shaded"]]
    cut = {name: world.cutouts.cutout(world.cutouts.by_style["shaded"][name]) for name in known}
    made = [(name, color, scenes.recolored(cut[name], color)) for name in known for color in scenes.COLORS]
    references = world.features(pixels_of_list([image for *_, image in made], 64))
    found = [made[i][:2] for i in (world.features(draw(pipe, prompts)) @ references.T).argmax(1).tolist()]
    return {
        "both": statistics.mean(a == b for a, b in zip(found, asked)),
        "thing": statistics.mean(a[0] == b[0] for a, b in zip(found, asked)),
        "color": statistics.mean(a[1] == b[1] for a, b in zip(found, asked)),
        "pairs": len(asked),
    }


def seeds(pipe: Any, world: World, number: int = 30, each: int = 10) -> dict:
    """Ten seeds of a prompt without a style: styles that are seen, and how far the images are apart beside those of
    different names."""
    names = random.Random(0).sample(scenes.COMMON, number)
    result = {}
    for kind, make in {"plain": scenes.with_article, "styled": "{}, shaded".format}.items():
        drawn = draw(pipe, [make(name) for name in names for _ in range(each)])
        features = world.features(drawn).view(number, each, -1)
        within = 1 - (features @ features.transpose(1, 2)).sum((1, 2)).sub(each).div(each * (each - 1)).mean().item()
        first = features[:, 0] @ features[:, 0].T
        apart = 1 - (first.sum().item() - number) / (number * (number - 1))
        seen_styles = world.classifier.styles(drawn)
        different = [len(set(seen_styles[i : i + each])) for i in range(0, len(seen_styles), each)]
        figures = {"within": within, "apart": apart, "ratio": within / apart, "styles": statistics.mean(different)}
        result |= {f"{kind}_{name}": value for name, value in figures.items()}
    return result


def copies(pipe: Any, world: World) -> dict:
    """Distance (1 - cosine) to the nearest training image: of drawn images of unseen pairs, beside the real ones of
    these."""
    prompts = [f"{name.lower()}, {style}" for name, style in zip(world.test["text"], world.test["style"])]
    training, real = world.real[: world.count], world.real[world.count :]
    figures = {}
    for name, features in {"drawn": world.features(draw(pipe, prompts)), "real": real}.items():
        nearest = 1 - (features @ training.T).max(1).values
        figures |= {f"{name}_median": nearest.median().item(), f"{name}_least": nearest.min().item()}
    return figures


PARTS: dict[str, Callable[[Any, World], dict]] = {
    f.__name__: f for f in (styles, seen, pairs, counts, colors, seeds, copies)
}  # fmt: skip
