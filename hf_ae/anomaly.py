"""Outliers: how unlike the images that it was fitted to an image is, by what an autoencoder makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .data import batch_for, read_rows, to_pixel_values
from .errors import UserError, first_line, require, user_input
from .latents.sampling import Sampler, file_beside, fit_group
from .loading import eval_mode, image_processor_for, load_model

FILE = "anomaly_detector.safetensors"
PARTS = ("reconstruction", "bound", "gaussian", "mixture", "neighbors")
OPTIONS = ("score", "contamination", "components", "num_neighbors", "seed")
"""What a saved detector is made with again."""
MOST_VALUES = 64
"""Longer latents are first reduced to so many principal components."""
MOST_NEIGHBORS = 20_000
"""Latents that are kept to find neighbours among."""
CALIBRATION = 0.2
"""Fraction of the images that scales and threshold are set on; densities are fitted to the others."""


class AnomalyDetector:
    """An autoencoder that says how unusual an image is, with scikit-learn's convention: higher is more normal.

    `model`: one of this family, or its folder or Hub id. `score`: one or more of these, joined by `+`; default
    `mixture+neighbors`. Each is brought to mean 0 and standard deviation 1 on images that it was not fitted to, and
    they are averaged.

    reconstruction: log of the squared error of an image. bound: what the evidence lower bound lacks, of a VAE.
    gaussian, mixture: -log density of the latents under one Gaussian, or `components` of them. neighbors: mean
    distance to the `num_neighbors` nearest latents, in units in which the latents have covariance 1.

    `processor`: the image processor of a model that is given as an object, where it is not that of its configuration,
    such as one with the standardisation of a table.

    `contamination`: the fraction of the images fitted to that counts as outliers; it sets the threshold.
    """

    def __init__(
        self, model: Any, score: str = "mixture+neighbors", contamination: float = 0.05, components: int = 10,
        num_neighbors: int = 5, seed: int = 0, processor: Any = None,
    ) -> None:  # fmt: skip
        if isinstance(model, str | Path):
            model, processor = load_model(model)
        self.model, self.processor = model, processor or image_processor_for(model)
        self.score, self.contamination, self.seed = score, contamination, seed
        self.components, self.num_neighbors = components, num_neighbors
        self.parts = [part.strip() for part in score.split("+")]
        unknown = [part for part in self.parts if part not in PARTS]
        require(not unknown, f"score={score!r} is not known: join some of {', '.join(PARTS)} by +.")
        vae = "bound" not in self.parts or self.model.can_sample
        require(vae, "score='bound' needs a variational autoencoder.")
        require(0 < contamination < 1, f"contamination={contamination} must lie between 0 and 1.")
        require(min(components, num_neighbors) >= 1, "components and num_neighbors must be at least 1.")
        self.tensors: dict[str, Tensor] = {}

    # scikit-learn's names

    def fit(self, images: Any, y: Any = None, image_column: str | None = None) -> AnomalyDetector:
        """Fit densities, scales and the threshold to normal images: a `datasets.Dataset`, or whatever the image
        processor takes. Images that the model was not trained on give a threshold that holds for new ones.

        Raises ValueError for fewer than ten images.
        """
        pixels = self._pixels(images, image_column)
        require(len(pixels) >= 10, f"{len(pixels)} images are too few to fit a detector to: give ten at least.")
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(self.seed))
        held = order[: max(2, int(CALIBRATION * len(pixels)))]
        self.tensors = self._densities(self._latents(pixels[order[len(held) :]]))
        found = self._unusual(pixels[held])
        self.tensors |= {"part_mean": found.mean(0), "part_std": found.std(0).clamp(min=1e-12)}
        self.tensors["offset"] = self._joined(found).quantile(self.contamination)
        return self

    def score_samples(self, images: Any, image_column: str | None = None) -> NDArray[Any]:
        """Images -> (images,): higher is more normal. Raises ValueError before `fit`."""
        return self._joined(self._unusual(self._pixels(images, image_column))).numpy()

    def score_parts(self, images: Any, image_column: str | None = None) -> dict[str, NDArray[Any]]:
        """Images -> {part of the score: (images,)}, each alone and in its own units; higher is more normal."""
        unusual = self._unusual(self._pixels(images, image_column))
        return {part: -column.numpy() for part, column in zip(self.parts, unusual.T)}

    def decision_function(self, images: Any, image_column: str | None = None) -> NDArray[Any]:
        """Images -> (images,): `score_samples` above the threshold, negative for outliers."""
        return self.score_samples(images, image_column) - self.offset_

    def predict(self, images: Any, image_column: str | None = None) -> NDArray[Any]:
        """Images -> (images,): 1 for what is normal, -1 for outliers."""
        return np.where(self.decision_function(images, image_column) >= 0, 1, -1)

    @property
    def offset_(self) -> float:
        """The threshold: images that score less are outliers."""
        self._check_fitted()
        return self.tensors["offset"].item()

    @torch.inference_mode()
    def anomaly_map(self, images: Any, image_column: str | None = None) -> NDArray[Any]:
        """Images -> (images, height, width): the squared error of each pixel, of values in 0…1, averaged over the
        channels."""
        pixels = self._pixels(images, image_column)
        low, high = self.model.config.pixel_range
        parts = [(x - self._reconstruct(x)).square().mean(1) / (high - low) ** 2 for x in self._batches(pixels)]
        return torch.cat(parts).cpu().numpy()

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its image processor and the detector into a folder. Raises ValueError before `fit`."""
        self._check_fitted()
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.save_detector(folder)

    def save_detector(self, folder: str | Path) -> Path:
        """Write the detector alone, beside its model."""
        self._check_fitted()
        options, path = {name: getattr(self, name) for name in OPTIONS}, Path(folder) / FILE
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"format": "pt", "options": json.dumps(options)})
        return path

    @classmethod
    def from_pretrained(cls, name: str | Path) -> AnomalyDetector:
        """The detector of a folder or Hub id. Raises ValueError where there is none, or a damaged one."""
        path = file_beside(name, FILE)
        if path is None:
            raise UserError(f"{name} has no detector ({FILE}): fit one with hf-ae anomaly, or AnomalyDetector.fit.")
        try:
            with safe_open(path, "pt") as file:
                options, names = json.loads(file.metadata()["options"]), list(file.keys())
                tensors = {key: file.get_tensor(key) for key in names}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"The detector of {name} cannot be read: {first_line(error)}") from error
        detector = cls(name, **options)
        detector.tensors = tensors
        return detector

    # Internals

    def _check_fitted(self) -> None:
        require(self.tensors, "The detector is not fitted yet: call fit with normal images first.")

    def _pixels(self, images: Any, column: str | None) -> Tensor:
        """A dataset -> uint8 images, anything else -> pixel values. What `read_rows` gives stays."""
        wanted = (self.processor.num_channels, *self.processor.target_size())
        kind = torch.uint8 if self.processor.feature_columns is None else torch.float32
        if isinstance(images, Tensor) and images.dtype == kind and images.shape[1:] == wanted:
            return images
        if hasattr(images, "column_names"):
            return read_rows(images, self.processor, column)
        with user_input():
            return self.processor.preprocess(images, return_tensors="pt").pixel_values

    def _batches(self, pixels: Tensor) -> Iterator[Tensor]:
        """Pixel values, batch by batch, on the model's device."""
        for part in pixels.split(batch_for(self.model.config.num_pixels)):
            yield to_pixel_values(part, self.model.device, self.model.config.pixel_range)

    def _reconstruct(self, values: Tensor) -> Tensor:
        with eval_mode(self.model):
            return self.model(values).reconstruction.float()

    @torch.inference_mode()
    def _latents(self, pixels: Tensor) -> Tensor:
        with eval_mode(self.model):
            parts = [self.model.encode(x).latents.float().flatten(1).cpu() for x in self._batches(pixels)]
        return torch.cat(parts)

    def _densities(self, latents: Tensor) -> dict[str, Tensor]:
        """What is fitted to the latents of normal images."""
        mean, values = latents.mean(0), min(MOST_VALUES, latents.shape[1], len(latents) - 1)
        _, _, directions = torch.linalg.svd((latents - mean)[:MOST_NEIGHBORS].double(), full_matrices=False)
        found = {"mean": mean, "directions": directions[:values].float()}
        codes = (latents - mean) @ found["directions"].T
        least = 1e-3 * codes.var(0).clamp(min=1e-12).mean().item()
        found["factor"] = fit_group(codes, "gaussian", 1, self.seed, least)[2][0]
        if "mixture" in self.parts:
            count = min(self.components, max(1, len(codes) // (2 * values)))
            weights, means, factors = fit_group(codes, "mixture", count, self.seed, least)
            found |= {"weights": weights.float(), "means": means.float(), "factors": factors.float()}
        if "neighbors" in self.parts:
            order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(self.seed))[:MOST_NEIGHBORS]
            found["neighbors"] = whitened(codes[order], found["factor"])
        return found

    @torch.inference_mode()
    def _unusual(self, pixels: Tensor) -> Tensor:
        """(images, parts): higher is less normal."""
        self._check_fitted()
        latents, found = self._latents(pixels), self.tensors
        codes = (latents - found["mean"]) @ found["directions"].T
        white = whitened(codes, found["factor"])
        measures: dict[str, Callable[[], Tensor]] = {
            "reconstruction": lambda: self._errors(pixels).clamp(min=1e-12).log(),
            "bound": lambda: self._bounds(pixels),
            "gaussian": lambda: white.square().sum(1),
            "mixture": lambda: -mixture_of(found).log_prob(codes),
            "neighbors": lambda: distances(white, found["neighbors"], self.num_neighbors),
        }
        return torch.stack([measures[part]() for part in self.parts], 1)

    def _joined(self, unusual: Tensor) -> Tensor:
        """(images, parts), higher is less normal -> (images,), higher is more normal."""
        return -((unusual - self.tensors["part_mean"]) / self.tensors["part_std"]).mean(1)

    def _errors(self, pixels: Tensor) -> Tensor:
        """The squared error of each image."""
        parts = [(x - self._reconstruct(x)).square().flatten(1).sum(1) for x in self._batches(pixels)]
        return torch.cat(parts).cpu()

    def _bounds(self, pixels: Tensor) -> Tensor:
        """Of each image, -ELBO up to a constant: the reconstruction term of the mean latents, and the KL term."""
        parts = []
        with eval_mode(self.model):
            for x in self._batches(pixels):
                encoded = self.model.encode(x)
                logits = self.model._decode(encoded.latents).float()
                rows = zip(logits.split(1), self.model._to_pixels(logits).split(1), x.split(1))
                terms = torch.stack([self.model.reconstruction_term(*row) for row in rows])
                parts.append((terms + encoded.latent_dist.kl()).cpu())
        return torch.cat(parts)


def mixture_of(tensors: dict[str, Tensor]) -> Sampler:
    """The mixture that was fitted."""
    weights, means, factors = (tensors[name] for name in ("weights", "means", "factors"))
    return Sampler("mixture", weights, means, factors, latent_shape=means.shape[1:])


def whitened(codes: Tensor, factor: Tensor) -> Tensor:
    """Codes (n, values) in units in which their covariance, factor·factorᵀ, is 1."""
    return torch.linalg.solve_triangular(factor, codes.T, upper=False).T


def distances(codes: Tensor, others: Tensor, count: int) -> Tensor:
    """(n,): the mean distance of each code to its `count` nearest among the others."""
    count = min(count, len(others))
    nearest = [torch.cdist(part, others).topk(count, largest=False).values for part in codes.split(500)]
    return torch.cat(nearest).mean(1)
