"""The `transform` network: a fixed DCT of patches plus residual blocks, as in transform coding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ACTIVATIONS, ResBlock, run_layers
from .configuration_autoencoder import AutoencoderConfig


class DCT(nn.Module):
    """The lowest frequencies of each patch: an orthonormal DCT-II over channels, rows and columns, and its transpose.

    pixels (batch, channels, height, width) <-> (batch, values, height / side, width / side). The frequencies with the
    smallest (row² + column²)·(1 + 3·[not the mean of the channels]) come first. Fixed: it has no weights.
    """

    def __init__(self, channels: int, side: int, values: int) -> None:
        super().__init__()
        self.shape, self.values = (channels, side, side), values

    def basis(self, like: Tensor) -> Tensor:
        """(values, pixels of a patch, 1, 1), of the dtype and on the device of `like`; rows beyond the number of
        frequencies are zero."""
        places = list(itertools.product(*map(range, self.shape)))
        cost = [(row**2 + column**2) * (4 if channel else 1) for channel, row, column in places]
        order = sorted(range(len(places)), key=cost.__getitem__)[: self.values]
        products = torch.einsum("ax,by,cz->abcxyz", *(dct_matrix(size) for size in self.shape))
        rows = products.flatten(3).flatten(0, 2)[order]
        return F.pad(rows, (0, 0, 0, self.values - len(rows)))[:, :, None, None].to(like)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.conv2d(F.pixel_unshuffle(pixels, self.shape[1]), self.basis(pixels))

    def inverse(self, latents: Tensor) -> Tensor:
        """The transpose: latents -> pixels."""
        return F.pixel_shuffle(F.conv_transpose2d(latents, self.basis(latents)), self.shape[1])


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II (size, size): row k is the frequency k."""
    k, n = torch.arange(size)[:, None], torch.arange(size)
    rows = torch.cos(math.pi / size * (n + 0.5) * k) * math.sqrt(2 / size)
    rows[0] = math.sqrt(1 / size)
    return rows


class PositionNorm(nn.Module):
    """x / √(0.01 + mean of x² over channels) at each position: other positions, and other tiles, have no influence.

    The division of GDN (Ballé et al. 2016), with fixed weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 0.01)


def transform_blocks(config: AutoencoderConfig, channels: int) -> list[ResBlock]:
    """The residual blocks of one level."""
    blocks = range(config.num_res_blocks or 1)
    return [ResBlock(channels, channels, config.activation, PositionNorm) for _ in blocks]


class ZeroConv2d(nn.Conv2d):
    """A 1×1 convolution that starts at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class TransformEncoder(nn.Module):
    """pixels -> DCT of patches + (stem -> residual blocks, halving between levels) -> latents

    The analysis transform of transform coding. It starts as the DCT alone: the residual part starts at zero.
    """

    def __init__(self, config: AutoencoderConfig, outputs_per_latent: int) -> None:
        super().__init__()
        channels, values = config.hidden_sizes, config.latent_shape[0] * outputs_per_latent
        self.patch_size = config.patch_size or 1
        self.dct = DCT(config.num_channels, config.downsampling, values)
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[0], 3, padding=1)
        self.layers = nn.Sequential(*transform_blocks(config, channels[0]))
        for before, width in pairwise(channels):
            self.layers.append(nn.Conv2d(before, width, 3, 2, 1))
            self.layers.extend(transform_blocks(config, width))
        self.activation = ACTIVATIONS[config.activation]()
        self.to_code = ZeroConv2d(channels[-1], values)

    def forward(self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        patches = F.pixel_unshuffle(pixel_values, self.patch_size)
        x = run_layers([self.stem, *self.layers], patches, hidden_states)
        latents = self.dct(pixel_values) + self.to_code(self.activation(x))
        if hidden_states is not None:
            hidden_states.append(latents)
        return latents, []


class TransformDecoder(nn.Module):
    """latents -> inverse DCT + (residual blocks, doubling between levels) -> pixels

    The blocks of the last level also see the inverse DCT.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, values = list(reversed(config.hidden_sizes)), config.latent_shape[0]
        self.patch_size = config.patch_size or 1
        self.dct = DCT(config.num_channels, config.downsampling, values)
        self.from_code = nn.Conv2d(values, channels[0], 1)
        self.layers = nn.Sequential()
        for before, width in pairwise(channels):
            self.layers.extend(transform_blocks(config, before))
            self.layers.append(nn.Sequential(nn.Conv2d(before, 4 * width, 1), nn.PixelShuffle(2)))
        self.last_layers = nn.Sequential(*transform_blocks(config, channels[-1]))
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[-1], 3, padding=1)
        self.activation = ACTIVATIONS[config.activation]()
        self.to_pixels = ZeroConv2d(channels[-1], config.num_channels * self.patch_size**2)

    def forward(self, latents: Tensor, positions: Sequence[Tensor] = ()) -> Tensor:
        pixels = self.dct.inverse(latents)
        x = self.layers(self.from_code(latents)) + self.stem(F.pixel_unshuffle(pixels, self.patch_size))
        x = self.last_layers(x)
        return pixels + F.pixel_shuffle(self.to_pixels(self.activation(x)), self.patch_size)
