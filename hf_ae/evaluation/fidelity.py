"""How generated images compare with real ones, as two sets of features: fidelity, diversity, and whether classes are
learnt."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import require
from .feature_network import FeatureNetwork
from .record import own_random_numbers


class AsTheyAre(nn.Module):
    """What torchmetrics takes for its feature network when it is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Both (images, features), of equal length or not. Raises ValueError for fewer than ten images.

    fid: Fréchet distance (Heusel et al. 2017). kid: 1000 times the kernel distance (Bińkowski et al. 2018), mean over
    100 subsets of at most 1,000. precision, recall: Kynkäänniemi et al. 2019, k = 3. density, coverage: Naeem et al.
    2020, k = 5.
    """
    fewest = min(len(real), len(fake))
    require(fewest >= 10, f"{fewest} images are too few to compare: give at least 10.")
    return {"fid": frechet(real, fake), "kid": kernel(real, fake), **neighbourhoods(real, fake)}


def frechet(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of two Gaussians with the sets' means and covariances, by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=AsTheyAre(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, metric.compute().item())


def kernel(real: Tensor, fake: Tensor, seed: int = 0) -> float:
    """1000 · unbiased MMD² with the cubic polynomial kernel, by torchmetrics."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(real), len(fake))
    with warnings.catch_warnings():  # that it keeps the features in memory, where they are anyway
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(feature=AsTheyAre(real.shape[1]), subsets=100, subset_size=size)
    metric.update(real.float(), real=True)
    metric.update(fake.float(), real=False)
    with own_random_numbers(seed=seed):
        return 1000 * metric.compute()[0].item()


def neighbourhoods(real: Tensor, fake: Tensor, k_manifold: int = 3, k_density: int = 5) -> dict[str, float]:
    """precision: fraction of fakes within the distance of a real image to its third real neighbour. recall: the same
    with the roles changed. density: how many such balls (fifth neighbour) hold a fake, on average, over 5. coverage:
    fraction of real images whose ball holds a fake."""
    real, fake = real.float(), fake.float()
    real_radii, fake_radii = radii(real, (k_manifold, k_density)), radii(fake, (k_manifold,))
    precise, in_balls = 0, 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    for part, radius in zip(fake.split(1000), fake_radii[k_manifold].split(1000)):
        distance = torch.cdist(part, real)
        precise += int((distance <= real_radii[k_manifold]).any(1).sum())
        recalled |= (distance <= radius[:, None]).any(0)
        inside = distance <= real_radii[k_density]
        in_balls += int(inside.sum())
        covered |= inside.any(0)
    return {
        "precision": precise / len(fake),
        "recall": recalled.float().mean().item(),
        "density": in_balls / (k_density * len(fake)),
        "coverage": covered.float().mean().item(),
    }


def radii(points: Tensor, ks: tuple[int, ...]) -> dict[int, Tensor]:
    """k -> distance of each point to its k-th neighbour, itself not counted: (points,)."""
    parts = (torch.cdist(part, points).topk(max(ks) + 1, largest=False).values for part in points.split(1000))
    nearest = torch.cat([*parts])
    return {k: nearest[:, k] for k in ks}


def train_classifier(network: FeatureNetwork, images: Tensor, labels: Tensor, steps: int = 500) -> FeatureNetwork:
    """`network`, which is new, after `steps` steps of 100 images; in eval mode.

    Images (images, channels, height, width) in 0…1, labels (images,).
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (100,), generator=generator)
        loss = F.cross_entropy(network.classify(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Tensor, labels: Tensor) -> float:
    """Fraction of the images whose label the classifier names."""
    guesses = torch.cat([network.classify(x).argmax(1) for x in images.split(500)])
    return (guesses == labels).float().mean().item()
