"""How probable latents are: quantization, the scale hyperprior, and the integer tables of the entropy coder.

What the entropy coder depends on is computed in fixed-point numbers, in float64, where every sum of them is exact: the
result does not depend on the order of summation, and so not on threads, batches or processes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

SCALES = [0.11 * (256 / 0.11) ** (i / 63) for i in range(64)]
"""Standard deviations that the entropy coder knows, in quantization steps (Ballé et al. 2018 use the same range)."""
QUALITY_LEVELS = 128
"""Quality 1; quality is a whole number of 1/128."""
QUALITY_ANCHORS = 5
"""Qualities with parameters of their own; between them they are interpolated."""
HYPER_LIMIT = 63
"""Hyper-latents are whole numbers from -63 to 63."""
TABLE_TOTAL = 2**20
"""The weights of a table add up to about this."""
FRACTION_BITS, WEIGHT_BITS = 8, 14
"""Binary digits after the point, of activations and of weights."""
ERROR_WEIGHT = 60.0
"""What a squared error of one step is worth in bits, when symbols are chosen. `benchmarks/NOTES.md` holds the
measurements on trained models: the bytes at equal PSNR differ by 1 % between 30 and infinity; 6 / ln 2, the theory of
high rates, costs 6 %."""
STEPS = 3
"""In how many steps latents are coded, each knowing the values of those before."""
ACTIVATION_LIMIT, WEIGHT_LIMIT = 2.0**12, 2.0**3
"""With these a sum of 9·1024 products needs 13.2 + (12 + 8) + (3 + 14) = 50.2 of float64's 53 binary digits."""


def scale_of(index: Tensor) -> Tensor:
    """Standard deviations, float32, of (real) indices into SCALES."""
    return SCALES[0] * torch.exp(index.float() * (math.log(SCALES[-1] / SCALES[0]) / (len(SCALES) - 1)))


def economical_round(v: Tensor, scale: Tensor) -> Tensor:
    """round(v), or one closer to 0 where the bits saved outweigh the error: rate-distortion optimal quantization."""

    def cost(symbol: Tensor) -> Tensor:
        return ERROR_WEIGHT * (v - symbol).square() + gaussian_bits(symbol.float(), scale)

    closest = torch.floor(v + 0.5)
    smaller = closest - closest.sign()
    return torch.where(cost(smaller) < cost(closest), smaller, closest)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return torch.floor(x * 2**bits + 0.5) / 2**bits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def round_straight_through(x: Tensor, bits: int = 0) -> Tensor:
    """The closest multiple of 2^-bits, half upwards; the gradient is that of x (straight-through)."""
    return _Round.apply(x, bits)


def fixed_point(x: Tensor, bits: int, limit: float) -> Tensor:
    """The closest multiple of 2^-bits within ±limit; within the limits the gradient is that of x."""
    return round_straight_through(x.clamp(-limit, limit), bits)


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound); a gradient that would lift x above the bound still passes."""
    return _LowerBound.apply(x, bound)


def gaussian_bits(v: Tensor, scale: Tensor) -> Tensor:
    """-log2 of the probability that a Gaussian of mean 0 and this standard deviation has in v ± ½, value by value."""
    v = v.abs()
    upper, lower = (torch.erfc((v + side) / scale * math.sqrt(0.5)) for side in (-0.5, 0.5))
    return -lower_bound(0.5 * (upper - lower), 1e-9).log2()


def gaussian_weights(scale: float) -> list[int]:
    """Whole-number weights, for the entropy coder, of 0, 1, …, reach and of everything beyond ±reach.

    The weight of -v is that of v. None is closer to a rounding boundary than any error function's error: every machine
    computes the same.
    """
    edges = [math.erfc((k - 0.5) / scale * math.sqrt(0.5)) / 2 for k in range(table_reach(scale) + 2)]
    masses = [1 - 2 * edges[1], *(a - b for a, b in pairwise(edges[1:])), 2 * edges[-1]]
    return [max(1, round(mass * TABLE_TOTAL)) for mass in masses]


def table_reach(scale: float) -> int:
    """The largest symbol with a weight of its own; larger ones are escaped."""
    return math.ceil(5 * scale) + 1


def convolve_by_products(x: Tensor, weight: Tensor, bias: Tensor, padding: Any) -> Tensor:
    """`F.conv2d` of stride 1 as matrix products, which ONNX Runtime has in float64 too."""
    rows, columns = x.shape[2:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    total = bias[:, None]
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            total = total + weight[:, :, i, j] @ x[:, :, i : i + rows, j : j + columns].flatten(2)
    return total.unflatten(2, (rows, columns))


class ExactConv2d(nn.Conv2d):
    """Convolution of fixed-point numbers with fixed-point weights; the result is rounded to FRACTION_BITS.

    In `eval()` it is exact, in float64. In `train()` the same in float32, with straight-through gradients.
    """

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self.training else torch.float64
        weight, bias = (fixed_point(p.to(dtype), WEIGHT_BITS, WEIGHT_LIMIT) for p in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            convolve = convolve_by_products if torch.compiler.is_exporting() else F.conv2d
            x = convolve(x.to(dtype), weight, bias, padding=self.padding)
        return fixed_point(x, FRACTION_BITS, ACTIVATION_LIMIT)


class ParameterHead(ExactConv2d):
    """Features -> means and scales. It starts at zero: all means 0, all scales equal."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class QualityTable(nn.Embedding):
    """Parameters at QUALITY_ANCHORS qualities, interpolated: levels (batch,) -> (batch, values, 1, 1).

    A table, so that Muon, which is for matrices, leaves it to AdamW.
    """

    def __init__(self, first: list[float], values: int) -> None:
        self.first = first
        super().__init__(QUALITY_ANCHORS, values)

    def reset_parameters(self) -> None:
        init.copy_(self.weight, torch.tensor(self.first)[:, None].expand_as(self.weight))

    def forward(self, level: Tensor, exact: bool = False) -> Tensor:
        """`exact`: in fixed-point numbers, float64; else float32."""
        table = fixed_point(self.weight.double(), WEIGHT_BITS, WEIGHT_LIMIT) if exact else self.weight.float()
        span = QUALITY_LEVELS // (QUALITY_ANCHORS - 1)
        low = (level // span).clamp(max=QUALITY_ANCHORS - 2)
        fraction = ((level - low * span).to(table.dtype) / span)[:, None]
        return (table[low] * (1 - fraction) + table[low + 1] * fraction)[:, :, None, None]


class FactorizedPrior(nn.Module):
    """What is known of hyper-latents before anything is read: for each channel a mixture of three logistics."""

    table: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.location, self.log_scale, self.logit = (nn.Parameter(torch.empty(3 * channels)) for _ in range(3))
        self.register_buffer("table", torch.ones(channels, 2 * HYPER_LIMIT + 1, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_scale)
        nn.init.zeros_(self.logit)
        init.copy_(self.location, torch.tensor([-3.0, 0.0, 3.0]).repeat(self.channels))
        nn.init.ones_(self.table)

    def probability(self, z: Tensor) -> Tensor:
        """Probability of z ± ½ for each channel: (channels, …) -> (channels, …)."""
        shape = (self.channels, *[1] * (z.ndim - 1), 3)
        location = self.location.to(z.dtype).view(shape)
        scale = self.log_scale.float().exp().to(z.dtype).view(shape)
        weight = self.logit.to(z.dtype).view(shape).softmax(-1)
        distance = (z[..., None] - location).abs()
        masses = torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale)
        return (masses * weight).sum(-1)

    def bits(self, z: Tensor) -> Tensor:
        """-log2 of the probability, value by value, of (batch, channels, height, width)."""
        return -lower_bound(self.probability(z.transpose(0, 1)), 1e-9).log2().transpose(0, 1)

    @torch.no_grad()
    def update_table(self) -> None:
        """Whole-number weights of the symbols -HYPER_LIMIT … HYPER_LIMIT, for the entropy coder."""
        symbols = torch.arange(-HYPER_LIMIT, HYPER_LIMIT + 1, dtype=torch.float64, device=self.logit.device)
        masses = self.probability(symbols.expand(self.channels, -1))
        self.table.copy_((masses * TABLE_TOTAL).round().clamp(min=1))


class Quantized(NamedTuple):
    """What quantization and the entropy model make of latents (batch, channels, height, width)."""

    values: Tensor
    """What the decoder gets, in quantization steps: symbols + means. Like the latents."""
    symbols: Tensor
    """Whole numbers (in training: with the uniform noise that stands for rounding). Like the latents."""
    scale_index: Tensor
    """Which of SCALES each symbol is coded with. Like the latents."""
    hyper_symbols: Tensor
    """Whole numbers (batch, hyper-channels, ⌈height/4⌉, ⌈width/4⌉)."""
    bits: Tensor
    """Bits of the symbols of each image, as the model estimates them: (batch,)."""
    hyper_bits: Tensor
    """Bits of the hyper-latents, likewise."""


class HyperConv(nn.Module):
    """Exact convolution, doubling of height and width by a 1×1 convolution, ReLU.

    (batch, inputs, height, width) -> (batch, outputs, 2·height, 2·width); `bias` is added to the convolution's output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.twice = ExactConv2d(inputs, outputs, 3, padding=1), ExactConv2d(outputs, 4 * outputs, 1)

    def forward(self, x: Tensor, bias: Tensor | float) -> Tensor:
        x = fixed_point(self.conv(x) + bias, FRACTION_BITS, ACTIVATION_LIMIT).relu()
        return F.pixel_shuffle(self.twice(x), 2).relu()


class Hyperprior(nn.Module):
    """Mean and scale of each value of the latents, from hyper-latents and from neighbours that are already known.

    ```
    latents -> hyper-encoder -> round -> hyper-decoder -> features -> means, scales of every fourth position
                                  |                          |
                         factorized prior                    + known neighbours -> of the next fourth, then of the rest
    ```

    Scale hyperprior: Ballé et al. 2018; means: Minnen et al. 2018; neighbours: the checkerboard of He et al. 2021, in
    three steps. The latents are in quantization steps.
    """

    def __init__(self, channels: int, hidden: int, hyper_channels: int) -> None:
        super().__init__()
        self.hyper_encoder = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(hidden, hyper_channels, 3, 2, 1),
        )  # fmt: skip
        self.quality_bias = QualityTable([0.0] * QUALITY_ANCHORS, hidden)
        self.hyper_decoder = nn.ModuleList([HyperConv(hyper_channels, hidden), HyperConv(hidden, hidden)])
        self.last = ExactConv2d(hidden, hidden, 3, padding=1)
        self.neighbours = ExactConv2d(channels, hidden, 3, padding=1)
        self.mix = ExactConv2d(hidden, hidden, 1)
        self.heads = nn.ModuleList(ParameterHead(hidden, 2 * channels, 1) for _ in range(STEPS))
        self.prior = FactorizedPrior(hyper_channels)

    def forward(self, latents: Tensor, level: Tensor) -> Quantized:
        """`latents` float32 in quantization steps, at quality levels (batch,)."""
        height, width = latents.shape[2:]
        z = self.hyper_latents(latents)
        hyper_symbols = round_straight_through(z)
        features = self.features(hyper_symbols, level, height, width)
        latents = latents.to(features.dtype)
        values = symbols = mean = index = torch.zeros_like(latents)
        for step in range(STEPS):
            coded = positions_of(height, width, step, latents.device)
            new_mean, new_index = self.parameters_of(features, values, step)
            v = latents - new_mean
            new_symbols = round_straight_through(v) if self.training else economical_round(v, scale_of(new_index))
            values = torch.where(coded, new_mean + new_symbols, values)
            symbols = torch.where(coded, new_symbols, symbols)
            mean = torch.where(coded, new_mean, mean)
            index = torch.where(coded, new_index, index)
        noisy_z = hyper_symbols
        if self.training:
            symbols = latents - mean + torch.rand_like(latents) - 0.5
            noisy_z = z + torch.rand_like(z) - 0.5
        bits = gaussian_bits(symbols.float(), scale_of(index)).flatten(1).sum(1)
        return Quantized(values, symbols, index, hyper_symbols, bits, self.prior.bits(noisy_z).flatten(1).sum(1))

    def hyper_latents(self, latents: Tensor) -> Tensor:
        """(batch, hyper-channels, ⌈height/4⌉, ⌈width/4⌉), float32, before rounding."""
        height, width = latents.shape[2:]
        padded = F.pad(latents, (0, -width % 4, 0, -height % 4), mode="replicate")
        dtype = next(self.hyper_encoder.parameters()).dtype
        return self.hyper_encoder(padded.asinh().to(dtype)).float().clamp(-HYPER_LIMIT, HYPER_LIMIT)

    def features(self, hyper_symbols: Tensor, level: Tensor, height: int, width: int) -> Tensor:
        """What the hyper-latents tell of each position of the latents: (batch, hidden, height, width), exact in
        `eval()`."""
        bias = self.quality_bias(level, exact=not self.training)
        x = self.hyper_decoder[0](hyper_symbols, bias)
        return self.last(self.hyper_decoder[1](x, 0))[..., :height, :width]

    def parameters_of(self, features: Tensor, known: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Means (in quantization steps) and indices of scales. `known`: the values of earlier steps, zero elsewhere.

        Valid at the `positions_of` this step. In `train()` indices are real numbers, for their gradient.
        """
        if step > 0:
            known = fixed_point(known, FRACTION_BITS, ACTIVATION_LIMIT)
            features = self.mix((features + self.neighbours(known)).relu())
        mean, index = self.heads[step](features.relu()).chunk(2, 1)
        index = (16 + 32 * index).clamp(max=len(SCALES) - 1)
        index = lower_bound(index, 0.0) if self.training else torch.floor(index.clamp(min=0) + 0.5)
        return 8 * mean, index


def positions_of(height: int, width: int, step: int, device: torch.device | None = None) -> Tensor:
    """Where a step codes, booleans (height, width). Step 0: even rows and columns. 1: odd rows and columns. 2: the
    rest."""
    rows, columns = torch.arange(height, device=device)[:, None] % 2, torch.arange(width, device=device) % 2
    return (rows != columns) if step == 2 else (rows == columns) & (rows == step)
