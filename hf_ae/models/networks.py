"""Encoders and decoders: mlp, conv, resnet, transform.

An encoder maps `pixel_values` (batch, channels, height, width) to `(code, positions)`: the code before the bottleneck,
and the positions that max-pooling remembered, finest first (an empty list where there are none). A decoder maps a code
and such positions to logits of the shape of `pixel_values`. With `latent_channels` the convolutional networks take any
size that divides.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}


def build_encoder(config, values_per_code: int = 1) -> nn.Module:
    """The encoder that `config` asks for, with `values_per_code` outputs for each value of the code."""
    kinds = {"mlp": MLPEncoder, "conv": ConvEncoder, "resnet": ResnetEncoder, "transform": TransformEncoder}
    return kinds[config.network](config, values_per_code)


def build_decoder(config) -> nn.Module:
    """The mirrored decoder."""
    kinds = {"mlp": MLPDecoder, "conv": ConvDecoder, "resnet": ResnetDecoder, "transform": TransformDecoder}
    return kinds[config.network](config)


class MLPLayer(GradientCheckpointingLayer):
    def __init__(self, inputs: int, outputs: int, activation: str):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x):
        return self.activation(self.linear(x))


class MLPEncoder(nn.Module):
    """pixels -> hidden_sizes -> code"""

    gradient_checkpointing = False  # with no hidden layer there is nothing to compute again, and that is no error

    def __init__(self, config, values_per_code: int):
        super().__init__()
        widths = [config.num_pixels, *config.hidden_sizes]
        self.layers = nn.ModuleList(MLPLayer(a, b, config.activation) for a, b in pairwise(widths))
        self.to_code = nn.Linear(widths[-1], config.latent_dim * values_per_code)

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.to_code(x), []


class MLPDecoder(nn.Module):
    """code -> reversed hidden_sizes -> pixels"""

    def __init__(self, config):
        super().__init__()
        widths = [config.latent_dim, *reversed(config.hidden_sizes)]
        self.image_shape = (config.num_channels, *config.image_hw)
        self.layers = nn.ModuleList(MLPLayer(a, b, config.activation) for a, b in pairwise(widths))
        self.to_pixels = nn.Linear(widths[-1], config.num_pixels)

    def forward(self, code, positions=()):
        for layer in self.layers:
            code = layer(code)
        return self.to_pixels(code).unflatten(1, self.image_shape)


class ConvDown(GradientCheckpointingLayer):
    """Halve height and width, by a stride of 2 or by max-pooling after the convolution."""

    def __init__(self, inputs: int, outputs: int, config):
        super().__init__()
        self.pool = config.downsample == "maxpool"
        self.remember = config.upsample == "unpool"
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1) if self.pool else nn.Conv2d(inputs, outputs, 4, 2, 1)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x):
        x = self.activation(self.conv(x))
        if self.remember:
            return F.max_pool2d(x, 2, return_indices=True)
        return (F.max_pool2d(x, 2) if self.pool else x), None


class ConvUp(GradientCheckpointingLayer):
    """Double height and width. Without remembered positions, unpooling writes to each window's upper left corner."""

    def __init__(self, inputs: int, outputs: int, config, last: bool):
        super().__init__()
        self.how = config.upsample
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1) if self.how == "transpose" else nn.Conv2d(inputs, outputs, 3, padding=1)
        self.activation = nn.Identity() if last else ACTIVATIONS[config.activation]()

    def forward(self, x, positions=None):
        if self.how == "nearest":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.how == "unpool":
            x = F.max_unpool2d(x, upper_left(x) if positions is None else positions, [2, 2])
        return self.activation(self.conv(x))


def upper_left(x: torch.Tensor) -> torch.Tensor:
    """Positions, as max-pooling counts them, of the upper left corner of each 2×2 window."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device)[:, None] * 2
    return (rows * width * 2 + torch.arange(width, device=x.device) * 2).expand(x.shape)


class FromFeatures(nn.Module):
    """Last feature map -> code: a linear layer for a vector, a 1×1 convolution for a spatial code."""

    def __init__(self, config, channels: int, values_per_code: int):
        super().__init__()
        self.project: nn.Module
        if config.latent_dim is None:
            self.project = nn.Conv2d(channels, config.latent_channels * values_per_code, 1)
        else:
            positions = math.prod(config.image_hw) // config.downsampling**2
            self.project = nn.Sequential(nn.Flatten(), nn.Linear(channels * positions, config.latent_dim * values_per_code))

    def forward(self, x):
        return self.project(x)


class ToFeatures(nn.Module):
    """Code -> first feature map of the decoder."""

    def __init__(self, config, channels: int):
        super().__init__()
        self.project: nn.Module
        if config.latent_dim is None:
            self.project = nn.Conv2d(config.latent_channels, channels, 1)
        else:
            shape = (channels, *(size // config.downsampling for size in config.image_hw))
            self.project = nn.Sequential(nn.Linear(config.latent_dim, math.prod(shape)), nn.Unflatten(1, shape))

    def forward(self, code):
        return self.project(code)


class ConvEncoder(nn.Module):
    """pixels -> (convolution, halve) for each of hidden_sizes -> code"""

    def __init__(self, config, values_per_code: int):
        super().__init__()
        channels = [config.num_channels, *config.hidden_sizes]
        self.layers = nn.ModuleList(ConvDown(a, b, config) for a, b in pairwise(channels))
        self.to_code = FromFeatures(config, channels[-1], values_per_code)

    def forward(self, x):
        remembered = []
        for layer in self.layers:
            x, positions = layer(x)
            if positions is not None:
                remembered.append(positions)
        return self.to_code(x), remembered


class ConvDecoder(nn.Module):
    """code -> (double, convolution) for each of reversed hidden_sizes -> pixels"""

    def __init__(self, config):
        super().__init__()
        channels = [*reversed(config.hidden_sizes), config.num_channels]
        pairs = list(pairwise(channels))
        self.from_code = ToFeatures(config, channels[0])
        self.activation = ACTIVATIONS[config.activation]()
        self.layers = nn.ModuleList(ConvUp(a, b, config, last=i == len(pairs) - 1) for i, (a, b) in enumerate(pairs))

    def forward(self, code, positions=()):
        x = self.activation(self.from_code(code))
        remembered = list(positions) or [None] * len(self.layers)
        for layer, where in zip(self.layers, reversed(remembered)):
            x = layer(x, where)
        return x


class ResBlock(GradientCheckpointingLayer):
    """x + convolution(activation(norm(·))) twice, with a 1×1 shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, activation: str, norm=None):
        super().__init__()
        norm = norm or group_norm
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.activation = ACTIVATIONS[activation]()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.conv1(self.activation(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.activation(self.norm2(y)))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 32), channels, eps=1e-6)


class ResnetEncoder(nn.Module):
    """pixels -> stem (on patches) -> residual blocks, halving between levels -> norm -> code"""

    def __init__(self, config, values_per_code: int):
        super().__init__()
        channels = config.hidden_sizes
        self.patch_size = config.patch_size
        self.stem = nn.Conv2d(config.num_channels * config.patch_size**2, channels[0], 3, padding=1)
        self.layers = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            if level:
                self.layers.append(nn.Conv2d(before, before, 3, 2, 1))
            for block in range(config.num_res_blocks):
                self.layers.append(ResBlock(before if block == 0 else width, width, config.activation))
        self.norm, self.activation = group_norm(channels[-1]), ACTIVATIONS[config.activation]()
        self.to_code = FromFeatures(config, channels[-1], values_per_code)

    def forward(self, x):
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))
        for layer in self.layers:
            x = layer(x)
        return self.to_code(self.activation(self.norm(x))), []


class ResnetDecoder(nn.Module):
    """code -> residual blocks, doubling between levels -> norm -> pixels"""

    def __init__(self, config):
        super().__init__()
        channels = list(reversed(config.hidden_sizes))
        self.from_code = ToFeatures(config, channels[0])
        self.layers = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            if level:
                self.layers.append(nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(before, before, 3, padding=1)))
            for block in range(config.num_res_blocks):
                self.layers.append(ResBlock(before if block == 0 else width, width, config.activation))
        self.norm, self.activation = group_norm(channels[-1]), ACTIVATIONS[config.activation]()
        self.patch_size = config.patch_size
        self.to_pixels = nn.Conv2d(channels[-1], config.num_channels * config.patch_size**2, 3, padding=1)

    def forward(self, code, positions=()):
        x = self.from_code(code)
        for layer in self.layers:
            x = layer(x)
        return F.pixel_shuffle(self.to_pixels(self.activation(self.norm(x))), self.patch_size)


class DCT(nn.Module):
    """The lowest frequencies of each patch: an orthonormal DCT-II over channels, rows and columns, and its transpose.

    pixels (batch, channels, height, width) <-> (batch, values, height / side, width / side). The frequencies with the smallest
    (row² + column²)·(1 + 3·[not the mean of the channels]) come first. Fixed: it has no weights.
    """

    def __init__(self, channels: int, side: int, values: int):
        super().__init__()
        self.shape, self.values = (channels, side, side), values

    def basis(self, like: torch.Tensor) -> torch.Tensor:
        """(values, pixels of a patch, 1, 1); rows beyond the number of frequencies are zero."""
        c, u, v = torch.meshgrid(*(torch.arange(n) for n in self.shape), indexing="ij")
        order = ((u**2 + v**2) * torch.where(c > 0, 4, 1)).flatten().argsort(stable=True)[: self.values]
        rows = torch.einsum("ax,by,cz->abcxyz", *(dct_matrix(n) for n in self.shape)).flatten(3).flatten(0, 2)[order]
        return F.pad(rows, (0, 0, 0, self.values - len(rows)))[:, :, None, None].to(like)

    def forward(self, pixels):
        return F.conv2d(F.pixel_unshuffle(pixels, self.shape[1]), self.basis(pixels))

    def inverse(self, code):
        return F.pixel_shuffle(F.conv_transpose2d(code, self.basis(code)), self.shape[1])


def dct_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II: row k is the frequency k."""
    k, n = torch.arange(size)[:, None], torch.arange(size)
    rows = torch.cos(math.pi / size * (n + 0.5) * k) * math.sqrt(2 / size)
    rows[0] = math.sqrt(1 / size)
    return rows


class PositionNorm(nn.Module):
    """x / √(0.01 + mean of x² over channels), position by position: what lies far away, or in another tile, has no influence.

    The division of GDN (Ballé et al. 2016), with fixed weights.
    """

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 0.01)


def transform_blocks(inputs: int, outputs: int, config) -> list[nn.Module]:
    return [ResBlock(inputs if block == 0 else outputs, outputs, config.activation, PositionNorm) for block in range(config.num_res_blocks)]


class ZeroConv2d(nn.Conv2d):
    """A 1×1 convolution that starts at zero."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TransformEncoder(nn.Module):
    """pixels -> DCT of patches + (stem -> residual blocks, halving between levels) -> code

    The analysis transform of transform coding. It starts as the DCT alone: the residual part starts at zero.
    """

    def __init__(self, config, values_per_code: int):
        super().__init__()
        channels, values = config.hidden_sizes, config.latent_channels * values_per_code
        self.patch_size = config.patch_size
        self.dct = DCT(config.num_channels, config.downsampling, values)
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[0], 3, padding=1)
        self.layers = nn.ModuleList(transform_blocks(channels[0], channels[0], config))
        for before, width in pairwise(channels):
            self.layers.append(nn.Conv2d(before, width, 3, 2, 1))
            self.layers.extend(transform_blocks(width, width, config))
        self.activation = ACTIVATIONS[config.activation]()
        self.to_code = ZeroConv2d(channels[-1], values)

    def forward(self, x):
        code = self.dct(x)
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))
        for layer in self.layers:
            x = layer(x)
        return code + self.to_code(self.activation(x)), []


class TransformDecoder(nn.Module):
    """code -> inverse DCT + (residual blocks, doubling between levels; the last also sees the inverse DCT) -> pixels"""

    def __init__(self, config):
        super().__init__()
        channels, values = list(reversed(config.hidden_sizes)), config.latent_channels
        self.patch_size = config.patch_size
        self.dct = DCT(config.num_channels, config.downsampling, values)
        self.from_code = nn.Conv2d(values, channels[0], 1)
        self.layers = nn.ModuleList()
        for before, width in pairwise(channels):
            self.layers.extend(transform_blocks(before, before, config))
            self.layers.append(nn.Sequential(nn.Conv2d(before, 4 * width, 1), nn.PixelShuffle(2)))
        self.last_layers = nn.ModuleList(transform_blocks(channels[-1], channels[-1], config))
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[-1], 3, padding=1)
        self.activation = ACTIVATIONS[config.activation]()
        self.to_pixels = ZeroConv2d(channels[-1], config.num_channels * self.patch_size**2)

    def forward(self, code, positions=()):
        pixels = self.dct.inverse(code)
        x = self.from_code(code)
        for layer in self.layers:
            x = layer(x)
        x = x + self.stem(F.pixel_unshuffle(pixels, self.patch_size))
        for layer in self.last_layers:
            x = layer(x)
        return pixels + F.pixel_shuffle(self.to_pixels(self.activation(x)), self.patch_size)
