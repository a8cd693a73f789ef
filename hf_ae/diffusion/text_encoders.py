"""Text encoders for a text-to-image training, and what they say about captions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer

from ..loading import opening
from ..pipelines.caption_prior import CaptionPrior
from .captions import Captions

VOCABULARY = 8000
"""Most words of a new tokenizer; others are spelled."""
KEEP_STATES = 2**32
"""Bytes of text states that are kept; those of further captions are computed whenever they are drawn."""


def new_text_encoder(texts: list[str], fields: dict[str, Any], max_length: int, seed: int) -> tuple[Any, Any]:
    """(tokenizer, text encoder): the commonest words and all characters of `texts`, and a small BERT with random
    weights; `fields` are those of its BertConfig."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    letters = sorted({letter for word in words for letter in word})
    common = sorted(words, key=lambda word: (-words[word], word))[:VOCABULARY]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *common]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=max_length)
    sizes = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024) | fields
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=max_length, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = BertModel(config)
    text_encoder.get_submodule("pooler").requires_grad_(False)  # unused, but what loads a BertModel expects it
    text_encoder.config.use_attention_mask = True
    return tokenizer, text_encoder


def load_text_encoder(name: str | Path, max_length: int) -> tuple[Any, Any]:
    """(tokenizer, encoder of a transformers text model, frozen) of a folder or Hub id. Raises ValueError."""
    from transformers import AutoModelForTextEncoding, CLIPTextModel

    with opening("text encoder", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        is_clip = AutoConfig.from_pretrained(name).model_type in ("clip", "clip_text_model")
        cls: Any = CLIPTextModel if is_clip else AutoModelForTextEncoding
        text_encoder = cls.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    if not is_clip:
        text_encoder.config.use_attention_mask = True  # so that pipelines hide the padding from it, too
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length)
    return tokenizer, text_encoder.eval().requires_grad_(False)


def tokenize(tokenizer: Any, texts: list[str], device: torch.device | str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, padded to the tokenizer's model_max_length: (texts, length)."""
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def text_states(text_encoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(texts, length, width): the last hidden states, as pipelines give them to the denoiser (CLIP reads its padding
    too)."""
    config = text_encoder.config
    masked = getattr(config, "use_attention_mask", config.model_type not in ("clip", "clip_text_model"))
    return text_encoder(input_ids, attention_mask=attention_mask if masked else None)[0]


class TextStates:
    """The states of captions under a frozen text encoder: computed when they are drawn first, and kept in float16."""

    def __init__(self, text_encoder: Any, tokens: dict[str, Tensor], keep: int = KEEP_STATES) -> None:
        self.text_encoder, self.tokens = text_encoder, tokens
        count, length = tokens["input_ids"].shape
        size = length * text_encoder.config.hidden_size
        self.known = torch.zeros(min(count, keep // (2 * size)), dtype=torch.bool)
        device = tokens["input_ids"].device
        self.kept = torch.empty(len(self.known), length, size // length, dtype=torch.float16, device=device)

    @torch.no_grad()
    def __call__(self, index: Tensor) -> Tensor:
        """index: captions (batch,), on the CPU -> their states (batch, length, width), float16."""
        kept = index < len(self.known)
        new = index[kept][~self.known[index[kept]]].unique()
        if len(new):
            self.kept[new] = self.compute(new)
            self.known[new] = True
        states = self.kept[index.clamp(max=len(self.known) - 1)]
        if not kept.all():
            states[~kept] = self.compute(index[~kept])
        return states

    def compute(self, index: Tensor) -> Tensor:
        chosen = {name: values[index] for name, values in self.tokens.items()}
        return text_states(self.text_encoder, **chosen).to(torch.float16)


def mean_states(text_encoder: Any, tokens: dict[str, Tensor]) -> Tensor:
    """One vector a text: the mean of its tokens' states, (texts, width)."""
    states, mask = text_states(text_encoder, **tokens), tokens["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def text_vectors(text_encoder: Any, tokens: dict[str, Tensor]) -> Tensor:
    """A unit vector for each text, (texts, width)."""
    parts = zip(tokens["input_ids"].split(256), tokens["attention_mask"].split(256))
    vectors = [mean_states(text_encoder, {"input_ids": i, "attention_mask": m}) for i, m in parts]
    return torch.cat([F.normalize(part, dim=1) for part in vectors])


def make_prior(captions: Captions, text_encoder: Any, tokenizer: Any) -> CaptionPrior:
    """The `CaptionPrior` of the captions in the first column: all texts of an image lead to it."""
    drawn = dict.fromkeys(i for row in captions.choices for i in (row[0] if row else []))
    order = list(drawn | dict.fromkeys(range(1, len(captions.texts))))
    place = {old: new for new, old in enumerate(order)}
    texts_of = [(row[0], [i for column in row for i in column]) for row in captions.choices if row]
    links = {(place[first], place[text]) for firsts, texts in texts_of for first in firsts for text in texts}
    device = next(text_encoder.parameters()).device
    vectors = text_vectors(text_encoder, tokenize(tokenizer, [captions.texts[i] for i in order], device)).cpu()
    prior = CaptionPrior([captions.texts[i] for i in drawn], len(vectors), len(links), vectors.shape[1])
    tensors = {"vectors": vectors, "links": torch.tensor(sorted(links), dtype=torch.int32).T}
    firsts, texts = tensors["links"].long()
    means = torch.zeros(len(drawn), vectors.shape[1]).index_add(0, firsts, vectors[texts])
    prior.load_state_dict(tensors | {"means": F.normalize(means, dim=1)})
    return prior.to(device)
