"""Greedy layer-wise pretraining of deep fully connected autoencoders."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def pretrain_layerwise(model, images, args, device, say=print):
    """Train each layer of an mlp, and its mirror in the decoder, as a shallow autoencoder on the codes below.

    After Bengio et al. 2007 (Hinton and Salakhutdinov 2006 used restricted Boltzmann machines). The bottom layer
    reconstructs pixels through the decoder's sigmoid, the others the activations below, by squared error. Every layer
    gets `args.pretrain_layerwise_epochs` epochs of Adam. All processes do the same work, from the same seed.
    """
    config = model.config
    if config.network != "mlp" or not config.hidden_sizes or not hasattr(images, "pixels"):
        raise ValueError("pretrain_layerwise_epochs needs network='mlp' with hidden_sizes, and images in memory (no --streaming).")
    depth = len(config.hidden_sizes) + 1
    low, high = config.pixel_range
    below = images.pixels.flatten(1).to(device).float().div_(255).mul_(high - low).add_(low)
    torch.manual_seed(args.seed)
    for level in range(depth):
        encode, decode, parameters = level_functions(model, level, depth)
        optimizer = torch.optim.Adam(parameters, args.learning_rate)
        for _ in range(args.pretrain_layerwise_epochs):
            total = 0.0
            for rows in torch.randperm(len(below), device=device).split(args.train_batch_size):
                x = below[rows]
                loss = F.mse_loss(decode(encode(x)), x, reduction="sum") / len(x)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(x)
        say(f"Pretrained layer {level + 1} of {depth}: squared error {total / len(below):.4f} per image.")
        with torch.no_grad():
            below = torch.cat([encode(x) for x in below.split(5000)])


def level_functions(model, level: int, depth: int):
    """(encode, decode, parameters) of one layer of the encoder and its mirror in the decoder."""
    last, first = level == depth - 1, level == 0
    to_code, mirror = model.encoder.to_code, model.decoder.layers
    up = to_code if last else model.encoder.layers[level].linear
    down = model.decoder.to_pixels if first else mirror[len(mirror) - level].linear
    activation = model.encoder.layers[0].activation

    def encode(x):
        if last:  # of a Gaussian posterior only the mean takes part
            return model.latent_activation(up(x)[:, : model.config.latent_dim])
        return activation(up(x))

    def decode(code):
        return model._to_pixels(down(code)) if first else activation(down(code))

    return encode, decode, [*up.parameters(), *down.parameters()]
