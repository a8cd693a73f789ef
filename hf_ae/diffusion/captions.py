"""What a text-to-image training draws its batches from: images as cached latents, and their captions."""

from __future__ import annotations

import hashlib
import json
import os
import random
from copy import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data import ImagesInMemory, each_batch, read_texts, to_pixel_values
from ..errors import require
from ..models.image_processing import AutoencoderImageProcessor

SHARD = 512
"""Images in one file of the latent cache."""


@torch.no_grad()
def cached_latents(
    vae: Any, rows: Any, column: str, processor: AutoencoderImageProcessor, folder: Path, accelerator: Accelerator
) -> Tensor:
    """Means of the posteriors of all images: (images, channels, height, width), unscaled, float32.

    They are encoded once: `folder` gets a safetensors file for every 512 images, under a name that the weights of the
    vae, the dataset and the size fix. A run that was cut off goes on, and each of several processes encodes its part.
    """
    key = hashlib.sha256(f"{weights_hash(vae)} {rows._fingerprint} {column} {processor.size}".encode()).hexdigest()[
        :16
    ]
    folder = folder / key
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), SHARD)
    paths = [folder / f"latents-{start:09d}.safetensors" for start in starts]
    mine = range(accelerator.process_index, len(paths), accelerator.num_processes)
    missing = [i for i in mine if not paths[i].exists()]
    with tqdm(missing, desc="encoding", disable=not accelerator.is_main_process) as bar:
        for i in bar:
            part = rows.select(range(starts[i], min(starts[i] + SHARD, len(rows))))
            pixels = ImagesInMemory.load(part, column, processor).pixels
            values = (to_pixel_values(x, vae.device, processor.pixel_range) for x in each_batch(pixels, 32))
            latents = [vae.encode(x.to(vae.dtype)).latent_dist.mode().float().cpu() for x in values]
            save_whole({"latents": torch.cat(latents).contiguous()}, paths[i])
    accelerator.wait_for_everyone()
    return torch.cat([load_file(path)["latents"] for path in paths])


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that appears under its name when it is complete; nothing is left of one that is not."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def weights_hash(model: Any) -> str:
    """A fingerprint of all weights of a model."""
    digest = hashlib.sha256(json.dumps({k: list(v.shape) for k, v in model.state_dict().items()}).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Captions:
    """The captions of each image, from one or several columns: a string, or a list of strings, a row; or classes, by
    name.

    `texts` are all different captions; the empty one, for guidance, has index 0. `bare` images have none. Raises
    ValueError where no image has one.
    """

    def __init__(self, rows: Any, columns: list[str]) -> None:
        index = {"": 0}
        per_column = [read_texts(rows, column) for column in columns]
        self.choices: list[list[list[int]]] = []
        for row in zip(*per_column):
            lists = [[cell] if isinstance(cell, str) else list(cell or []) for cell in row]
            cleaned = [[text.strip() for text in texts if text and text.strip()] for texts in lists]
            self.choices.append([[index.setdefault(t, len(index)) for t in texts] for texts in cleaned if texts])
        self.texts = list(index)
        self.bare = sum(not choice for choice in self.choices)
        require(self.bare < len(self.choices), f"No image has a caption in {', '.join(columns)}.")

    def tell_of_bare(self) -> None:
        """Print what images without a caption are for in the training of a denoiser."""
        if self.bare:
            said = f"{self.bare} of {len(self.choices)} images have no caption"
            print(f"{said}: they teach the model to draw without a prompt.")

    def first_column(self) -> Captions:
        """The same images with the captions of their first column alone."""
        first = copy(self)
        choices = [columns[:1] for columns in self.choices]
        kept = sorted({0, *(i for row in choices for column in row for i in column)})
        new_index = {old: new for new, old in enumerate(kept)}
        first.choices = [[[new_index[i] for i in column] for column in row] for row in choices]
        first.texts = [self.texts[i] for i in kept]
        return first

    def __len__(self) -> int:
        return len(self.choices)

    def draw(self, rows: Tensor, dropout: float, generator: random.Random) -> Tensor:
        """Index of one caption for each image of `rows`: from a column drawn first; 0 with probability `dropout`."""
        drawn = []
        for row in rows.tolist():
            lists = self.choices[row]
            dropped = not lists or generator.random() < dropout
            drawn.append(0 if dropped else generator.choice(generator.choice(lists)))
        return torch.tensor(drawn)


def split_list(text: str) -> list[str]:
    """`"a, b"` -> ["a", "b"]."""
    return [name.strip() for name in text.split(",")]
