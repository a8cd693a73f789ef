"""Prepare the datasets of things in styles: `python scenes.py EMOJI_STYLES EMOJI OUTPUT [--scenes 30000] [--seed 0]`.

EMOJI_STYLES is a dataset with the columns image, text (the name), keywords, style and skin_tone; EMOJI is made by
dataset.py, and its `held_out_keywords` are no captions here either. OUTPUT/things becomes a dataset of the emoji
without a skin tone, for the text encoder, and OUTPUT/scenes one of 64×64 images with the columns `styled` and `plain`,
captions that name a style and such that do not, and `wrong`, captions that are nearly right. It holds each emoji
`--copies` times, and scenes composed of one or two of them: pairs beside or above each other, two or three of one
thing, small things, and recoloured ones. A tenth of the pairs of COMMON things, and a tenth of the pairs of such a
thing and a colour, are in no scene and in no caption: `held_out.json` lists them.
"""

import argparse
import colorsys
import itertools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hf_ae.data import open_dataset

SIDE = 64
NAMES = (
    "red apple,banana,pizza,hamburger,birthday cake,doughnut,cookie,ice cream,hot beverage,beer mug,"
    "wine glass,carrot,broccoli,mushroom,cherries,strawberry,watermelon,lemon,pineapple,grapes,egg,"
    "cheese wedge,bread,pancakes,cat,dog,cat face,dog face,mouse face,rabbit face,fox,bear,panda,"
    "lion,tiger face,cow face,pig face,frog,monkey face,elephant,giraffe,horse,unicorn,ewe,chicken,"
    "penguin,owl,duck,eagle,butterfly,honeybee,lady beetle,snail,turtle,snake,octopus,crab,fish,"
    "whale,dolphin,shark,house,castle,tent,automobile,bus,fire engine,bicycle,locomotive,airplane,"
    "helicopter,rocket,sailboat,ship,anchor,sun,crescent moon,star,cloud,rainbow,snowflake,fire,"
    "droplet,umbrella,evergreen tree,palm tree,cactus,sunflower,rose,tulip,four leaf clover,maple leaf,"
    "red heart,crown,gem stone,ring,top hat,glasses,necktie,t-shirt,jeans,dress,running shoe,backpack,"
    "handbag,key,hammer,scissors,pencil,open book,books,envelope,wrapped gift,balloon,teddy bear,"
    "soccer ball,basketball,trophy,guitar,trumpet,drum,violin,mantelpiece clock,alarm clock,"
    "hourglass not done,light bulb,candle,bell,camera,television,laptop,mobile phone,robot,ghost,alien,"
    "skull,snowman,jack-o-lantern,christmas tree,globe showing europe-africa,mountain,volcano,"
    "deciduous tree"
)
COMMON = NAMES.split(",")
COLORS: dict[str, tuple[float, float, float, float]] = {
    "red": (0, 0.85, 0, 1), "orange": (28, 0.9, 0.1, 0.9), "yellow": (50, 0.85, 0.2, 0.8),
    "green": (125, 0.75, 0, 0.8), "blue": (215, 0.8, 0.05, 0.9), "purple": (275, 0.65, 0, 0.9),
    "pink": (335, 0.4, 0.35, 0.65), "brown": (25, 0.65, 0, 0.6), "black": (0, 0, 0, 0.25), "white": (0, 0, 0.7, 0.3),
}  # fmt: skip
"""Name -> hue in degrees, saturation, and offset and slope of the new brightness."""
COLORFUL = ("shaded", "flat", "blob", "soft 3d", "cartoon", "classic", "retro")
PLACES = {"beside": ((16, 32), (48, 32)), "above": ((32, 16), (32, 48))}
COUNTS = {
    "two": [PLACES["beside"], PLACES["above"]],
    "three": [((32, 18), (17, 46), (47, 46)), ((12, 32), (32, 32), (52, 32))],
}
KINDS = {"pair": 5, "count": 2, "color": 2, "small": 1}
"""Kind of scene -> its share."""
COLUMNS = ("styled", "plain", "wrong")
Captions = tuple[list[str], list[str], list[str]]
"""Those with a style, those without, and wrong ones."""


class Scenes:
    """Draws scenes of a dataset's emoji, and what to call them."""

    def __init__(self, rows: Any, held_out: dict[str, Any], seed: int) -> None:
        self.random, self.held_out, self.errors = random.Random(seed), held_out, random.Random(seed + 1)
        self.rows = rows
        self.by_style: dict[str, dict[str, int]] = {}
        columns = (rows["text"], rows["style"], rows["skin_tone"])
        for index, (name, style, tone) in enumerate(zip(*columns)):
            if not tone:
                self.by_style.setdefault(style, {})[name.lower()] = index
        self.cutouts: dict[int, Image.Image] = {}

    def draw(self, kind: str) -> tuple[Image.Image, Captions]:
        """A scene and its captions."""
        style = self.random.choice([s for s in self.by_style if kind != "color" or s in COLORFUL])
        names = list(self.by_style[style])
        things = [name for name in COMMON if name in self.by_style[style]]
        # half of the scenes hold things of all kinds, so that no thing is a stranger to them
        name = self.random.choice(things if self.random.random() < 0.5 else names)
        makers: dict[str, Callable[..., Any]] = {
            "pair": self.pair, "count": self.count, "color": self.color, "small": self.small
        }  # fmt: skip
        image, right, wrong = makers[kind](style, name, things)
        return image, (with_style(right, style), right, self.wrong_captions(right, wrong, style))

    def wrong_captions(self, right: list[str], wrong: list[str], style: str) -> list[str]:
        """Wrong phrases, half of them with the right style, and the right ones with another style."""
        styles = [other for other in self.by_style if other != style]
        others = [f"{phrase}, {self.errors.choice(styles)}" for phrase in right[:2]]
        return [f"{text}, {style}" if self.errors.random() < 0.5 else text for text in wrong] + others

    def names_of(self, row: dict[str, Any]) -> Captions:
        """Captions of an emoji."""
        name, style = row["text"].lower(), row["style"]
        others = [word.lower() for word in row["keywords"]][:6]
        styled = [f"{name}, {style}", f"{name}, {style}", f"{style} {name}", f"a {style} {name}"]
        styled += [f"{word}, {style}" for word in others]
        strangers = self.errors.sample(list(self.by_style[style]), 3)
        bare = name.split(":")[0]  # without a skin tone
        wrong = [stranger for stranger in strangers if stranger.split(":")[0] != bare and stranger not in others]
        return styled, [name, name, f"a {name}", *others], self.wrong_captions([name, name], wrong, style)

    def pair(self, style: str, name: str, things: list[str]) -> tuple[Image.Image, list[str], list[str]]:
        allowed = [b for b in things if b != name and not is_held_out(self.held_out["pairs"], name, b)]
        pair = [name, self.random.choice(allowed)]
        self.random.shuffle(pair)
        place = self.random.choice(list(PLACES))
        cutouts = [self.cutout(self.by_style[style][name]) for name in pair]
        first, second = map(with_article, pair)
        beside = [f"{first} left of {second}", f"{second} right of {first}", f"{first} and {second}"]
        beside += [f"{second} and {first}", f"{first} next to {second}", f"{first} with {second}"]
        above = [f"{first} above {second}", f"{second} below {first}", f"{first} on top of {second}"]
        above += [f"{first} over {second}", f"{second} under {first}"]
        swapped = [f"{second} left of {first}", f"{second} above {first}", f"{first} below {second}"]
        right, others = (beside, above) if place == "beside" else (above, beside)
        kept = self.errors.choice(pair)
        strangers = [t for t in things if t not in pair and not is_held_out(self.held_out["pairs"], kept, t)]
        stranger = f"{with_article(kept)} and {with_article(self.errors.choice(strangers))}"
        return self.placed(cutouts, PLACES[place], 30), right, [*swapped, *others[:2], stranger, stranger]

    def count(self, style: str, name: str, things: list[str]) -> tuple[Image.Image, list[str], list[str]]:
        number = self.random.choice(list(COUNTS))
        places = self.random.choice(COUNTS[number])
        cutout = self.cutout(self.by_style[style][name])
        many = self.placed([cutout] * len(places), places, {2: 30, 3: 24}[len(places)])
        fewer, more = {"two": ("three", 3), "three": ("two", 2)}[number]
        stranger = self.errors.choice([thing for thing in things if thing != name])
        wrong = [f"{fewer} {plural(name)}", f"{more} {plural(name)}", f"{number} {plural(stranger)}"]
        return many, [f"{number} {plural(name)}", f"{len(places)} {plural(name)}"], wrong

    def color(self, style: str, name: str, things: list[str]) -> tuple[Image.Image, list[str], list[str]]:
        color = self.random.choice([c for c in COLORS if not is_held_out(self.held_out["colors"], name, c)])
        image = on_white(recolored(self.cutout(self.by_style[style][name]), color))
        bare = name.removeprefix("red ")
        others = [c for c in COLORS if c != color and not is_held_out(self.held_out["colors"], name, c)]
        wrong = [f"{with_article(other)} {bare}" for other in self.errors.sample(others, 2)]
        return image, [f"{with_article(color)} {bare}", f"{color} {bare}", f"{with_article(bare)} in {color}"], wrong

    def small(self, style: str, name: str, things: list[str]) -> tuple[Image.Image, list[str], list[str]]:
        size = self.random.randint(24, 34)
        place = tuple(self.random.randint(22, 42) for _ in "xy")
        image = self.placed([self.cutout(self.by_style[style][name])], (place,), size)
        stranger = self.errors.choice([thing for thing in things if thing != name])
        return image, [f"a small {name}", f"small {name}", f"a tiny {name}"], [f"a small {stranger}"]

    def placed(self, cutouts: list[Image.Image], places: Any, size: int) -> Image.Image:
        """Cut-outs around the places, in pixels, each a little moved and of about that size."""
        scene = Image.new("RGBA", (SIDE, SIDE), "white")
        for cutout, (x, y) in zip(cutouts, places):
            side = size + self.random.randint(-2, 2)
            shrunk = cutout.resize((side, side), Image.Resampling.LANCZOS)
            corner = (x + self.random.randint(-2, 2) - side // 2, y + self.random.randint(-2, 2) - side // 2)
            scene.alpha_composite(shrunk, (max(0, corner[0]), max(0, corner[1])))
        return scene.convert("RGB")

    def cutout(self, index: int) -> Image.Image:
        """An emoji, with its transparency."""
        if index not in self.cutouts:
            self.cutouts[index] = self.rows[index]["image"].convert("RGBA")
        return self.cutouts[index]


def recolored(image: Image.Image, color: str) -> Image.Image:
    """An RGBA image whose colours have the hue of a name, and their own brightness."""
    hue, saturation, offset, slope = COLORS[color]
    pixels = np.asarray(image).astype(np.float32) / 255
    bright = pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)
    bright = offset + slope * (0.25 + 0.75 * bright) * (bright > 0.12) + slope * 0.5 * bright * (bright <= 0.12)
    full = np.array(colorsys.hsv_to_rgb(hue / 360, saturation, 1.0), np.float32)
    pixels = np.concatenate([bright[..., None] * full, pixels[..., 3:]], -1)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8), "RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA image on white, of SIDE × SIDE pixels."""
    back = Image.new("RGBA", image.size, "white")
    back.alpha_composite(image)
    return back.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def with_article(name: str) -> str:
    """`apple` -> `an apple`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """`cherry` -> `cherries`, by the common rules."""
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def with_style(phrases: list[str], style: str) -> list[str]:
    """The phrases with a style."""
    return [*(f"{phrase}, {style}" for phrase in phrases), f"{style} {phrases[0]}"]


def without_held_out(rows: Any, emoji: str) -> Any:
    """The rows, with keywords that differ from the name and that `emoji` does not hold out."""
    splits = open_dataset(emoji)
    held_out = {word for part in ("train", "test") for words in splits[part]["held_out_keywords"] for word in words}

    def keep(row: dict[str, Any]) -> dict[str, list[str]]:
        return {"keywords": [w for w in row["keywords"] if w not in held_out and w.lower() != row["text"].lower()]}

    return rows.map(keep)


def choose_held_out(seed: int = 0) -> dict[str, list[list[str]]]:
    """A tenth of the pairs of things, and of those of a thing and a colour."""
    chance = random.Random(seed)
    pairs = [list(pair) for pair in itertools.combinations(COMMON, 2)]
    colors = [[thing, color] for thing in COMMON for color in COLORS]
    return {"pairs": chance.sample(pairs, len(pairs) // 10), "colors": chance.sample(colors, len(colors) // 10)}


def is_held_out(pairs: Any, a: str, b: str) -> bool:
    return (a, b) in pairs or (b, a) in pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji_styles")
    parser.add_argument("emoji")
    parser.add_argument("output", type=Path)
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows, listed = without_held_out(open_dataset(args.emoji_styles)["train"], args.emoji), choose_held_out()
    scenes = Scenes(rows, {kind: {tuple(pair) for pair in pairs} for kind, pairs in listed.items()}, args.seed)
    kinds = scenes.random.choices(list(KINDS), list(KINDS.values()), k=args.scenes)

    def examples() -> Any:
        for row in rows:
            example = dict(zip(COLUMNS, scenes.names_of(row)), image=on_white(row["image"].convert("RGBA")))
            for _ in range(1 if row["skin_tone"] else args.copies):
                yield example
        for kind in kinds:
            image, captions = scenes.draw(kind)
            yield {"image": image, **dict(zip(COLUMNS, captions))}

    texts = datasets.List(datasets.Value("string"))
    features = datasets.Features({**dict.fromkeys(COLUMNS, texts), "image": datasets.Image()})
    for name in ("scenes", "things"):
        (args.output / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output) as cache:
        found = datasets.Dataset.from_generator(examples, features=features, cache_dir=cache)
        found.to_parquet(args.output / "scenes" / "train.parquet")
    things = rows.filter(lambda tone: not tone, input_columns="skin_tone").select_columns(
        ["image", "text", "keywords"]
    )
    things.to_parquet(args.output / "things" / "train.parquet")
    (args.output / "held_out.json").write_text(json.dumps(listed, indent=0))
    print(f"{args.output}: {len(things):,} things; {len(found):,} images, {args.scenes:,} of them scenes")


if __name__ == "__main__":
    main()
