"""The autoregressive prior over discrete codes: a GPT-2 that draws one code after the other, level by level."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel

from .modeling_autoencoder import AutoencoderOutput


class CodePrior(GPT2PreTrainedModel):
    """p(codes | class) = Π p(code | codes before, class), with the codes of all levels in one row, the coarsest level first.

    ```
    class, code 1, code 2, …  -> GPT-2 ->  code 1, code 2, code 3, …
    ```

    A code's logits are the products of the state with the embeddings of its level's codewords. The class number
    `num_classes` stands for no class; training with it now and then makes classifier-free guidance possible.
    """

    def __init__(self, config):
        """`config`: that of the model with the codes."""
        self.shapes, self.size, self.num_classes = config.level_shapes(), config.codebook_size, config.prior_classes
        self.lengths = [math.prod(shape) for shape in self.shapes]
        fields: dict[str, Any] = dict(
            vocab_size=len(self.shapes) * self.size + self.num_classes + 1,
            n_positions=sum(self.lengths),
            n_embd=config.prior_hidden_size,
            n_layer=config.prior_layers,
            n_head=config.prior_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",  # torch's fused attention has a slow backward pass in bf16 on CPUs
        )
        super().__init__(GPT2Config(**fields))
        self.transformer = GPT2Model(self.config)
        self.post_init()

    # Codes and tokens

    def to_row(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """Indices of each level (batch, *positions) -> (batch, codes of all levels)."""
        return torch.cat([level.flatten(1) for level in levels], 1)

    def to_levels(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `to_row`."""
        return [part.unflatten(1, shape) for part, shape in zip(codes.split(self.lengths, 1), self.shapes)]

    def class_tokens(self, labels: torch.Tensor | None, batch: int) -> torch.Tensor:
        """(batch, 1): the first token of a row."""
        if labels is None:
            labels = torch.full((batch,), self.num_classes, device=self.device)
        return labels[:, None] + len(self.shapes) * self.size

    @property
    def first_tokens(self) -> torch.Tensor:
        """The token of codeword 0 at each place of the row."""
        return torch.tensor([level * self.size for level, length in enumerate(self.lengths) for _ in range(length)], device=self.device)

    def logits(self, states: torch.Tensor, level: int) -> torch.Tensor:
        """States (…, width) -> unnormalised log-probabilities of a level's codewords, float32."""
        words = self.transformer.wte.weight[level * self.size : (level + 1) * self.size]
        return F.linear(states, words).float()

    def forward(self, codes: torch.Tensor, labels: torch.Tensor | None = None) -> AutoencoderOutput:
        """codes (batch, length) -> the loss -log p(codes | labels) in nats, summed over an image; a term for each level."""
        tokens = torch.cat([self.class_tokens(labels, len(codes)), (codes + self.first_tokens)[:, :-1]], 1)
        states = self.transformer(tokens, use_cache=False).last_hidden_state
        losses = {}
        for level, (part, target) in enumerate(zip(states.split(self.lengths, 1), codes.split(self.lengths, 1))):
            logits = self.logits(part, level)
            losses[f"level_{level + 1}"] = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / len(codes)
        return AutoencoderOutput(torch.stack([*losses.values()]).sum(), losses)

    @torch.no_grad()
    def sample(
        self, n: int, labels=None, temperature=1.0, top_k=None, guidance_scale=1.0, generator=None, use_cache: bool = True
    ) -> torch.Tensor:
        """`n` rows of codes (n, length). For the arguments see `VQVAEModel.generate`; `use_cache` keeps keys and values."""
        if n < 1 or not temperature > 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"n={n} and top_k={top_k} must be at least 1, and temperature={temperature} positive.")
        guided = labels is not None and guidance_scale != 1.0
        row = self.class_tokens(labels, n)
        row = torch.cat([row, self.class_tokens(None, n)]) if guided else row
        cache, places, codes = DynamicCache(config=self.config) if use_cache else None, self.first_tokens, []
        levels = [level for level, length in enumerate(self.lengths) for _ in range(length)]
        for place, level in enumerate(levels):
            seen = row[:, -1:] if use_cache else row
            states = self.transformer(seen, past_key_values=cache, use_cache=use_cache).last_hidden_state[:, -1]
            logits = self.logits(states, level)
            if guided:
                asked, any_class = logits.chunk(2)
                logits = any_class + guidance_scale * (asked - any_class)
            code = draw(logits / temperature, top_k, generator)
            codes.append(code)
            row = torch.cat([row, (code + places[place]).repeat(2 if guided else 1)[:, None]], 1)
        return torch.stack(codes, 1)


def draw(logits: torch.Tensor, top_k: int | None, generator: torch.Generator | None) -> torch.Tensor:
    """One number for each row of `logits` (rows, codewords), among the `top_k` most probable."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    where = generator.device if generator is not None else logits.device
    return torch.multinomial(logits.softmax(-1).to(where), 1, generator=generator)[:, 0].to(logits.device)
