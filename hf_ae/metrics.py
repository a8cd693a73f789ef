"""How well a model reconstructs images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def psnr(squared_error: Tensor) -> Tensor:
    """Mean squared errors of values in 0…1 -> peak signal-to-noise ratios in dB, at most 100."""
    return -10 * squared_error.clamp(min=1e-10).log10()


def reconstruction_metrics(images: Tensor, reconstructions: Tensor) -> dict[str, float]:
    """Both (images, channels, height, width) in 0…1.

    mse: mean squared error of a value. squared_error_per_image: summed over an image's values, as Hinton and
    Salakhutdinov (2006) report it. psnr: in dB, mean over images. ssim: Wang et al. 2004, mean over images, where they
    are at least 11 pixels high and wide.
    """
    error = (images - reconstructions).square().flatten(1).mean(1).double()
    metrics = {
        "mse": error.mean().item(),
        "squared_error_per_image": error.mean().item() * images[0].numel(),
        "psnr": psnr(error).mean().item(),
    }
    if min(images.shape[-2:]) >= 11:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        chunk = max(1, 2**20 // images[0].numel())
        parts = zip(images.split(chunk), reconstructions.split(chunk))
        totals: list[Any] = [ssim(r, x, data_range=1.0, reduction="sum") for x, r in parts]
        metrics["ssim"] = torch.stack(totals).sum().item() / len(images)
    return metrics


def pca_reconstruction(train: Tensor, test: Tensor, components: int) -> Tensor | None:
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
