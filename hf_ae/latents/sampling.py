"""Distributions of latents to sample from: N(0, I), a Gaussian or a mixture fitted to training latents, also by
class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data import (
    batch_for,
    binarized_once,
    each_batch,
    open_dataset,
    pick_split,
    read_labels,
    read_rows,
    to_pixel_values,
)
from ..errors import UserError, first_line, require
from ..loading import eval_mode, load_model, pick_device

KINDS = ("prior", "gaussian", "mixture")
MOST_VALUES = 4096
"""Of latents that a full covariance is fitted to."""
FILE = "sampler.safetensors"


class Sampler:
    """A mixture of Gaussians over latents; N(0, I) and one Gaussian are mixtures of one.

    weights: (parts,), of each part. means: (parts, values). factors: (parts, values, values), lower triangular: a
    sample is mean + factor·ε. classes: (parts,), the class that each part belongs to, or None. latent_shape: of one
    sample.
    """

    def __init__(
        self, kind: str, weights: Tensor, means: Tensor, factors: Tensor, latent_shape: Sequence[int],
        classes: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.latent_shape, self.classes = kind, list(latent_shape), classes
        self.weights, self.means, self.factors = weights.float(), means.float(), factors.float()

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for, the whole numbers from 0; 0 where there are none."""
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def sample(self, n: int, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """`n` latents (n, *latent_shape); of the classes `labels` (n,), where they are given. Raises ValueError."""
        weights = self.weights.expand(n, -1)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        if labels is not None:
            weights = weights * (labels[:, None] == self._known_classes(labels))
        parts = torch.multinomial(weights, 1, generator=generator)[:, 0]
        latents = torch.empty_like(noise)
        for part in parts.unique().tolist():
            rows = parts == part
            latents[rows] = self.means[part] + noise[rows] @ self.factors[part].T
        return latents.view(n, *self.latent_shape)

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log density in nats of latents (n, *latent_shape): (n,)."""
        flat, parts = latents.flatten(1), []
        for weight, mean, factor in zip(self.weights, self.means, self.factors):
            white = torch.linalg.solve_triangular(factor, (flat - mean).T, upper=False)
            volume = factor.diagonal().log().sum() + 0.5 * flat.shape[1] * math.log(2 * math.pi)
            parts.append(weight.log() - 0.5 * white.square().sum(0) - volume)
        return torch.stack(parts).logsumexp(0)

    def _known_classes(self, labels: Tensor) -> Tensor:
        if self.classes is None:
            raise UserError("This sampler knows no classes: fit it with --label_column, or leave the labels out.")
        known = sorted(set(self.classes.tolist()))
        unknown = set(labels.tolist()) - set(known)
        require(not unknown, f"This sampler has no class {min(unknown, default='')}: it has {known}.")
        return self.classes

    def save(self, folder: str | Path) -> Path:
        """Write `folder`/sampler.safetensors."""
        path = Path(folder) / FILE
        tensors = {"weights": self.weights, "means": self.means, "factors": self.factors}
        tensors |= {} if self.classes is None else {"classes": self.classes}
        notes = {"format": "pt", "kind": self.kind, "code_shape": ",".join(map(str, self.latent_shape))}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=notes)
        return path

    @classmethod
    def load(cls, name: str | Path) -> Sampler:
        """The sampler beside a model: a folder or a Hub id. Raises ValueError where there is none, or a damaged
        one."""
        advice = "make one with hf-ae fit-sampler"
        path = file_beside(name, FILE)
        if path is None:
            raise UserError(f"{name} has no sampler ({FILE}): {advice}.")
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                notes = file.metadata()
            shape = [int(size) for size in notes["code_shape"].split(",")]
            return prior(shape) if notes["kind"] == "prior" else cls(notes["kind"], **tensors, latent_shape=shape)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:  # damaged
            raise UserError(f"The sampler of {name} cannot be read ({first_line(error)}): {advice}.") from error


def file_beside(name: str | Path, file: str) -> Path | None:
    """A file beside a model, of a folder or a Hub id; None where there is none. Raises ValueError where the Hub does
    not answer."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name), file))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            return None
        raise UserError(f"The Hub cannot be asked for the {file} of {name}: {first_line(error)}") from error
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
        return None
    except HfHubHTTPError as error:
        raise UserError(f"The Hub cannot be asked for the {file} of {name}: {first_line(error)}") from error


class StandardNormal(Sampler):
    """N(0, I), without a matrix."""

    def log_prob(self, latents: Tensor) -> Tensor:
        flat = latents.flatten(1)
        return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))

    def sample(self, n: int, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        if labels is not None:
            self._known_classes(labels)
        return torch.randn(n, *self.latent_shape, generator=generator)


def prior(latent_shape: Sequence[int]) -> Sampler:
    """N(0, I), of latents of any size."""
    values = math.prod(latent_shape)
    return StandardNormal("prior", torch.ones(1), torch.zeros(1, values), torch.ones(1, 1, 1), latent_shape)


def fit(latents: Tensor, kind: str, labels: Tensor | None = None, components: int = 10, seed: int = 0) -> Sampler:
    """Latents (n, *shape) -> a sampler; with `labels` (n,), whole numbers from 0, one of each class. Raises
    ValueError.

    prior: N(0, I), nothing is fitted. gaussian: mean and full covariance. mixture: `components` Gaussians with full
    covariances, by scikit-learn's expectation-maximisation (Ghosh et al. 2020 sample deterministic autoencoders so).
    """
    require(kind in KINDS, f"kind={kind!r} is not known: write one of {', '.join(KINDS)}.")
    shape, flat = list(latents.shape[1:]), latents.flatten(1)
    if kind == "prior":
        return prior(shape)
    size, most = f"{flat.shape[1]:,} values", f"{MOST_VALUES:,}"
    good = flat.shape[1] <= MOST_VALUES
    other = "of such latents, those of a VAE alone can be drawn, from N(0, I) (kind=prior)"
    require(good, f"The latents have {size}, and a covariance is fitted to at most {most}: {other}.")
    groups = [(0, flat)] if labels is None else [(label, flat[labels == label]) for label in labels.unique().tolist()]
    fitted = [fit_group(group, kind, components, seed) for _, group in groups]
    weights = torch.cat([part[0] * len(group) / len(flat) for part, (_, group) in zip(fitted, groups)])
    classes = torch.cat([torch.full((len(part[0]),), label) for part, (label, _) in zip(fitted, groups)])
    means, factors = (torch.cat([part[i] for part in fitted]) for i in (1, 2))
    return Sampler(kind, weights, means, factors, shape, None if labels is None else classes)


def fit_group(
    flat: Tensor, kind: str, components: int, seed: int, least_variance: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, means, factors) of one group of latents (n, values); `least_variance` is added to each covariance."""
    n, values = flat.shape
    require(n > values, f"{n} latents are too few for a covariance of {values} values: give more images.")
    if kind == "gaussian":
        covariance = torch.cov(flat.double().T).reshape(values, -1) + least_variance * torch.eye(values)
        return torch.ones(1), flat.mean(0, keepdim=True), torch.linalg.cholesky(covariance)[None].float()
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(min(components, n), reg_covar=least_variance, random_state=seed, max_iter=200)
    mixture.fit(flat.double().numpy())
    arrays = (mixture.weights_, mixture.means_, mixture.covariances_)
    weights, means, covariances = (torch.from_numpy(array) for array in arrays)
    return weights, means, torch.linalg.cholesky(covariances)


@torch.no_grad()
def encode_all(model: Any, pixels: Tensor) -> Tensor:
    """uint8 images -> latents as the decoder got them in training, on the CPU: of a VAE draws of each image's
    posterior (their means alone lie too close together), with the same noise at every call."""
    generator, latents = torch.Generator().manual_seed(0), []
    with eval_mode(model):
        for part in each_batch(pixels):
            encoded = model.encode(to_pixel_values(part, model.device, model.config.pixel_range))
            drawn = encoded.latent_dist.sample(generator) if model.can_sample else encoded.latents
            latents.append(drawn.float().cpu())
    return torch.cat(latents)


@torch.no_grad()
def sample(model: Any, n: int, sampler: Sampler | None = None, seed: int = 0, labels: Tensor | None = None) -> Tensor:
    """`n` images (n, channels, height, width) in the model's pixel range, on the CPU; the same seed gives the same.

    Latents come from `sampler` (default: N(0, I)) and are decoded. A model that can generate images by itself, by an
    autoregressive prior over its codes, does so.
    """
    generator = torch.Generator().manual_seed(seed)
    most = batch_for(model.config.num_pixels)
    if sampler is None and model.can_generate_images:
        asked = [None] * -(-n // most) if labels is None else [part.tolist() for part in labels.split(most)]
        sizes = [min(most, n - start) for start in range(0, n, most)]
        parts = (model.generate(size, labels=part, generator=generator) for size, part in zip(sizes, asked))
        return torch.cat([part.float().cpu() for part in parts])
    needs_prior = sampler is None and model.has_discrete_codes
    require(
        not needs_prior, "Codes have no standard distribution: train a prior (hf_ae.train_prior) or fit a sampler."
    )
    sampler = sampler or prior(model.config.latent_shape)
    shapes = f"latents of shape {sampler.latent_shape}, and this model decodes {model.config.latent_shape}"
    require(sampler.latent_shape == model.config.latent_shape, f"The sampler draws {shapes}.")
    latents = sampler.sample(n, labels, generator)
    return torch.cat([model.decode(z.to(model.device)).sample.float().cpu() for z in latents.split(most)])


def fit_sampler(
    name: str | Path, dataset_name: str, kind: str = "mixture", components: int = 10, train_split: str = "train",
    dataset_config_name: str | None = None, image_column: str | None = None, label_column: str | None = None,
    max_images: int | None = None, binarize: bool = False, seed: int = 0, device: str | None = None,
) -> Path:  # fmt: skip
    """Fit a sampler to the latents of training images and write it beside the model in the folder `name`."""
    model, processor = load_model(name, pick_device(device))
    require(
        Path(name).is_dir(), f"{name} is no folder: the sampler is written beside the model, so download it first."
    )
    own = "Only a variational autoencoder's latents follow N(0, I)"
    require(kind != "prior" or model.can_sample, f"{own}: write --kind mixture.")
    splits = open_dataset(dataset_name, dataset_config_name)
    rows = pick_split(splits, train_split)
    pixels = read_rows(rows, processor, image_column, max_images)
    labels = None if label_column is None else read_labels(splits, train_split, label_column)[0][: len(pixels)]
    latents = encode_all(model, binarized_once(pixels) if binarize else pixels)
    return fit(latents, kind, labels, components, seed).save(name)
