"""How well a model reconstructs, and how probable it finds images."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def reconstruction_metrics(images: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, float]:
    """Both (images, channels, height, width) in 0…1.

    mse: mean squared error of a value. squared_error_per_image: summed over an image's values, as Hinton and
    Salakhutdinov (2006) report it. psnr: in dB, mean over images (at most 100 each). ssim: Wang et al. 2004, mean over
    images, where they are at least 11 pixels high and wide.
    """
    error = (images - reconstructions).square().flatten(1).mean(1).double()
    values = images[0].numel()
    metrics = {
        "mse": error.mean().item(),
        "squared_error_per_image": error.mean().item() * values,
        "psnr": (-10 * error.clamp(min=1e-10).log10()).mean().item(),
    }
    if min(images.shape[-2:]) >= 11:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        chunk = max(1, 2**20 // images[0].numel())
        parts = zip(images.split(chunk), reconstructions.split(chunk))
        totals = [ssim(r, x, data_range=1.0, reduction="sum") for x, r in parts]
        metrics["ssim"] = torch.stack(totals).sum().item() / len(images)  # type: ignore[arg-type]
    return metrics


def pca_reconstruction(train: torch.Tensor, test: torch.Tensor, components: int) -> torch.Tensor | None:
    """`test` images rebuilt from principal components of `train` (scikit-learn); None where there are too few values.

    Both (images, channels, height, width) in 0…1. Exact up to 2,000 values an image, else a randomized SVD.
    """
    from sklearn.decomposition import PCA

    values = test[0].numel()
    if components >= min(values, len(train)):
        return None
    solver = "covariance_eigh" if values <= 2000 else "randomized"
    pca = PCA(components, svd_solver=solver, random_state=0).fit(train.flatten(1).numpy())
    rebuilt = pca.inverse_transform(pca.transform(test.flatten(1).numpy()))
    return torch.from_numpy(rebuilt).float().view_as(test)


@torch.no_grad()
def importance_weighted_bound(model, pixel_values: torch.Tensor, samples: int, progress=None):
    """Lower bounds on log p(x) in nats for each image: (evidence lower bound, importance-weighted bound), each (images,).

    log 1/k Σ p(x|z_i) p(z_i) / q(z_i|x) with `samples` z_i ~ q(z|x) (Burda et al. 2016, equation 8); the evidence lower
    bound is the mean of the logarithms. p(x|z) is what the model's loss says: Bernoulli for `bce` (on 0/1 pixels),
    N(x̂, ½) for `mse`, Laplace(x̂, 1) for `l1`.
    """
    elbos, bounds = [], []
    decodes = max(1, min(2500, 2**22 // pixel_values[0].numel()))  # codes decoded at once
    images = pixel_values if progress is None else progress(pixel_values)
    for x in images:
        posterior = model.encode(x[None]).latent_dist
        constant = posterior.logvar.flatten(1).sum(1) * 0.5
        log_weights = []
        for n in (min(decodes, samples - done) for done in range(0, samples, decodes)):
            noise = torch.randn(n, *posterior.mean.shape[1:], device=x.device)
            z = posterior.mean + posterior.std * noise
            prior_over_posterior = 0.5 * (noise.square() - z.square()).flatten(1).sum(1) + constant
            log_weights.append(log_likelihood(model, x, z) + prior_over_posterior)
        log_weight = torch.cat(log_weights)
        elbos.append(log_weight.mean())
        bounds.append(torch.logsumexp(log_weight, 0) - math.log(samples))
    return torch.stack(elbos), torch.stack(bounds)


def log_likelihood(model, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """log p(x|z) in nats of one image x (channels, height, width) for each code: (codes,)."""
    logits = model._decode(z).flatten(1)
    x = x.flatten()
    if model.config.reconstruction_loss == "bce":
        return logits @ x - F.softplus(logits).sum(1)
    difference = model._to_pixels(logits) - x
    if model.config.reconstruction_loss == "l1":
        return -difference.abs().sum(1) - len(x) * math.log(2.0)
    return -difference.square().sum(1) - 0.5 * len(x) * math.log(math.pi)
