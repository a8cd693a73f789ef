"""Greedy layer-wise pretraining of deep fully connected autoencoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import require
from .arguments import TrainingArguments


def pretrain_layerwise(
    model: Any, pixels: Tensor, args: TrainingArguments, epochs: int, log: Callable[[str], Any] = print
) -> None:
    """Train each layer of an mlp, and its mirror in the decoder, as a shallow autoencoder on the activations below.

    After Bengio et al. 2007 (Hinton and Salakhutdinov 2006 used restricted Boltzmann machines). The bottom layer
    reconstructs `pixels`, uint8 (images, channels, height, width), through the decoder's sigmoid, the others the
    activations below, by squared error. Every layer gets so many epochs of Adam. All processes do the same work, from
    the same seed. Raises ValueError for another network, and where a layer does not learn.
    """
    config = model.config
    check_network(config)
    depth, (low, high) = len(config.hidden_sizes) + 1, config.pixel_range
    below = pixels.flatten(1).to(model.device).float().div_(255).mul_(high - low).add_(low)
    generator = torch.Generator(below.device).manual_seed(args.seed)
    for level in range(depth):
        encode, decode, parameters = level_functions(model, level, depth)
        optimizer = torch.optim.Adam(parameters, args.learning_rate)
        for _ in range(epochs):
            total, order = 0.0, torch.randperm(len(below), generator=generator, device=below.device)
            for rows in order.split(args.train_batch_size):
                x = below[rows]
                loss = F.mse_loss(decode(encode(x)), x, reduction="sum") / len(x)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(x)
        failed = f"Layer {level + 1} cannot be pretrained: its squared error is {total}. Try a lower --learning_rate."
        require(math.isfinite(total), failed)
        log(f"Pretrained layer {level + 1} of {depth}: squared error {total / len(below):.4f} per image.")
        with torch.no_grad():
            below = torch.cat([encode(x) for x in below.split(5000)])


def check_network(config: Any) -> None:
    """Raise ValueError unless a model of this configuration can be pretrained."""
    good = config.network == "mlp" and config.hidden_sizes
    require(good, "pretrain_layerwise_epochs needs network='mlp' with hidden_sizes.")


def level_functions(
    model: Any, level: int, depth: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], list[Tensor]]:
    """(encode, decode, parameters) of one layer of the encoder and its mirror in the decoder."""
    last, first = level == depth - 1, level == 0
    mirror = model.decoder.layers
    up = model.encoder.to_code if last else model.encoder.layers[level].linear
    down = model.decoder.to_pixels if first else mirror[len(mirror) - level].linear
    activation = model.encoder.layers[0].activation

    def encode(x: Tensor) -> Tensor:
        if last:  # of a Gaussian posterior only the mean takes part
            return model.latent_activation(up(x)[:, : model.config.latent_dim])
        return activation(up(x))

    def decode(latents: Tensor) -> Tensor:
        return model._to_pixels(down(latents)) if first else activation(down(latents))

    return encode, decode, [*up.parameters(), *down.parameters()]
