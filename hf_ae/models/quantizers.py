"""From vectors to indices and back: vector quantization, and finite scalar quantization.

A quantizer maps the encoder's output (batch, values, *positions) to the nearest codewords. What it keeps is float32
whatever the model is cast to, and the same in all processes of a training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_vqvae import VQVAEConfig

DISTANCES_AT_ONCE = 2**24
"""How many distances between vectors and codewords are held in memory."""
CHECK_EVERY = 10
"""Training passes between two looks for codewords that nothing uses: each look waits for the device."""
RECENT = 200
"""Training passes over which the use of a codebook is watched."""


class QuantizedCode(NamedTuple):
    """latents: codewords (batch, values, *positions); gradients pass straight through. indices: (batch, *positions).
    terms: named squared distances, summed over an image and averaged over the batch, without weights."""

    latents: Tensor
    indices: Tensor
    terms: dict[str, Tensor]


class Quantizer(nn.Module):
    """What all quantizers have: how long each codeword was not used, and how often the training images use it."""

    idle: Tensor
    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("frequencies", torch.zeros(size, dtype=torch.int64))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.idle)
        nn.init.zeros_(self.frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Go to another device as every module does, but keep the dtype."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def forward(self, x: Tensor) -> QuantizedCode:
        """The encoder's output (batch, values, *positions) -> codewords, indices, terms."""
        with torch.autocast(x.device.type, enabled=False):
            vectors, words, indices, terms = self.quantize(x.float().flatten(2).mT)
            latents = words.detach() + (vectors - vectors.detach())  # the codewords, with the gradient of the vectors
        latents = latents.mT.reshape(x.shape).to(x.dtype)
        return QuantizedCode(latents, indices.view(x.shape[0], *x.shape[2:]), terms)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (batch, *positions) -> codewords (batch, values, *positions), float32."""
        return self.words(indices).movedim(-1, 1)

    @torch.no_grad()
    def watch(self, counts: Tensor) -> None:
        """Note which codewords a training pass used; `counts` (size,) are those of all processes."""
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))

    @property
    def recent_usage(self) -> float:
        """Fraction of the codewords used in the last RECENT training passes."""
        return (self.idle < RECENT).float().mean().item()

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(batch, positions, values) -> vectors as they are compared, codewords, indices (batch, positions), terms."""
        raise NotImplementedError

    def words(self, indices: Tensor) -> Tensor:
        """Indices (…) -> codewords (…, values)."""
        raise NotImplementedError


class VectorQuantizer(Quantizer):
    """Nearest codewords of a learned codebook (van den Oord et al. 2017).

    `ema` (their appendix A.1): N ← γN + (1 - γ)n and m ← γm + (1 - γ)Σz for the n vectors z of each codeword
    e = m / N; since m = N·e, only N (`cluster_sizes`) and e are kept: e ← e + (1 - γ)(Σz - n·e) / N. Otherwise the
    codebook is a parameter, trained by the term `codebook`, ‖sg[z] - e‖². The term `commitment` is ‖z - sg[e]‖².
    """

    codebook: Tensor
    cluster_sizes: Tensor
    passes: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config.codebook_size or 0)
        self.ema, self.decay = config.quantizer == "ema", config.ema_decay
        self.cosine = config.code_distance == "cosine"
        self.kmeans_rounds, self.revive_after = config.kmeans_rounds, config.revive_after
        codebook = first_codebook(self.size, config.codeword_length)
        if self.ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_sizes", torch.ones(self.size, dtype=torch.float32))
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.passes_done: int | None = None
        """`passes` on the host, read from the device once."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.passes_done = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.copy_(self.codebook, first_codebook(*self.codebook.shape))
        nn.init.zeros_(self.passes)
        if self.ema:
            nn.init.ones_(self.cluster_sizes)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        vectors = F.normalize(vectors, dim=-1) if self.cosine else vectors
        learning = self.training and torch.is_grad_enabled()
        if learning:
            self.place(vectors.detach())
        indices = nearest(vectors.detach().flatten(0, 1), self.table.detach()).view(vectors.shape[:2])
        words = self.words(indices)
        terms = {"commitment": (vectors - words.detach()).square().sum() / vectors.shape[0]}
        if not self.ema:
            terms["codebook"] = (vectors.detach() - words).square().sum() / vectors.shape[0]
        if learning:
            self.learn(vectors.detach(), indices)
        return vectors, words, indices, terms

    @property
    def table(self) -> Tensor:
        """The codewords (size, values)."""
        return F.normalize(self.codebook, dim=-1) if self.cosine else self.codebook

    def words(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.table)

    @torch.compiler.disable
    @torch.no_grad()
    def place(self, vectors: Tensor) -> None:
        """Before a training pass: start the codebook on the first batch, and move codewords that nothing uses to its
        vectors."""
        if self.passes_done is None:
            self.passes_done = int(self.passes)
        if self.kmeans_rounds and not self.passes_done:
            points = gathered(vectors).flatten(0, 1)
            centres = k_means(points, self.size, self.kmeans_rounds)
            if dist.is_initialized():
                dist.broadcast(centres, 0)
            self.codebook.copy_(centres)
        every = min(CHECK_EVERY, self.revive_after)
        if not every or self.passes_done % every:
            return
        dead = (self.idle >= self.revive_after) & (self.idle % self.revive_after < every)
        if dead.any():
            points = gathered(vectors).flatten(0, 1)
            order = torch.randperm(len(points), generator=torch.Generator().manual_seed(self.passes_done))
            order = order.repeat(-(-self.size // len(points)))[: int(dead.sum())]
            self.codebook[dead] = points[order.to(points.device)]
            if self.ema:
                self.cluster_sizes[dead] = 1.0

    @torch.compiler.disable
    @torch.no_grad()
    def learn(self, vectors: Tensor, indices: Tensor) -> None:
        """After a training pass: move the codewords to the vectors of all processes that chose them."""
        sums = cluster_sums(vectors.flatten(0, 1), indices.flatten(), self.size)
        if dist.is_initialized():
            dist.all_reduce(sums)
        counts = sums[:, -1]
        if self.ema:
            self.cluster_sizes.lerp_(counts, 1 - self.decay)
            change = (sums[:, :-1] - counts[:, None] * self.table) / self.cluster_sizes.clamp(min=1e-6)[:, None]
            self.codebook.copy_(self.table + (1 - self.decay) * change)
        self.watch(counts)
        self.passes += 1
        self.passes_done = (self.passes_done or 0) + 1


class FiniteScalarQuantizer(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023): each of a few values is rounded to one of L levels in [-1, 1].

    The codebook is the grid of all combinations; a codeword's index writes them as digits, the first value lowest.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config.codebook_size or 0)
        self.levels = config.fsq_levels or []
        self.steps = [math.prod(self.levels[:i]) for i in range(len(self.levels))]

    def grid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Levels of each value, and what a step of it adds to the index."""
        return torch.tensor(self.levels, device=device), torch.tensor(self.steps, device=device)

    def quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        levels, steps = self.grid(vectors.device)
        reach, offset = (levels - 1) * (1 + 1e-3) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(vectors + torch.atanh(offset / reach)) * reach - offset
        whole = bounded.detach().round()
        half = levels // 2
        indices = ((whole.long() + half) * steps).sum(-1)
        if self.training and torch.is_grad_enabled():
            counts = usage_counts(indices, self.size)
            if dist.is_initialized():
                dist.all_reduce(counts)
            self.watch(counts)
        return bounded / half, whole / half, indices, {}

    def words(self, indices: Tensor) -> Tensor:
        levels, steps = self.grid(indices.device)
        half = levels // 2
        return (indices[..., None] // steps % levels - half).float() / half


def first_codebook(size: int, length: int) -> Tensor:
    """Codewords (size, length), float32, to start from: fixed draws from N(0, 1 / length)."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, length, generator=generator, dtype=torch.float32, device="cpu") / length**0.5


def make_quantizer(config: VQVAEConfig) -> Quantizer:
    """The quantizer of one level that `config` asks for."""
    return FiniteScalarQuantizer(config) if config.quantizer == "fsq" else VectorQuantizer(config)


def nearest(points: Tensor, words: Tensor) -> Tensor:
    """The index of the nearest of `words` (size, values) for each of `points` (points, values)."""
    at_once = points.shape[0] if torch.compiler.is_compiling() else max(1, DISTANCES_AT_ONCE // len(words))
    lengths, parts = words.square().sum(1), points.split(at_once)
    return torch.cat([torch.addmm(lengths, part, words.T, alpha=-2).argmin(1) for part in parts])


def gathered(vectors: Tensor) -> Tensor:
    """The vectors of all processes, image by image in the order that one process would see them."""
    if not dist.is_initialized():
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def cluster_sums(points: Tensor, indices: Tensor, size: int) -> Tensor:
    """Sum of the `points` (points, values) of each of the indices 0 … size - 1, and in the last column their number:
    (size, values + 1). `indices` (points,) are theirs."""
    sums = torch.zeros(size, points.shape[1] + 1, device=points.device)
    return sums.index_add_(0, indices, F.pad(points, (0, 1), value=1.0))


def usage_counts(indices: Tensor, size: int) -> Tensor:
    """How often each of the indices 0 … size - 1 occurs: (size,). Unlike `bincount` it does not wait for a GPU."""
    flat = indices.flatten()
    return flat.new_zeros(size).index_add_(0, flat, torch.ones_like(flat))


def k_means(points: Tensor, size: int, rounds: int) -> Tensor:
    """Centres (size, values) of `points` (points, values): Lloyd's algorithm, on at most 256 points a centre.

    It starts from points that a fixed seed draws. Where there are fewer points than centres, some centres are equal.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).to(points.device)
    points = points[order[: 256 * size]]
    centres = points.repeat(-(-size // len(points)), 1)[:size]
    for _ in range(rounds):
        sums = cluster_sums(points, nearest(points, centres), size)
        counts = sums[:, -1:]
        centres = torch.where(counts > 0, sums[:, :-1] / counts.clamp(min=1), centres)
    return centres


def usage_and_perplexity(indices: Tensor, size: int) -> dict[str, Tensor]:
    """Of a batch of indices: the fraction of `size` codewords in use, and the perplexity exp(entropy) of their
    frequencies."""
    counts = usage_counts(indices, size).float()
    frequencies = counts / counts.sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": torch.special.entr(frequencies).sum().exp()}
