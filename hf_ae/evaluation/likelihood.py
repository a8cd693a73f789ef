"""How probable a variational autoencoder finds images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LIKELIHOODS = {"bce": "Bernoulli", "mse": "N(x̂, ½)", "l1": "Laplace(x̂, 1)"}
"""What p(x|z) a reconstruction loss stands for."""


@torch.no_grad()
def importance_weighted_bound(
    model: Any, pixel_values: Tensor, samples: int, progress: Callable[[Tensor], Iterable[Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Lower bounds on log p(x) in nats for each image: (evidence lower bound, importance-weighted bound), each
    (images,).

    log 1/k Σ p(x|z_i) p(z_i) / q(z_i|x) with `samples` z_i ~ q(z|x) (Burda et al. 2016, equation 8); the evidence
    lower bound is the mean of the logarithms. p(x|z) is what the model's loss says, see LIKELIHOODS; `bce` needs 0/1
    pixels.
    """
    elbos, bounds = [], []
    decoded_at_once = max(1, min(2500, 2**22 // pixel_values[0].numel()))
    for x in pixel_values if progress is None else progress(pixel_values):
        posterior = model.encode(x[None]).latent_dist
        constant = posterior.logvar.flatten(1).sum(1) * 0.5
        log_weights = []
        for n in (min(decoded_at_once, samples - done) for done in range(0, samples, decoded_at_once)):
            noise = torch.randn(n, *posterior.mean.shape[1:], device=x.device)
            z = posterior.mean + posterior.std * noise
            prior_over_posterior = 0.5 * (noise.square() - z.square()).flatten(1).sum(1) + constant
            log_weights.append(log_likelihood(model, x, z) + prior_over_posterior)
        log_weight = torch.cat(log_weights)
        elbos.append(log_weight.mean())
        bounds.append(torch.logsumexp(log_weight, 0) - math.log(samples))
    return torch.stack(elbos), torch.stack(bounds)


def log_likelihood(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) in nats of one image x (channels, height, width) for each latent vector z (n, …): (n,)."""
    logits = model._decode(z).flatten(1)
    x = x.flatten()
    if model.config.reconstruction_loss == "bce":
        return logits @ x - F.softplus(logits).sum(1)
    difference = model._to_pixels(logits) - x
    if model.config.reconstruction_loss == "l1":
        return -difference.abs().sum(1) - len(x) * math.log(2.0)
    return -difference.square().sum(1) - 0.5 * len(x) * math.log(math.pi)
