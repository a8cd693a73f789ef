"""Text encoders for a text-to-image training: a new small one, or one that learns which picture a caption belongs to."""

from __future__ import annotations

import random
import re
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_scheduler

from .captions import Captions, text_states, tokenize

TEMPERATURE = 0.05
BATCH = 128
VOCABULARY = 8000
"""Most words of a new tokenizer; others are spelled."""


def text_encoder_from_scratch(texts: list[str], overrides: dict, max_length: int, seed: int):
    """(tokenizer, text encoder): the commonest words and all characters of `texts`, and a small BERT with random weights."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    common = sorted(words, key=lambda word: (-words[word], word))[:VOCABULARY]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *common]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=max_length)
    fields = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024) | overrides
    torch.manual_seed(seed)
    text_encoder = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=max_length, **fields))
    text_encoder.get_submodule("pooler").requires_grad_(False)  # unused, but what loads a BertModel expects it
    text_encoder.config.use_attention_mask = True
    return tokenizer, text_encoder


def mean_states(text_encoder, tokens: dict) -> torch.Tensor:
    """One vector a text: the mean of its tokens' states, (texts, width)."""
    states, mask = text_states(text_encoder, **tokens), tokens["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


class Alignment(nn.Module):
    """A text encoder, a vector for every picture, and a linear map from texts to latents."""

    def __init__(self, text_encoder, pictures: torch.Tensor, latent_size: int):
        super().__init__()
        self.text_encoder, self.pictures = text_encoder, nn.Embedding.from_pretrained(pictures, freeze=False)
        self.to_latents = nn.Linear(pictures.shape[1], latent_size)

    def forward(self, tokens: dict, targets: torch.Tensor, latents: torch.Tensor):
        """targets: (texts, pictures), rows sum to 1. latents: (texts, values).

        contrast: cross-entropy of a caption's pictures under the cosine similarities of texts and pictures, as in CLIP
        (Radford et al. 2021). unexplained: the squared error of the latents as a linear function of the text.
        """
        vectors = mean_states(self.text_encoder, tokens)
        similarity = F.normalize(vectors, dim=1) @ F.normalize(self.pictures.weight, dim=1).T
        contrast = -(targets * (similarity / TEMPERATURE).log_softmax(1)).sum(1).mean()
        return contrast, (self.to_latents(vectors) - latents).square().mean()


def align_text_encoder(text_encoder, tokenizer, captions: Captions, latents: torch.Tensor, epochs: int, seed: int, say=print):
    """Fine-tune `text_encoder` in place, so that captions of one picture lie together, apart from those of others, and say
    what the picture looks like. Unlike images and captions of CLIP, the pictures are few and known: each gets a vector,
    that starts as the mean of its captions'.
    """
    device = next(text_encoder.parameters()).device
    dice = random.Random(seed)
    torch.manual_seed(seed)
    pictures_of: dict[int, list[int]] = {}
    for picture, columns in enumerate(captions.choices):
        for number in {n for numbers in columns for n in numbers}:
            pictures_of.setdefault(number, []).append(picture)
    tokens = tokenize(tokenizer, captions.texts, device)
    flat = (latents - latents.mean(0)).flatten(1).to(device)
    flat /= flat.square().mean().sqrt()
    model = Alignment(text_encoder, first_vectors(text_encoder, tokens, captions), flat.shape[1]).to(device)
    text_encoder.requires_grad_(True).train()
    if hasattr(text_encoder, "set_attn_implementation"):
        text_encoder.set_attn_implementation("eager")  # torch's fused attention has a slow backward pass in bf16 on a CPU
    steps = max(1, len(pictures_of) * epochs // BATCH)
    optimizer = torch.optim.AdamW(
        [
            {"params": text_encoder.parameters(), "lr": 1e-4},
            {"params": [*model.pictures.parameters(), *model.to_latents.parameters()], "lr": 1e-3},
        ]
    )
    scheduler = get_scheduler("cosine", optimizer, min(50, steps // 10), steps)
    captioned = [row for row, columns in enumerate(captions.choices) if columns]
    bar = tqdm(range(steps), desc="aligning text", mininterval=1.0)
    for _ in bar:
        rows = torch.tensor([dice.choice(captioned) for _ in range(BATCH)])
        numbers = captions.draw(rows, 0.0, dice)
        targets = torch.zeros(BATCH, len(captions), device=device)
        for row, number in enumerate(numbers.tolist()):
            targets[row, pictures_of[number]] = 1 / len(pictures_of[number])
        length = int(tokens["attention_mask"][numbers].sum(1).max())
        drawn = {name: values[numbers, :length] for name, values in tokens.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cpu"):
            contrast, unexplained = model(drawn, targets, targets @ flat)
        (contrast + unexplained).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(contrast=f"{contrast.item():.3f}", unexplained=f"{unexplained.item():.3f}", refresh=False)
    text_encoder.requires_grad_(False).eval()
    say(f"Aligned the text encoder: cross-entropy {contrast.item():.3f}, unexplained share of the latents {unexplained.item():.3f}.")


@torch.no_grad()
def first_vectors(text_encoder, tokens: dict, captions: Captions) -> torch.Tensor:
    """For each picture the mean over its columns of the mean of their captions' vectors: (pictures, width)."""
    vectors = text_vectors(text_encoder, tokens)
    empty = vectors.new_zeros(vectors.shape[1])
    means = [[vectors[numbers].mean(0) for numbers in columns] or [empty] for columns in captions.choices]
    return torch.stack([torch.stack(columns).mean(0) for columns in means])


@torch.no_grad()
def text_vectors(text_encoder, tokens: dict) -> torch.Tensor:
    """A unit vector for each text, (texts, width)."""
    parts = zip(tokens["input_ids"].split(256), tokens["attention_mask"].split(256))
    return torch.cat([F.normalize(mean_states(text_encoder, {"input_ids": i, "attention_mask": m}), dim=1) for i, m in parts])


def make_prior(captions: Captions, text_encoder, tokenizer):
    """The `CaptionPrior` of the captions in the first column: all texts of a picture lead to it."""
    from hf_ae.pipelines import CaptionPrior

    drawn = dict.fromkeys(number for row in captions.choices for number in (row[0] if row else []))
    order = list(drawn | dict.fromkeys(range(1, len(captions.texts))))
    place = {number: i for i, number in enumerate(order)}
    links = {(place[first], place[n]) for row in captions.choices if row for first in row[0] for column in row for n in column}
    device = next(text_encoder.parameters()).device
    vectors = text_vectors(text_encoder, tokenize(tokenizer, [captions.texts[number] for number in order], device))
    prior = CaptionPrior([captions.texts[number] for number in drawn], *vectors.shape[:1], len(links), vectors.shape[1])
    tensors = {"vectors": vectors.cpu(), "links": torch.tensor(sorted(links), dtype=torch.int32).T}
    firsts, texts = tensors["links"].long()
    means = torch.zeros(len(drawn), vectors.shape[1]).index_add(0, firsts, tensors["vectors"][texts])
    prior.load_state_dict(tensors | {"means": F.normalize(means, dim=1)})
    return prior


@torch.no_grad()
def round_matrices(model):
    """Round all matrices in place to what float8 (e4m3: three bits of mantissa) holds; vectors stay as they are."""
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.copy_(weight.to(torch.float8_e4m3fn))
