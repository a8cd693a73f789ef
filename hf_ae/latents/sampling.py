"""Distributions of codes to sample from: N(0, I), a Gaussian or a mixture fitted to training codes; of each class, if wanted."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..data.images import batch_for, to_pixel_values

KINDS = ("prior", "gaussian", "mixture")
MOST_VALUES = 4096
"""Of a code that a full covariance is fitted to."""
FILE = "sampler.safetensors"


class Sampler:
    """A mixture of Gaussians over codes; N(0, I) and one Gaussian are mixtures of one.

    weights: (parts,), of each part. means: (parts, values). factors: (parts, values, values), lower triangular: a code is
    mean + factor·ε. classes: (parts,), the class that each part belongs to, or None. code_shape: of one code.
    """

    def __init__(self, kind: str, weights, means, factors, code_shape: list[int], classes=None):
        self.kind, self.code_shape, self.classes = kind, list(code_shape), classes
        self.weights, self.means, self.factors = weights.float(), means.float(), factors.float()

    @property
    def num_classes(self) -> int | None:
        return None if self.classes is None else int(self.classes.max()) + 1

    def sample(self, n: int, labels: torch.Tensor | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """`n` codes (n, *code_shape); of the classes `labels` (n,), where they are given. Raises ValueError."""
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        weights = self.weights.expand(n, -1)
        if labels is not None:
            weights = weights * (self._known(labels)[:, None] == self.classes)
        parts = torch.multinomial(weights, 1, generator=generator)[:, 0]
        codes = torch.empty_like(noise)
        for part in parts.unique().tolist():
            rows = parts == part
            codes[rows] = self.means[part] + noise[rows] @ self.factors[part].T
        return codes.view(n, *self.code_shape)

    def _known(self, labels: torch.Tensor) -> torch.Tensor:
        if self.classes is None:
            raise ValueError("This sampler knows no classes: fit it with --label_column, or leave the labels out.")
        unknown = set(labels.tolist()) - set(self.classes.tolist())
        if unknown:
            raise ValueError(f"This sampler has no class {min(unknown)}: it has {sorted(set(self.classes.tolist()))}.")
        return labels

    def save(self, folder) -> Path:
        """Write `folder`/sampler.safetensors."""
        path = Path(folder) / FILE
        tensors = {"weights": self.weights, "means": self.means, "factors": self.factors}
        tensors |= {} if self.classes is None else {"classes": self.classes}
        notes = {"format": "pt", "kind": self.kind, "code_shape": ",".join(map(str, self.code_shape))}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=notes)
        return path

    @classmethod
    def load(cls, name) -> Sampler:
        """The sampler beside a model: a folder or a Hub id. Raises ValueError where there is none, or a damaged one."""
        from safetensors import safe_open

        path = Path(name) / FILE
        try:
            if not Path(name).is_dir():
                from huggingface_hub import hf_hub_download

                path = Path(hf_hub_download(str(name), FILE))
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                notes = file.metadata()
            shape = [int(size) for size in notes["code_shape"].split(",")]
            return prior(shape) if notes["kind"] == "prior" else cls(notes["kind"], **tensors, code_shape=shape)
        except Exception as error:  # not there, offline, damaged: each library has its own exceptions
            reason = f"{FILE} is missing" if not path.is_file() else str(error).splitlines()[0]
            raise ValueError(f"{name} has no sampler that can be read ({reason}): make one with hf-ae fit-sampler.") from None


def fit(codes: torch.Tensor, kind: str, labels: torch.Tensor | None = None, components: int = 10, seed: int = 0) -> Sampler:
    """Codes (n, *code_shape) -> a sampler; with `labels` (n,), whole numbers from 0, one of each class. Raises ValueError.

    prior: N(0, I), nothing is fitted. gaussian: mean and full covariance. mixture: `components` Gaussians with full
    covariances, by scikit-learn's expectation-maximisation (Ghosh et al. 2020 sample deterministic autoencoders so).
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known: write one of {', '.join(KINDS)}.")
    shape, flat = list(codes.shape[1:]), codes.flatten(1)
    if kind == "prior":
        return prior(shape)
    if flat.shape[1] > MOST_VALUES:
        raise ValueError(
            f"The code has {flat.shape[1]:,} values; a full covariance is fitted to at most {MOST_VALUES:,}: write kind=prior."
        )
    groups = {None: flat} if labels is None else {label: flat[labels == label] for label in labels.unique().tolist()}
    fitted = [(label, len(group), *fit_group(group, kind, components, seed)) for label, group in groups.items()]
    weights = torch.cat([weights * count / len(flat) for _, count, weights, _, _ in fitted])
    classes = None if labels is None else torch.cat([torch.full((len(w),), label) for label, _, w, _, _ in fitted])
    means, factors = torch.cat([part[3] for part in fitted]), torch.cat([part[4] for part in fitted])
    return Sampler(kind, weights, means, factors, shape, classes)


def prior(code_shape: list[int]) -> Sampler:
    """N(0, I), of a code of any size."""
    return StandardNormal("prior", torch.ones(1), torch.zeros(1, math.prod(code_shape)), torch.ones(1, 1, 1), code_shape)


class StandardNormal(Sampler):
    """N(0, I), without a matrix."""

    def sample(self, n: int, labels=None, generator=None):
        if labels is not None:
            self._known(labels)
        return torch.randn(n, *self.code_shape, generator=generator)


def fit_group(flat: torch.Tensor, kind: str, components: int, seed: int):
    """(weights, means, factors) of one group of codes (n, values)."""
    if len(flat) <= flat.shape[1]:
        raise ValueError(f"{len(flat)} codes are too few for a covariance of {flat.shape[1]} values: give more images.")
    if kind == "gaussian":
        covariance = torch.cov(flat.double().T).reshape(flat.shape[1], -1)
        covariance = covariance + 1e-6 * torch.eye(len(covariance))
        return torch.ones(1), flat.mean(0, keepdim=True), torch.linalg.cholesky(covariance)[None].float()
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(min(components, len(flat)), reg_covar=1e-6, random_state=seed, max_iter=200).fit(flat.double().numpy())
    arrays = (mixture.weights_, mixture.means_, mixture.covariances_)
    weights, means, covariances = (torch.from_numpy(array) for array in arrays)
    return weights, means, torch.linalg.cholesky(covariances)


@torch.no_grad()
def encode_all(model, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pictures -> codes as the decoder got them in training, on the CPU: of a VAE draws of each picture's posterior (their
    means alone lie too close together), with the same noise at every call."""
    model.eval()
    generator, codes = torch.Generator().manual_seed(0), []
    for part in pixels.split(batch_for(pixels[0].numel())):
        encoded = model.encode(to_pixel_values(part, model.device, model.config.pixel_range))
        drawn = encoded.latent_dist.sample(generator) if encoded.get("latent_dist") is not None else encoded.latents
        codes.append(drawn.float().cpu())
    return torch.cat(codes)


@torch.no_grad()
def sample(model, n: int, sampler: Sampler | None = None, seed: int = 0, labels: torch.Tensor | None = None) -> torch.Tensor:
    """`n` pictures (n, channels, height, width) in the model's pixel range, on the CPU; the same seed gives the same.

    Codes come from `sampler` (default: N(0, I)) and are decoded. A model with its own `generate`, such as an autoregressive
    prior over codes, draws by that.
    """
    generator = torch.Generator().manual_seed(seed)
    most = batch_for(model.config.num_pixels)
    if sampler is None and hasattr(model, "generate"):
        asked = [None] * -(-n // most) if labels is None else [part.tolist() for part in labels.split(most)]
        counts = [min(most, n - start) for start in range(0, n, most)]
        return torch.cat([model.generate(c, labels=part, generator=generator).float().cpu() for c, part in zip(counts, asked)])
    sampler = sampler or prior(model.config.code_shape)
    if sampler.code_shape != model.config.code_shape:
        raise ValueError(f"The sampler draws codes of shape {sampler.code_shape}, and this model decodes {model.config.code_shape}.")
    codes = sampler.sample(n, labels, generator)
    return torch.cat([model.decode(z.to(model.device)).sample.float().cpu() for z in codes.split(most)])


def fit_sampler(name, dataset_name: str, kind: str = "mixture", components: int = 10, train_split: str = "train",
                dataset_config_name: str | None = None, image_column: str | None = None, label_column: str | None = None,
                max_images: int | None = None, binarize: bool = False, seed: int = 0) -> Path:  # fmt: skip
    """Fit a sampler to the codes of training pictures and write it beside the model in the folder `name`."""
    from ..data.images import ImagesInMemory, binarized_once, open_dataset, pick_split
    from ..data.images import image_column as find_column
    from ..evaluation.evaluate import load_model

    model, processor = load_model(name)
    if not Path(name).is_dir():
        raise ValueError(f"{name} is no folder: the sampler is written beside the model, so download it first.")
    dataset = pick_split(open_dataset(dataset_name, dataset_config_name), train_split)
    pixels = ImagesInMemory.load(dataset, find_column(dataset, image_column), processor, limit=max_images).pixels
    labels = None if label_column is None else read_labels(dataset, label_column)[: len(pixels)]
    codes = encode_all(model, binarized_once(pixels) if binarize else pixels)
    return fit(codes, kind, labels, components, seed).save(name)


def read_labels(dataset, column: str) -> torch.Tensor:
    """The whole numbers of a column. Raises ValueError."""
    if column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r}: write --label_column with one of {', '.join(dataset.column_names)}.")
    values = dataset[column]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"The column {column!r} holds no whole numbers from 0: classes are needed.")
    return torch.tensor(list(values))
