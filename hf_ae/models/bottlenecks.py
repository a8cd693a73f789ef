"""What happens to the latents between encoder and decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalGaussian:
    """A Gaussian with a diagonal covariance for each image: the posterior q(z|x) of a VAE (Kingma and Welling, 2014).

    `parameters` holds means and log-variances side by side in dimension 1: (batch, 2·latent_dim) or
    (batch, 2·latent_channels, height, width). Log-variances are limited to [-30, 20].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """Standard deviations, like the means."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variances, like the means."""
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """mean + std·ε with ε ~ N(0, 1): the reparameterization that lets gradients through. With a list of
        generators, one for each image."""
        if isinstance(generator, list):
            if len(generator) != len(self.mean):
                raise ValueError(f"{len(generator)} generators for {len(self.mean)} images: pass one for each.")
            noise = torch.cat([self._noise(self.mean[:1].shape, one) for one in generator])
        else:
            noise = self._noise(self.mean.shape, generator)
        return self.mean + self.std * noise

    def _noise(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.mean.dtype)
        return noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most probable latents, which are the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(q ‖ N(0, 1)), or KL(q ‖ other), in nats, summed over the latents: (batch,). Appendix B of Kingma and
        Welling."""
        mean, logvar = self.mean.float(), self.logvar.float()
        if other is not None:
            scale = torch.exp(-0.5 * other.logvar.float())
            mean, logvar = (mean - other.mean.float()) * scale, logvar - other.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log q(sample) in nats, summed over `dims` (default: all but the batch, so (batch,)), as in diffusers."""
        terms = -self.log_prob(sample)
        return terms.sum(dim=list(range(1, terms.ndim)) if dims is None else list(dims))

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z) in nats of each value of `z`, in the shape that `z` and the mean broadcast to."""
        return gaussian_log_prob(z, self.mean, self.logvar)


def gaussian_log_prob(z: Tensor, mean: Tensor | float, logvar: Tensor | float) -> Tensor:
    """log N(z; mean, exp(logvar)), value by value, in nats."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() * torch.exp(-logvar))


def total_correlation_terms(z: Tensor, posterior: DiagonalGaussian, dataset_size: int) -> dict[str, Tensor]:
    """KL(q(z|x) ‖ p(z)), averaged over the data, in three parts (Chen et al. 2018, equation 2).

    mutual information I(x; z) + total correlation KL(q(z) ‖ Π q(z_j)) + dimension-wise KL Σ KL(q(z_j) ‖ p(z_j)).
    q(z) is estimated by minibatch stratified sampling (their appendix C.2): `z` (batch, latent_dim) are samples of
    `posterior`, drawn from a data set of `dataset_size` images. Returns three scalars in nats.
    """
    batch = len(z)
    log_q_zx = posterior.log_prob(z).sum(1)
    pairs = gaussian_log_prob(z[:, None], posterior.mean[None], posterior.logvar[None])  # (sample, image, latent_dim)
    log_weights = stratified_log_weights(batch, max(dataset_size, batch), z.device)
    log_q_z = torch.logsumexp(log_weights + pairs.sum(2), dim=1)
    log_q_each = torch.logsumexp(log_weights[..., None] + pairs, dim=1).sum(1)
    log_p = gaussian_log_prob(z, 0.0, 0.0).sum(1)
    return {
        "mutual_information": (log_q_zx - log_q_z).mean(),
        "total_correlation": (log_q_z - log_q_each).mean(),
        "dimension_wise_kl": (log_q_each - log_p).mean(),
    }


def stratified_log_weights(batch: int, dataset_size: int, device: torch.device | None = None) -> Tensor:
    """log w[i, j]: the weight of image j in an estimate of q(z_i), (batch, batch). Rows sum to 1 (almost).

    An image represents itself alone (1/N), one other all that the batch does not hold, the rest 1/M each.
    """
    if batch == 1:
        return torch.zeros(1, 1, device=device)
    others = batch - 1
    weights = torch.full((batch, batch), 1.0 / others, device=device)
    weights.fill_diagonal_(1.0 / dataset_size)
    index = torch.arange(batch, device=device)
    weights[index, (index + 1) % batch] = (dataset_size - others) / (dataset_size * others)
    return weights.log()
