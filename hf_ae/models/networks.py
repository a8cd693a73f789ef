"""Encoders and decoders: mlp, conv, resnet, transform.

An encoder maps `pixel_values` (batch, channels, height, width) to `(latents, positions)`: the latents before the
bottleneck, and the positions that max-pooling remembered, finest first (an empty list where there are none). It adds
the output of each of its layers to `hidden_states`, where that is a list. A decoder maps latents and such positions to
logits of the shape of `pixel_values`. With `latent_channels` the convolutional networks take any size that divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .blocks import ACTIVATIONS, ResBlock, group_norm, run_layers
from .configuration_autoencoder import AutoencoderConfig
from .transform_network import TransformDecoder, TransformEncoder


def build_encoder(config: AutoencoderConfig, outputs_per_latent: int = 1) -> nn.Module:
    """The encoder that `config` asks for, with `outputs_per_latent` outputs for each value of the latents."""
    kinds = {"mlp": MLPEncoder, "conv": ConvEncoder, "resnet": ResnetEncoder, "transform": TransformEncoder}
    return kinds[config.network](config, outputs_per_latent)


def build_decoder(config: AutoencoderConfig) -> nn.Module:
    """The mirrored decoder."""
    kinds = {"mlp": MLPDecoder, "conv": ConvDecoder, "resnet": ResnetDecoder, "transform": TransformDecoder}
    return kinds[config.network](config)


class MLPLayer(GradientCheckpointingLayer):
    """activation(linear(·)): (batch, inputs) -> (batch, outputs)."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class LastLinear(GradientCheckpointingLayer, nn.Linear):
    """A linear layer: where it is the only layer, gradient checkpointing has one to compute again."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MLPEncoder(nn.Module):
    """pixels -> hidden_sizes -> latents"""

    def __init__(self, config: AutoencoderConfig, outputs_per_latent: int) -> None:
        super().__init__()
        widths = [config.num_pixels, *config.hidden_sizes]
        self.layers = nn.Sequential(*(MLPLayer(a, b, config.activation) for a, b in pairwise(widths)))
        self.to_code = LastLinear(widths[-1], config.latent_shape[0] * outputs_per_latent)

    def forward(self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        return run_layers([*self.layers, self.to_code], pixel_values.flatten(1), hidden_states), []


class MLPDecoder(nn.Module):
    """latents -> reversed hidden_sizes -> pixels"""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.latent_shape[0], *reversed(config.hidden_sizes)]
        self.image_shape = (config.num_channels, *config.image_hw)
        self.layers = nn.Sequential(*(MLPLayer(a, b, config.activation) for a, b in pairwise(widths)))
        self.to_pixels = nn.Linear(widths[-1], config.num_pixels)

    def forward(self, latents: Tensor, positions: Sequence[Tensor] = ()) -> Tensor:
        return self.to_pixels(self.layers(latents)).unflatten(1, self.image_shape)


class ConvDown(GradientCheckpointingLayer):
    """Halve height and width, by a stride of 2 or by max-pooling after the convolution.

    (batch, inputs, height, width) -> (batch, outputs, height / 2, width / 2), and the positions of the maxima in the
    same shape where the decoder unpools, else None.
    """

    def __init__(self, inputs: int, outputs: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.pool = config.downsample == "maxpool"
        self.remember = config.upsample == "unpool"
        kernel, stride = (3, 1) if self.pool else (4, 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.activation(self.conv(x))
        if self.remember:
            return F.max_pool2d(x, 2, return_indices=True)
        return (F.max_pool2d(x, 2) if self.pool else x), None


class ConvUp(GradientCheckpointingLayer):
    """Double height and width. Without remembered positions, unpooling writes to each window's upper left corner."""

    def __init__(self, inputs: int, outputs: int, config: AutoencoderConfig, last: bool) -> None:
        super().__init__()
        self.how = config.upsample
        self.conv: nn.Module
        if self.how == "transpose":
            self.conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        else:
            self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.activation = nn.Identity() if last else ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.how == "nearest":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.how == "unpool":
            x = F.max_unpool2d(x, upper_left(x) if positions is None else positions, [2, 2])
        return self.activation(self.conv(x))


def upper_left(x: Tensor) -> Tensor:
    """Positions, as max-pooling counts them, of the upper left corner of each 2×2 window, in the shape of `x`."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device)[:, None] * 2
    return (rows * width * 2 + torch.arange(width, device=x.device) * 2).expand(x.shape)


class FromFeatures(nn.Module):
    """Last feature map -> latents: a linear layer for vector latents, a 1×1 convolution for spatial ones."""

    def __init__(self, config: AutoencoderConfig, channels: int, outputs_per_latent: int) -> None:
        super().__init__()
        outputs = config.latent_shape[0] * outputs_per_latent
        self.project: nn.Module
        if config.latent_dim is None:
            self.project = nn.Conv2d(channels, outputs, 1)
        else:
            positions = math.prod(config.image_hw) // config.downsampling**2
            self.project = nn.Sequential(nn.Flatten(), nn.Linear(channels * positions, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)


class ToFeatures(nn.Module):
    """Latents -> first feature map of the decoder."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.project: nn.Module
        if config.latent_dim is None:
            self.project = nn.Conv2d(config.latent_shape[0], channels, 1)
        else:
            shape = (channels, *(size // config.downsampling for size in config.image_hw))
            self.project = nn.Sequential(nn.Linear(config.latent_dim, math.prod(shape)), nn.Unflatten(1, shape))

    def forward(self, latents: Tensor) -> Tensor:
        return self.project(latents)


class ConvEncoder(nn.Module):
    """pixels -> (convolution, halve) for each of hidden_sizes -> latents"""

    def __init__(self, config: AutoencoderConfig, outputs_per_latent: int) -> None:
        super().__init__()
        channels = [config.num_channels, *config.hidden_sizes]
        self.layers = nn.ModuleList(ConvDown(a, b, config) for a, b in pairwise(channels))
        self.to_code = FromFeatures(config, channels[-1], outputs_per_latent)

    def forward(self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        x, remembered = pixel_values, []
        for layer in self.layers:
            x, positions = layer(x)
            if positions is not None:
                remembered.append(positions)
            if hidden_states is not None:
                hidden_states.append(x)
        return run_layers([self.to_code], x, hidden_states), remembered


class ConvDecoder(nn.Module):
    """latents -> (double, convolution) for each of reversed hidden_sizes -> pixels"""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = [*reversed(config.hidden_sizes), config.num_channels]
        last = len(channels) - 2
        self.from_code = ToFeatures(config, channels[0])
        self.activation = ACTIVATIONS[config.activation]()
        self.layers = nn.ModuleList(
            ConvUp(a, b, config, last=level == last) for level, (a, b) in enumerate(pairwise(channels))
        )

    def forward(self, latents: Tensor, positions: Sequence[Tensor] = ()) -> Tensor:
        x = self.activation(self.from_code(latents))
        coarsest_first = list(reversed(positions)) if positions else [None] * len(self.layers)
        for layer, remembered in zip(self.layers, coarsest_first):
            x = layer(x, remembered)
        return x


def residual_levels(
    config: AutoencoderConfig, channels: list[int], between: Callable[[int], nn.Module]
) -> nn.Sequential:
    """The residual blocks of each level, with the layer `between(channels)` before each level but the first."""
    layers = nn.Sequential()
    for before, width in pairwise([channels[0], *channels]):
        if len(layers) > 0:
            layers.append(between(before))
        widths = [before] + [width] * (config.num_res_blocks or 1)
        layers.extend(ResBlock(a, b, config.activation) for a, b in pairwise(widths))
    return layers


def halve(channels: int) -> nn.Module:
    """Half the height and width, by a convolution."""
    return nn.Conv2d(channels, channels, 3, 2, 1)


def double(channels: int) -> nn.Module:
    """Twice the height and width, by nearest neighbours and a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1))


class ResnetEncoder(nn.Module):
    """pixels -> stem (on patches) -> residual blocks, halving between levels -> norm -> latents"""

    def __init__(self, config: AutoencoderConfig, outputs_per_latent: int) -> None:
        super().__init__()
        channels = config.hidden_sizes
        self.patch_size = config.patch_size or 1
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[0], 3, padding=1)
        self.layers = residual_levels(config, channels, halve)
        self.norm, self.activation = group_norm(channels[-1]), ACTIVATIONS[config.activation]()
        self.to_code = FromFeatures(config, channels[-1], outputs_per_latent)

    def forward(self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        patches = F.pixel_unshuffle(pixel_values, self.patch_size)
        x = self.activation(self.norm(run_layers([self.stem, *self.layers], patches, hidden_states)))
        return run_layers([self.to_code], x, hidden_states), []


class ResnetDecoder(nn.Module):
    """latents -> residual blocks, doubling between levels -> norm -> pixels"""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = list(reversed(config.hidden_sizes))
        self.from_code = ToFeatures(config, channels[0])
        self.layers = residual_levels(config, channels, double)
        self.norm, self.activation = group_norm(channels[-1]), ACTIVATIONS[config.activation]()
        self.patch_size = config.patch_size or 1
        self.to_pixels = nn.Conv2d(channels[-1], config.num_channels * self.patch_size**2, 3, padding=1)

    def forward(self, latents: Tensor, positions: Sequence[Tensor] = ()) -> Tensor:
        x = self.layers(self.from_code(latents))
        return F.pixel_shuffle(self.to_pixels(self.activation(self.norm(x))), self.patch_size)
