"""What a text-to-image training draws its batches from: pictures as cached latents, and their captions as text states."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..data.images import ImagesInMemory, batch_for, read_texts, row_batches, to_pixel_values
from ..models.image_processing import AutoencoderImageProcessor

SHARD = 512
"""Pictures in one file of the latent cache."""
KEEP_STATES = 2**31
"""Text states of so many bytes are computed once and kept; more are computed in each step."""


def picture_processor(vae, image_size: int | None = None) -> AutoencoderImageProcessor:
    """The image processor that fits an autoencoder, one of ours or diffusers' AutoencoderKL, for pictures of `image_size`."""
    ours = hasattr(vae.config, "image_hw")
    height, width = vae.config.image_hw if ours else [vae.config.sample_size] * 2
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    if image_size is not None:
        if image_size < scale or image_size % scale:
            raise ValueError(
                f"image_size={image_size} does not divide by {scale}, the pixels of a latent position: write a multiple of it."
            )
        height = width = image_size
    channels, pixel_range = (vae.config.num_channels, vae.config.pixel_range) if ours else (vae.config.in_channels, [-1.0, 1.0])
    fields: dict = {"num_channels": channels, "pixel_range": list(pixel_range)}
    return AutoencoderImageProcessor(size={"height": height, "width": width}, **fields)


@torch.no_grad()
def cached_latents(vae, dataset, column: str, processor, folder: Path, accelerator) -> torch.Tensor:
    """Means of the posteriors of all pictures: (pictures, channels, height, width), unscaled, float32.

    They are encoded once: `folder` gets a safetensors file for every 512 pictures, under a name that the weights of the
    vae, the dataset and the size fix. A run that was cut off goes on, and each of several processes encodes its share.
    """
    key = hashlib.sha256(f"{weights_hash(vae)} {dataset._fingerprint} {column} {processor.size}".encode()).hexdigest()[:16]
    folder = folder / key
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(dataset), SHARD)
    paths = [folder / f"latents-{start:09d}.safetensors" for start in starts]
    mine = range(accelerator.process_index, len(paths), accelerator.num_processes)
    for number in tqdm([n for n in mine if not paths[n].exists()], desc="encoding", disable=not accelerator.is_main_process):
        rows = dataset.select(range(starts[number], min(starts[number] + SHARD, len(dataset))))
        pixels = ImagesInMemory.load(rows, column, processor).pixels
        parts = pixels.split(batch_for(pixels[0].numel(), 32))
        values = (to_pixel_values(part, vae.device, processor.pixel_range) for part in parts)
        latents = torch.cat([vae.encode(x.to(vae.dtype)).latent_dist.mode().float().cpu() for x in values]).contiguous()
        partial = paths[number].with_suffix(f".{os.getpid()}")
        save_file({"latents": latents}, partial)
        os.replace(partial, paths[number])
    accelerator.wait_for_everyone()
    return torch.cat([load_file(path)["latents"] for path in paths])


def weights_hash(model) -> str:
    """A fingerprint of all weights of a model."""
    digest = hashlib.sha256(json.dumps({k: list(v.shape) for k, v in model.state_dict().items()}).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Captions:
    """The captions of each picture, from one or several columns: a string, or a list of strings, a row; or classes, by their names.

    `texts` are all different captions; the empty one, for guidance, is number 0.
    """

    def __init__(self, dataset, columns: list[str]):
        numbers = {"": 0}
        per_column = [read_texts(dataset, column) for column in columns]
        self.choices: list[list[list[int]]] = []
        for row in zip(*per_column):
            lists = [[cell] if isinstance(cell, str) else list(cell or []) for cell in row]
            cleaned = [[text.strip() for text in texts if text and text.strip()] for texts in lists]
            self.choices.append([[numbers.setdefault(t, len(numbers)) for t in texts] for texts in cleaned if texts])
        self.texts = list(numbers)
        bare = sum(not choice for choice in self.choices)
        if bare == len(self.choices):
            raise ValueError(f"No picture has a caption in {', '.join(columns)}.")
        if bare:
            print(f"{bare} of {len(self.choices)} pictures have no caption: they teach the model what to draw without a prompt.")

    def first_column(self) -> Captions:
        """The same pictures with the captions of their first column alone."""
        first = copy(self)
        first.choices = [columns[:1] for columns in self.choices]
        kept = {number: i for i, number in enumerate(sorted({0, *(n for row in first.choices for column in row for n in column)}))}
        first.choices = [[[kept[n] for n in column] for column in row] for row in first.choices]
        first.texts = [self.texts[number] for number in kept]
        return first

    def __len__(self) -> int:
        return len(self.choices)

    def draw(self, rows: torch.Tensor, dropout: float, dice: random.Random) -> torch.Tensor:
        """Numbers of one caption for each picture of `rows`: from a column drawn first; 0 with probability `dropout`."""
        drawn = []
        for row in rows.tolist():
            lists = self.choices[row]
            dropped = not lists or dice.random() < dropout
            drawn.append(0 if dropped else dice.choice(dice.choice(lists)))
        return torch.tensor(drawn)

    def batches(self, batch_size: int, epoch: int, **where) -> Iterator[torch.Tensor]:
        """Numbers of pictures, as `ImagesInMemory.batches` orders them."""
        return row_batches(len(self), batch_size, epoch, **where)


def tokenize(tokenizer, texts: list[str], device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, padded to the tokenizer's model_max_length: (texts, length)."""
    tokens = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def text_states(text_encoder, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(texts, length, width): the last hidden states, as pipelines give them to the denoiser (CLIP reads its padding too)."""
    masked = getattr(text_encoder.config, "use_attention_mask", text_encoder.config.model_type not in ("clip", "clip_text_model"))
    return text_encoder(input_ids, attention_mask=attention_mask if masked else None)[0]


@torch.no_grad()
def all_text_states(text_encoder, tokens: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """States of every caption, float16 where the encoder's are float32; None where they would take too much memory."""
    length, count = tokens["input_ids"].shape[1], len(tokens["input_ids"])
    if 2 * count * length * text_encoder.config.hidden_size > KEEP_STATES:
        return None
    ids, mask = tokens["input_ids"].split(256), tokens["attention_mask"].split(256)
    return torch.cat([text_states(text_encoder, i, m).to(torch.float16) for i, m in zip(ids, mask)])
