"""An autoencoder as a scikit-learn transformer, of plain tables and of pictures."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from transformers import AutoConfig, AutoModel

from .data import batch_for, table_processor
from .errors import require, user_input
from .evaluation.record import own_random_numbers
from .loading import pick_device
from .models.image_processing import AutoencoderImageProcessor

Array = NDArray[Any]


class AutoencoderTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Rows of numbers, or pictures, -> latents and back, by an autoencoder that `fit` trains.

    A table (rows, columns) is brought to mean 0 and standard deviation 1, which the image processor keeps; pictures
    are a list of PIL images or an array (images, height, width) or (images, height, width, channels).

    latent_dim: values of the latents. hidden_sizes: as in `AutoencoderConfig`; default [128, 64] for a table, and two
    levels of convolutions for pictures that halve twice. model_type, config: any vector-latent variant of hf_ae, and
    more fields of its configuration. max_steps, batch_size, learning_rate: of the training, by AdamW with a cosine
    schedule. device: as `hf_ae.loading.pick_device`; the default here is the CPU.

    After `fit`: `model_` and `processor_`, each with `save_pretrained`.
    """

    def __init__(
        self, latent_dim: int = 8, hidden_sizes: Any = None, model_type: str = "hf_ae_autoencoder",
        config: dict[str, Any] | None = None, max_steps: int = 500, batch_size: int = 64, learning_rate: float = 0.002,
        device: str = "cpu", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.latent_dim, self.hidden_sizes, self.model_type, self.config = latent_dim, hidden_sizes, model_type, config
        self.max_steps, self.batch_size, self.learning_rate = max_steps, batch_size, learning_rate
        self.device, self.random_state = device, random_state

    def fit(self, X: Any, y: Any = None) -> AutoencoderTransformer:
        """Train on `X`. Raises ValueError for what is no table of finite numbers and no pictures, and for fields that
        contradict each other."""
        ours = str(self.model_type).startswith("hf_ae_")
        require(ours, f"model_type={self.model_type!r} is not one of hf_ae's, such as hf_ae_vae.")
        good = min(self.max_steps, self.batch_size) >= 1 and self.learning_rate > 0
        require(good, "max_steps and batch_size must be at least 1, and learning_rate more than 0.")
        X = self._validated(X, reset=True)
        self.processor_ = processor_for(X, getattr(self, "feature_names_in_", None))
        values = self._pixel_values(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        device = pick_device(self.device)
        with own_random_numbers(device, seed):
            self.model_ = self._new_model(values).to(device)
            self._train(values.to(device))
        self.model_.eval()
        self._n_features_out = math.prod(self.model_.config.latent_shape)
        return self

    def transform(self, X: Any) -> Array:
        """(rows, latent_dim); of a VAE the means."""
        latents = self._map(self._given(X), lambda model, x: model.encode(x).latents.flatten(1))
        return latents.astype(np.float32 if getattr(X, "dtype", None) == np.float32 else np.float64, copy=False)

    def inverse_transform(self, X: Any) -> Array:
        """Latents (rows, latent_dim) -> rows in the units of the table, or pictures (images, height, width, channels)
        in 0…1."""
        check_is_fitted(self, "model_")
        latents = torch.from_numpy(np.array(X, dtype=np.float64))
        wanted = (latents.ndim == 2) and latents.shape[1] == self._n_features_out
        require(wanted, f"latents have shape {tuple(latents.shape)}: write (rows, {self._n_features_out}).")
        shape = self.model_.config.latent_shape
        decoded = self._map(latents, lambda model, z: model.decode(z.view(-1, *shape)).sample)
        return self.processor_.postprocess(torch.from_numpy(decoded), output_type="np")

    def score_samples(self, X: Any) -> Array:
        """(rows,): minus the squared error of each row's reconstruction, in standard deviations: higher is more
        usual."""
        values = self._given(X)
        return self._map(values, squared_errors)

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of `score_samples`."""
        return float(self.score_samples(X).mean())

    # Internals

    def _validated(self, X: Any, reset: bool) -> Any:
        if is_pictures(X):
            return X
        return validate_data(self, X, reset=reset, dtype=[np.float64, np.float32])

    def _given(self, X: Any) -> Tensor:
        check_is_fitted(self, "model_")
        table = self.processor_.feature_columns is not None
        fitted, given = ("a table", "pictures") if table else ("pictures", "a table")
        require(table != is_pictures(X), f"This transformer was fitted to {fitted}, and is given {given}.")
        return self._pixel_values(self._validated(X, reset=False))

    def _pixel_values(self, X: Any) -> Tensor:
        with user_input():
            return self.processor_.preprocess(list(X) if is_pictures(X) else X, return_tensors="pt").pixel_values

    def _new_model(self, values: Tensor) -> Any:
        """A model for the rows or pictures."""
        channels, height, width = values.shape[1:]
        table = self.processor_.feature_columns is not None
        halves = not table and height % 4 == 0 and width % 4 == 0
        fields: dict[str, Any] = dict(image_size=[height, width], num_channels=channels, latent_dim=self.latent_dim)
        fields |= dict(pixel_range=list(self.processor_.pixel_range), network="conv" if halves else "mlp")
        sizes = self.hidden_sizes if self.hidden_sizes is not None else ([32, 64] if halves else [128, 64])
        fields |= {"hidden_sizes": list(sizes), **(self.config or {})}
        with user_input():
            return AutoModel.from_config(AutoConfig.for_model(self.model_type, **fields))

    def _train(self, values: Tensor) -> None:
        model, steps = self.model_.train(), self.max_steps
        if model.needs_dataset_size:
            model.config.dataset_size = model.config.dataset_size or len(values)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order, place = torch.randperm(len(values)), 0
        for _ in range(steps):
            if place + self.batch_size > len(values):
                order, place = torch.randperm(len(values)), 0
            model(values[order[place : place + self.batch_size]]).loss.backward()
            place += self.batch_size
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def _map(self, values: Tensor, function: Any) -> Array:
        """The function of the model and of each batch; of tables in float64: a row does not depend on the others."""
        model = self.model_
        if self.processor_.feature_columns is not None:
            model, values = copy.deepcopy(model).double(), values.double()
        most = batch_for(model.config.num_pixels)
        parts = [function(model, part.to(model.device, model.dtype)) for part in values.split(most)]
        return torch.cat(parts).cpu().numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.non_deterministic = self.random_state is None
        return tags


def squared_errors(model: Any, values: Tensor) -> Tensor:
    """Minus the squared error of each row."""
    return -(model(values).reconstruction - values).square().flatten(1).sum(1)


def is_pictures(X: Any) -> bool:
    """Whether it is an array of three or more dimensions, or a list of images."""
    if isinstance(X, list | tuple):
        return len(X) > 0 and (hasattr(X[0], "convert") or getattr(X[0], "ndim", 1) > 1)
    return getattr(X, "ndim", 2) > 2


def processor_for(X: Any, names: Any) -> AutoencoderImageProcessor:
    """The image processor for a table, or for pictures as large as the first one."""
    if not is_pictures(X):
        columns = [f"x{i}" for i in range(X.shape[1])] if names is None else [str(name) for name in names]
        return table_processor(X, columns)
    first = X[0]
    if hasattr(first, "convert"):
        channels, (width, height) = len(first.getbands()), first.size
    else:
        height, width, channels = (*first.shape, 1)[:3]
    fields: dict[str, Any] = dict(num_channels=channels)
    return AutoencoderImageProcessor(size={"height": height, "width": width}, **fields)
