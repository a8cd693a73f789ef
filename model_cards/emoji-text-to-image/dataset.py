"""Prepare the emoji dataset: `python dataset.py NOTO_EMOJI OUTPUT`.

NOTO_EMOJI is a dataset with the columns image, text (the name), keywords, emoji and skin_tone. OUTPUT becomes a
dataset of the emoji without a skin tone, with the splits `train` and `test` (every tenth: an autoencoder for them does
not train on these), where a tenth of all keywords is moved into `held_out_keywords`: no caption of a training holds
them.
"""

import random
import sys
from pathlib import Path
from typing import Any

from hf_ae.data import open_dataset


def main(source: str, output: Path) -> None:
    emoji = open_dataset(source)["train"].filter(lambda tone: not tone, input_columns="skin_tone")
    names = {name.lower() for name in emoji["text"]} | {words[0] for words in emoji["keywords"] if words}
    keywords = sorted({word for words in emoji["keywords"] for word in words[1:]} - names)
    held_out = set(random.Random(0).sample(keywords, len(keywords) // 10))

    def split_keywords(row: dict[str, Any]) -> dict[str, list[str]]:
        others = [word for word in row["keywords"] if word.lower() != row["text"].lower()]
        return {
            "keywords": [w for w in others if w not in held_out],
            "held_out_keywords": [w for w in others if w in held_out],
        }

    emoji = emoji.map(split_keywords).remove_columns(["codepoints", "skin_tone"])
    tenth = set(range(0, len(emoji), 10))
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in {"train": sorted(set(range(len(emoji))) - tenth), "test": sorted(tenth)}.items():
        emoji.select(rows).to_parquet(output / f"{split}.parquet")
    counts = f"{len(emoji) - len(tenth)} emoji to train on, {len(tenth)} held out"
    print(f"{output}: {counts}; {len(held_out)} keywords held out.")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
