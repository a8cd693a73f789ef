"""The autoregressive prior over discrete codes: a GPT-2 that draws one code after the other, level by level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_vqvae import VQVAEConfig


@dataclass
class CodePriorOutput(ModelOutput):
    """What `prior(codes, labels)` returns.

    loss: scalar, -log p(codes | labels) in nats, summed over an image and averaged over the batch. losses: the part of
    each level, `level_1` (the coarsest), `level_2`, …
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class CodePrior(GPT2PreTrainedModel):
    """p(codes | class) = Π p(code | codes before, class), with the codes of all levels in one row, the coarsest level
    first.

    ```
    class, code 1, code 2, …  -> GPT-2 ->  code 1, code 2, code 3, …
    ```

    A code's logits are the products of the state with the embeddings of its level's codewords. The class index
    `num_classes` stands for no class; training with it now and then makes classifier-free guidance possible.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        """`config`: that of the model with the codes."""
        self.shapes, self.size = config.level_shapes(), config.codebook_size or 0
        self.num_classes = config.prior_classes or 0
        self.lengths = [math.prod(shape) for shape in self.shapes]
        self.level_of_place = [level for level, length in enumerate(self.lengths) for _ in range(length)]
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

    def to_row(self, levels: list[Tensor]) -> Tensor:
        """Indices of each level (batch, *positions) -> (batch, codes of all levels)."""
        return torch.cat([level.flatten(1) for level in levels], 1)

    def to_levels(self, codes: Tensor) -> list[Tensor]:
        """The inverse of `to_row`."""
        return [part.unflatten(1, shape) for part, shape in zip(codes.split(self.lengths, 1), self.shapes)]

    def class_tokens(self, labels: Tensor | None, batch: int) -> Tensor:
        """(batch, 1): the first token of a row, for class indices (batch,), or None for no class."""
        if labels is None:
            labels = torch.full((batch,), self.num_classes, device=self.device)
        return labels[:, None] + len(self.shapes) * self.size

    @property
    def first_tokens(self) -> Tensor:
        """The token of codeword 0 at each place of the row: (length,)."""
        return torch.tensor([level * self.size for level in self.level_of_place], device=self.device)

    def logits(self, states: Tensor, level: int) -> Tensor:
        """States (…, width) -> unnormalised log-probabilities (…, codewords) of a level's codewords, float32."""
        words = self.transformer.wte.weight[level * self.size : (level + 1) * self.size]
        return F.linear(states, words).float()

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> CodePriorOutput:
        """codes (batch, length), class indices (batch,) or None -> the loss."""
        tokens = torch.cat([self.class_tokens(labels, len(codes)), (codes + self.first_tokens)[:, :-1]], 1)
        states = self.transformer(tokens, use_cache=False).last_hidden_state
        losses = {}
        for level, (part, target) in enumerate(zip(states.split(self.lengths, 1), codes.split(self.lengths, 1))):
            total = F.cross_entropy(self.logits(part, level).flatten(0, 1), target.flatten(), reduction="sum")
            losses[f"level_{level + 1}"] = total / len(codes)
        return CodePriorOutput(torch.stack([*losses.values()]).sum(), losses)

    @torch.no_grad()
    def sample(
        self, n: int, labels: Tensor | None = None, temperature: float = 1.0, top_k: int | None = None,
        guidance_scale: float = 1.0, generator: torch.Generator | None = None, use_cache: bool = True,
    ) -> Tensor:  # fmt: skip
        """`n` rows of codes (n, length), for class indices (n,) or None. Raises ValueError.

        For the other arguments see `VQVAEModel.generate`; `use_cache` keeps keys and values.
        """
        if n < 1 or not temperature > 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"n={n} and top_k={top_k} must be at least 1, and temperature={temperature} positive.")
        guided = labels is not None and guidance_scale != 1.0
        row = self.class_tokens(labels, n)
        row = torch.cat([row, self.class_tokens(None, n)]) if guided else row
        cache, codes = DynamicCache(config=self.config) if use_cache else None, []
        for level, first_token in zip(self.level_of_place, self.first_tokens):
            seen = row[:, -1:] if use_cache else row
            states = self.transformer(seen, past_key_values=cache, use_cache=use_cache).last_hidden_state[:, -1]
            logits = self.logits(states, level)
            if guided:
                asked, any_class = logits.chunk(2)
                logits = any_class + guidance_scale * (asked - any_class)
            code = draw(logits / temperature, top_k, generator)
            codes.append(code)
            row = torch.cat([row, (code + first_token).repeat(2 if guided else 1)[:, None]], 1)
        return torch.stack(codes, 1)


def draw(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One index for each row of `logits` (rows, codewords), among the `top_k` most probable: (rows,)."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    device = generator.device if generator is not None else logits.device
    return torch.multinomial(logits.softmax(-1).to(device), 1, generator=generator)[:, 0].to(logits.device)
