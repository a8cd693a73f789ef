"""Texts -> the embeddings that a denoiser reads."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .image_io import require
from .repo_parts import logger

CACHED_TEXTS = 64
JOINERS = frozenset("\u200d\ufe0e\ufe0f")
"""What joins emoji or chooses their style."""
TONES = {
    "\U0001f3fb": "light", "\U0001f3fc": "medium-light", "\U0001f3fd": "medium", "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}  # fmt: skip
NAMES = {"\u2764": "red heart", **{sign: f": {tone} skin tone" for sign, tone in TONES.items()}}
"""Where Unicode's name, such as "heavy black heart", says another thing than people see."""
LONG_PIECE = 4
"""A tokenizer that has as many letters of a word in one piece may know it."""


@dataclass
class EncodedText:
    """A text's states (1, tokens, width), the end of it that was cut off, and the caption that the prior takes it
    for."""

    states: torch.Tensor
    cut: str
    caption: str | None


class PromptReading:
    """Encodes the texts of a pipeline with its `tokenizer`, `text_encoder` and `prior`, each alone, and keeps them: a
    text never depends on the others, and trying seeds costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._texts: dict[tuple[str, int | None], EncodedText] = {}
        self._texts_from: tuple[Any, ...] | None = None

    def embeddings(self, texts: list[str], device: torch.device, clip_skip: int | None) -> torch.Tensor:
        """Texts -> (texts, tokens, width). Warns of what is cut off."""
        self._forget_if_changed(device)
        states = torch.cat([self._read(text, device, clip_skip).states for text in texts])
        for key in list(self._texts)[:-CACHED_TEXTS]:
            del self._texts[key]
        return states

    def captions(self: Any, texts: list[str], device: torch.device) -> list[str] | None:
        """What the prior takes each text for; None where there is no prior."""
        self._forget_if_changed(device)
        return None if self.prior is None else [str(self._read(text, device, None).caption) for text in texts]

    def _forget_if_changed(self: Any, device: torch.device) -> None:
        """Forget all texts if a component, its dtype or device is another, or its weights were trained further."""
        encoder = self.text_encoder
        version = sum(0 if weight.is_inference() else weight._version for weight in encoder.parameters())
        source = (encoder, self.tokenizer, self.prior, encoder.dtype, device, version)
        if source != self._texts_from:
            self._texts, self._texts_from = {}, source

    def _read(self, text: str, device: torch.device, clip_skip: int | None) -> EncodedText:
        """A text, encoded once; warns each time."""
        key = (text, clip_skip)
        if key not in self._texts:
            self._texts[key] = self._encode_text(text, device, clip_skip)
        read = self._texts[key]
        if read.cut:
            tokens = read.states.shape[1]
            logger.warning(f"The text encoder reads {tokens} tokens; this end of the prompt was cut off: {read.cut!r}")
        return read

    def warn_of_unknown(self: Any, texts: list[str]) -> None:
        """Warn of each text that says nothing to the tokenizer."""
        for text in texts:
            words = self.tokenizer(name_symbols(self.tokenizer, text), add_special_tokens=False, verbose=False)
            if not understands(self.tokenizer, words):
                logger.warning(f"The tokenizer knows no word of {text!r}: the image may show anything.")

    def _encode_text(self: Any, text: str, device: torch.device, clip_skip: int | None) -> EncodedText:
        tokenizer, config = self.tokenizer, self.text_encoder.config
        text = name_symbols(tokenizer, text)
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
        length = min(tokenizer.model_max_length, positions)
        words = tokenizer(text, add_special_tokens=False, verbose=False)
        cut = tokenizer.decode(words.input_ids[length - tokenizer.num_special_tokens_to_add() :]).strip()
        tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(config, "use_attention_mask", not config.model_type.startswith("clip"))
        mask, ids = tokens.attention_mask.to(device), tokens.input_ids.to(device)
        skips = {} if clip_skip is None else {"output_hidden_states": True}
        output = self.text_encoder(ids, attention_mask=mask if masked else None, **skips)
        mean = (output[0] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        caption = None if self.prior is None else self.prior(mean)[0]
        states = output[0] if clip_skip is None else earlier_states(self.text_encoder, output, clip_skip)
        return EncodedText(states, cut, caption)


def earlier_states(encoder: Any, output: Any, skipped: int) -> torch.Tensor:
    """The states before the last `skipped` layers, through the encoder's last normalisation where it has one. Raises
    ValueError where it has fewer layers."""
    layers = output.hidden_states
    require(skipped < len(layers), f"clip_skip={skipped}: the text encoder has {len(layers) - 1} layers.")
    normalise = getattr(getattr(encoder, "text_model", encoder), "final_layer_norm", None)
    states = layers[-(skipped + 1)]
    return states if normalise is None else normalise(states)


def understands(tokenizer: Any, words: Any) -> bool:
    """Whether a tokenizer that split a text into `words` has any of these whole, or a long piece of it. A text without
    words counts as understood."""
    pieces = tokenizer.convert_ids_to_tokens(words.input_ids)
    places = words.word_ids() if tokenizer.is_fast else list(range(len(pieces)))
    counts = Counter(places)
    known = [counts[place] == 1 or len(bare(piece)) >= LONG_PIECE for piece, place in zip(pieces, places)]
    return not pieces or any(good and piece != tokenizer.unk_token for good, piece in zip(known, pieces))


def bare(piece: str) -> str:
    """A tokenizer's piece without the signs that say where in a word it was."""
    return piece.removeprefix("##").removeprefix("▁").removeprefix("Ġ").removesuffix("</w>")


def name_symbols(tokenizer: Any, text: str) -> str:
    """A text with the Unicode name of each emoji that the tokenizer does not know, such as "rocket", instead of it."""
    unknown = {sign for sign in text if is_symbol(sign) and is_unknown(tokenizer, sign)}
    names = {sign: NAMES.get(sign, unicodedata.name(sign, "").lower()) for sign in unknown}
    names = {sign: name for sign, name in names.items() if name and not name.startswith("regional indicator")}
    if not names:
        return text
    return "".join(f" {names[sign]} " if sign in names else sign for sign in text if sign not in JOINERS).strip()


def is_symbol(sign: str) -> bool:
    """Whether a character is an emoji, as far as Unicode's categories say, or a skin tone."""
    return unicodedata.category(sign) == "So" or sign in NAMES


def is_unknown(tokenizer: Any, sign: str) -> bool:
    """Whether a tokenizer has nothing for a character."""
    ids = tokenizer(sign, add_special_tokens=False).input_ids
    return not ids or tokenizer.unk_token_id in ids
