"""How generated pictures compare with real ones, as two sets of features: fidelity, diversity, and whether classes are learnt."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class AsTheyAre(nn.Module):
    """What torchmetrics takes for its feature network when it is given features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def distances(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Both (images, features), of equal length or not. Raises ValueError for fewer than ten pictures.

    fid: Fréchet distance (Heusel et al. 2017). kid: 1000 times the kernel distance (Bińkowski et al. 2018), mean over 100
    subsets of at most 1,000. precision, recall: Kynkäänniemi et al. 2019, k = 3. density, coverage: Naeem et al. 2020, k = 5.
    """
    if min(len(real), len(fake)) < 10:
        raise ValueError(f"{min(len(real), len(fake))} pictures are too few to compare: give at least 10.")
    return {"fid": frechet(real, fake), "kid": kernel(real, fake), **neighbourhoods(real, fake)}


def frechet(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Fréchet distance of two Gaussians with the sets' means and covariances, by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=AsTheyAre(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, metric.compute().item())


def kernel(real: torch.Tensor, fake: torch.Tensor, seed: int = 0) -> float:
    """1000 · unbiased MMD² with the cubic polynomial kernel, by torchmetrics."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(real), len(fake))
    with warnings.catch_warnings():  # that it keeps the features in memory, where they are anyway
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(feature=AsTheyAre(real.shape[1]), subsets=100, subset_size=size)
    metric.update(real.float(), real=True)
    metric.update(fake.float(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return 1000 * metric.compute()[0].item()


def neighbourhoods(real: torch.Tensor, fake: torch.Tensor, k_manifold: int = 3, k_density: int = 5) -> dict[str, float]:
    """precision: share of fakes within the distance of a real picture to its third real neighbour. recall: the same with the
    roles changed. density: how many such balls (fifth neighbour) hold a fake, on average, over 5. coverage: share of real
    pictures whose ball holds a fake."""
    real, fake = real.float(), fake.float()
    real_radii, fake_radii = radii(real, (k_manifold, k_density)), radii(fake, (k_manifold,))
    precise, recalled, inside, covered = 0, torch.zeros(len(real), dtype=torch.bool), 0, torch.zeros(len(real), dtype=torch.bool)
    for part, radius in zip(fake.split(1000), fake_radii[k_manifold].split(1000)):
        apart = torch.cdist(part, real)
        precise += int((apart <= real_radii[k_manifold]).any(1).sum())
        recalled |= (apart <= radius[:, None]).any(0)
        near = apart <= real_radii[k_density]
        inside += int(near.sum())
        covered |= near.any(0)
    return {
        "precision": precise / len(fake),
        "recall": recalled.float().mean().item(),
        "density": inside / (k_density * len(fake)),
        "coverage": covered.float().mean().item(),
    }


def radii(points: torch.Tensor, ks: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """k -> distance of each point to its k-th neighbour, itself not counted: (points,)."""
    nearest = torch.cat([torch.cdist(part, points).topk(max(ks) + 1, largest=False).values for part in points.split(1000)])
    return {k: nearest[:, k] for k in ks}


def train_classifier(network: Any, pictures: torch.Tensor, labels: torch.Tensor, steps: int = 500) -> Any:
    """`network`, which is new and has a method `classify` -> logits, after `steps` steps of 100 pictures; in eval mode.

    Pictures (images, channels, height, width) in 0…1, labels (images,).
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(pictures), (100,), generator=generator)
        loss = F.cross_entropy(network.classify(pictures[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: Any, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the pictures whose label the classifier names."""
    guesses = torch.cat([network.classify(x).argmax(1) for x in pictures.split(500)])
    return (guesses == labels).float().mean().item()
