"""Discriminators of images and of latents, and the adversarial losses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchGAN(nn.Module):
    """pixels in [-1, 1] (batch, channels, height, width) -> logits of each patch being real, features.

    Isola et al. 2017: 4×4 convolutions that halve, with leaky ReLU, then one logit a position: (batch, 1,
    height / 2^levels, width / 2^levels). `features` is the last map before the logits. Group norm replaces their batch
    norm, with which an image's logits would depend on the others of its batch, and so on the number of processes.
    """

    def __init__(self, num_channels: int, hidden_sizes: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise([num_channels, *hidden_sizes])):
            layers.append(nn.Conv2d(inputs, outputs, 4, 2, 1))
            if level > 0:
                layers.append(nn.GroupNorm(math.gcd(outputs, 8), outputs))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        self.to_logits = nn.Conv2d(hidden_sizes[-1], 1, 3, padding=1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(pixels)
        return self.to_logits(features), features


class LatentDiscriminator(nn.Sequential):
    """latents (batch, latent_dim) -> (batch,): log q(z) / Π q(z_j), once it tells latents from those whose values were
    permuted over the batch, each on its own (Kim and Mnih 2018, section 3). As there six layers of leaky ReLU, of 256
    units instead of 1,000."""

    def __init__(self, latent_dim: int, width: int = 256, layers: int = 6) -> None:
        steps: list[nn.Module] = []
        for inputs in [latent_dim] + [width] * (layers - 1):
            steps += [nn.Linear(inputs, width), nn.LeakyReLU(0.2)]
        super().__init__(*steps, nn.Linear(width, 1), nn.Flatten(0))


def permuted(latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Latents (batch, latent_dim), each of their values from another image of the batch."""
    order = torch.rand(latents.shape, generator=generator, device=latents.device).argsort(0)
    return latents.gather(0, order)


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real and of generated images -> what the discriminator minimises, a scalar.

    hinge: ½E[max(0, 1 - real)] + ½E[max(0, 1 + fake)] (Lim and Ye 2017). non_saturating: the mean binary
    cross-entropy, in nats (Goodfellow et al. 2014).
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Logits of generated images -> what the generator minimises: -E[fake] (hinge) or -E[log sigmoid(fake)]."""
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


def frozen(module: nn.Module, *inputs: Tensor) -> Any:
    """`module(*inputs)` with gradients for the inputs, none for its weights."""
    weights = {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    return torch.func.functional_call(module, weights, inputs)


def adaptive_weight(reference: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """λ = ‖∇ reference‖ / (‖∇ adversarial‖ + 10⁻⁶), gradients at the weights of the decoder's last layer, at most 10⁴.

    Esser et al. 2021, equation 7. With several processes, of the gradients averaged over them: all get the same λ, the
    one of a single process with the whole batch.
    """
    each = (torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (reference, adversarial))
    gradients = torch.stack([gradient.float() for gradient in each])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradients)  # a sum: the factor cancels
        gradients = gradients / torch.distributed.get_world_size()
    reference_norm, adversarial_norm = gradients.flatten(1).norm(dim=1)
    return (reference_norm / (adversarial_norm + 1e-6)).clamp(max=1e4).detach()
