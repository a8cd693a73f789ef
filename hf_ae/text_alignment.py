"""Text encoders for a text-to-image training: a new small one, or one that learns which picture a caption belongs to."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .arguments import TrainingArguments
from .captions import Captions, text_states, tokenize
from .training import make_optimizers, make_schedulers

TEMPERATURE = 0.05
BATCH = 128
CONTRAST_WEIGHT = 0.3
VOCABULARY = 8000
"""Most words of a new tokenizer; others are spelled."""


def text_encoder_from_scratch(texts: list[str], overrides: dict, max_length: int, seed: int):
    """(tokenizer, text encoder): the commonest words and all characters of `texts`, and a small BERT with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    common = sorted(words, key=lambda word: (-words[word], word))[:VOCABULARY]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *common]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=max_length)
    fields = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024) | overrides
    torch.manual_seed(seed)
    text_encoder = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=max_length, **fields))
    text_encoder.pooler.requires_grad_(False)  # unused, but what loads a BertModel expects it
    text_encoder.config.use_attention_mask = True
    return tokenizer, text_encoder


def mean_states(text_encoder, tokens: dict) -> torch.Tensor:
    """One vector a text: the mean of its tokens' states, (texts, width)."""
    states, mask = text_states(text_encoder, **tokens), tokens["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


class Alignment(nn.Module):
    """A text encoder, a vector for every picture, and a linear map from a token's state to the latents of one cell."""

    def __init__(self, text_encoder, pictures: torch.Tensor, cell_size: int):
        super().__init__()
        self.text_encoder, self.pictures = text_encoder, nn.Embedding.from_pretrained(pictures, freeze=False)
        self.to_cell = nn.Linear(pictures.shape[1], cell_size)

    def forward(self, tokens: dict, targets: torch.Tensor, cells: torch.Tensor):
        """targets: (texts, pictures), rows sum to 1. cells: (texts, count, values), of variance 1.

        contrast: cross-entropy of a caption's pictures under the cosine similarities of texts and pictures, as in CLIP
        (Radford et al. 2021). unexplained: the share of the latents that the states do not tell, where the state of token
        number i, padding included, tells what cell number i holds.
        """
        states, mask = text_states(self.text_encoder, **tokens), tokens["attention_mask"][..., None]
        vectors = (states * mask).sum(1) / mask.sum(1)
        similarity = F.normalize(vectors, dim=1) @ F.normalize(self.pictures.weight, dim=1).T
        contrast = -(targets * (similarity / TEMPERATURE).log_softmax(1)).sum(1).mean()
        unexplained = (self.to_cell(states[:, : cells.shape[1]]) - cells).square().mean()
        return contrast, unexplained


def align_text_encoder(text_encoder, tokenizer, captions: Captions, latents: torch.Tensor, epochs: int, seed: int, say=print):
    """Fine-tune `text_encoder` in place, so that a caption's states say what its picture looks like, and where.

    The latents of a picture are cut into a grid of at most as many cells as a text has tokens, and each token learns to
    describe one cell: the denoiser finds them by cross-attention. Captions of one picture also come to lie together, apart
    from those of others; as the pictures are few and known, each has a vector, which starts as the mean of its captions'.
    The embeddings and the first third of the layers keep what they know of language.
    """
    device = next(text_encoder.parameters()).device
    dice = random.Random(seed)
    torch.manual_seed(seed)
    pictures_of: dict[int, list[int]] = {}
    for picture, columns in enumerate(captions.choices):
        for number in {n for numbers in columns for n in numbers}:
            pictures_of.setdefault(number, []).append(picture)
    tokens = tokenize(tokenizer, captions.texts, device)
    cells = in_cells(latents, tokenizer.model_max_length).to(device)
    model = Alignment(text_encoder, first_vectors(text_encoder, tokens, captions), cells.shape[2]).to(device)
    train_upper_layers(text_encoder)
    batches = max(1, len(pictures_of) * epochs // BATCH)
    args = TrainingArguments(optimizer="muon", learning_rate=1e-3, lr_warmup_steps=min(50, batches // 10))
    optimizers = make_optimizers(model, args)
    schedulers = make_schedulers(optimizers, args, batches)
    captioned = [row for row, columns in enumerate(captions.choices) if columns]
    bar = tqdm(range(batches), desc="aligning text", mininterval=1.0)
    for _ in bar:
        rows = torch.tensor([dice.choice(captioned) for _ in range(BATCH)])
        numbers = captions.draw(rows, 0.0, dice)
        targets = torch.zeros(BATCH, len(captions), device=device)
        for row, number in enumerate(numbers.tolist()):
            targets[row, pictures_of[number]] = 1 / len(pictures_of[number])
        drawn = {name: values[numbers] for name, values in tokens.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cpu"):
            contrast, unexplained = model(drawn, targets, cells[rows])
        (CONTRAST_WEIGHT * contrast + unexplained).backward()
        for optimizer, scheduler in zip(optimizers, schedulers):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        bar.set_postfix(contrast=f"{contrast.item():.3f}", unexplained=f"{unexplained.item():.3f}", refresh=False)
    text_encoder.requires_grad_(False).eval()
    say(f"Aligned the text encoder: cross-entropy {contrast.item():.3f}, unexplained share of the latents {unexplained.item():.3f}.")


def in_cells(latents: torch.Tensor, most: int) -> torch.Tensor:
    """(pictures, channels, height, width) -> (pictures, cells, values), centred, of variance 1: the finest square grid of at
    most `most` cells, row by row."""
    side = max(n for n in range(1, 1 + math.isqrt(most)) if latents.shape[2] % n == latents.shape[3] % n == 0)
    latents = latents - latents.mean(0)
    cells = latents.unflatten(2, (side, -1)).unflatten(4, (side, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return cells / cells.square().mean().sqrt()


def train_upper_layers(text_encoder):
    """Let the last two thirds of the layers learn, and freeze what lies before them."""
    layers = max((m for m in text_encoder.modules() if isinstance(m, nn.ModuleList)), key=len)
    text_encoder.requires_grad_(False).train()
    for layer in layers[len(layers) // 3 :]:
        layer.requires_grad_(True)
    if hasattr(text_encoder, "set_attn_implementation"):
        text_encoder.set_attn_implementation("eager")  # torch's fused attention has a slow backward pass in bf16 on a CPU


@torch.no_grad()
def first_vectors(text_encoder, tokens: dict, captions: Captions) -> torch.Tensor:
    """For each picture the mean over its columns of the mean of their captions' vectors: (pictures, width)."""
    parts = zip(tokens["input_ids"].split(256), tokens["attention_mask"].split(256))
    vectors = torch.cat([F.normalize(mean_states(text_encoder, {"input_ids": i, "attention_mask": m}), dim=1) for i, m in parts])
    empty = vectors.new_zeros(vectors.shape[1])
    means = [[vectors[numbers].mean(0) for numbers in columns] or [empty] for columns in captions.choices]
    return torch.stack([torch.stack(columns).mean(0) for columns in means])
