"""How well a model repairs damaged images, beside what people use without learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError, require
from ..latents import reconstruct
from ..metrics import reconstruction_metrics
from ..models.corruptions import corrupt
from .request import Data

Array = NDArray[Any]
Method = Callable[[Array, Array], Array]
"""A damaged image (height, width, channels) in 0…1 and which of its pixels are lost (height, width) -> the image."""

IMAGES = 2000
"""Of them a repair is measured on the first."""
TUNED_ON = 64
"""Damaged training images on which the settings of a method without learning are chosen."""


@dataclass
class Damage:
    """A damage as `--corrupt gaussian:0.5` writes it: its kind and level, as of `DenoisingAutoencoderConfig`."""

    kind: str
    level: float
    patch_size: int = 4

    @classmethod
    def read(cls, text: str) -> Damage:
        """`kind:level` or `kind`. Raises UserError."""
        kind, _, level = text.partition(":")
        try:
            damage = cls(kind, 0.0 if kind == "grayscale" and not level else float(level))
            damage(torch.zeros(1, 3, 8, 8))
        except (ValueError, ZeroDivisionError, RuntimeError) as error:
            raise UserError(f"--corrupt {text} cannot be done: write a kind and a level, as gaussian:0.5.") from error
        return damage

    @classmethod
    def of(cls, model: Any) -> Damage:
        """What the model was trained to repair."""
        config = model.config
        return cls(config.corruption, config.corruption_level, config.corruption_patch_size)

    def __str__(self) -> str:
        return f"{self.kind}:{self.level:g}"

    def __call__(self, images: Tensor, seed: int = 0) -> Tensor:
        """Images in 0…1 -> damaged ones, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return corrupt(images, self.kind, self.level, generator=generator, patch_size=self.patch_size)

    def lost(self, images: Tensor, seed: int = 0) -> Tensor:
        """Which pixels of `images` the damage replaces: (images, height, width); none where it changes them all."""
        if self.kind not in ("masking", "patches"):
            return torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        return (self(torch.ones_like(images), seed) == 0)[:, 0]


def repair(model: Any, data: Data, pixels: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The task `repair`: `measure_repair` of the first images, and the rows of its figure."""
    request = data.request
    damage = Damage.of(model) if request.corrupt is None else Damage.read(request.corrupt)
    good = damage.kind != "grayscale" or model.config.num_channels == 3
    require(good, f"--corrupt {damage} needs a model of colour images.")
    there = request.train_split in data.splits
    train = data.pixels(request.train_split, TUNED_ON) if there else pixels[:TUNED_ON]
    found, rows = measure_repair(model, pixels[:IMAGES].float() / 255, train.float() / 255, damage)
    return found, {name: images[:12] for name, images in rows.items()}


def measure_repair(model: Any, images: Tensor, train: Tensor, damage: Damage) -> tuple[dict[str, Any], dict[str, Any]]:
    """Images in 0…1 -> (figures of the damaged, the restored and those of each method, rows of a figure).

    Settings of the methods without learning (a size of window, a strength) are those that leave the least error on
    damaged images of `train`.
    """
    damaged = damage(images)
    found: dict[str, Any] = {"damage": str(damage), "images": len(images)}
    found["damaged"], restored = reconstruction_metrics(images, damaged), reconstruct(model, damaged)
    found["restored"] = reconstruction_metrics(images, restored)
    rows = {"original": images, "damaged": damaged}
    found["without_learning"], repaired = {}, {}
    for name, made in without_learning(damaged, damage, train[:TUNED_ON]):
        found["without_learning"][name], repaired[name] = reconstruction_metrics(images, made), made
    if repaired:
        best = max(repaired, key=lambda name: found["without_learning"][name]["psnr"])
        rows[best] = repaired[best]
    return found, rows | {"restored": restored}


def without_learning(damaged: Tensor, damage: Damage, train: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, repaired images) of the usual methods for this damage, each with its best settings on `train`."""
    with_damage, lost = damage(train, seed=1), damage.lost(train, seed=1)
    for name, settings in methods(damage).items():
        errors = [(repaired(method, with_damage, lost) - train).square().mean().item() for method in settings]
        best = settings[int(np.argmin(errors))]
        yield name, repaired(best, damaged, damage.lost(damaged), name)


def repaired(method: Method, damaged: Tensor, lost: Tensor, name: str | None = None) -> Tensor:
    """`method` on each of the images, in 0…1."""
    pairs = zip(damaged.permute(0, 2, 3, 1).double().numpy(), lost.numpy())
    pairs = tqdm(pairs, desc=name, total=len(damaged), mininterval=1.0, leave=False, disable=name is None)
    made = np.stack([np.reshape(method(*pair), pair[0].shape) for pair in pairs])
    return torch.from_numpy(made).float().permute(0, 3, 1, 2).clamp(0, 1)


def methods(damage: Damage) -> dict[str, list[Method]]:
    """Name -> the method with each of its settings. Raises UserError where scikit-image is not installed."""
    try:
        from skimage import restoration
    except ImportError as error:
        raise UserError("Repair without learning needs scikit-image: pip install 'hf_ae[eval]'.") from error
    medians: list[Method] = [partial(median, size=size) for size in (3, 5)]
    if damage.kind == "gaussian":

        def total_variation(image: Array, lost: Array, weight: float) -> Array:
            return restoration.denoise_tv_chambolle(image, weight, channel_axis=-1)

        # in fractions of the noise: its standard deviation is known to all of them
        strengths, sigma = (0.4, 0.6, 0.8, 1.0, 1.3), max(damage.level, 1e-3)
        return {
            "non-local means": [partial(non_local_means, h=s * sigma, sigma=sigma) for s in strengths],
            "total variation": [partial(total_variation, weight=s * sigma) for s in (0.3, *strengths)],
            "median": medians,
            "Gaussian blur": [partial(blur, sigma=sigma) for sigma in (0.6, 0.8, 1.0, 1.3)],
        }
    if damage.kind == "salt_pepper":
        return {"median": medians}
    if damage.kind == "low_resolution":
        factor = int(damage.level)
        kinds = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
        return {name: [partial(enlarge, factor=factor, kind=kind)] for name, kind in kinds.items()}
    if damage.kind in ("masking", "patches"):

        def biharmonic(image: Array, lost: Array) -> Array:
            return restoration.inpaint_biharmonic(image, lost, channel_axis=-1)

        found: dict[str, list[Method]] = {"biharmonic": [biharmonic]}
        return found | ({"Telea": [partial(telea, radius=radius) for radius in (2, 4)]} if has_opencv() else {})
    return {}  # grayscale: nothing gives colours back


def non_local_means(image: Array, lost: Array, h: float, sigma: float) -> Array:
    """Buades et al. 2005: each pixel is a mean of those whose surroundings look alike."""
    from skimage.restoration import denoise_nl_means

    return denoise_nl_means(image, patch_size=5, patch_distance=9, h=h, sigma=sigma, fast_mode=True, channel_axis=-1)


def median(image: Array, lost: Array, size: int) -> Array:
    """The median of a window of size × size pixels."""
    from scipy.ndimage import median_filter

    return median_filter(image, size=(size, size, 1), mode="nearest")


def blur(image: Array, lost: Array, sigma: float) -> Array:
    """A mean of the surroundings, weighted by a Gaussian of `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def enlarge(image: Array, lost: Array, factor: int, kind: Image.Resampling) -> Array:
    """The small image that `low_resolution` enlarged, enlarged smoothly instead."""
    height, width = image.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    channels = []
    for channel in np.moveaxis(image[::factor, ::factor], -1, 0):
        large = Image.fromarray(channel.astype(np.float32)).resize((columns * factor, rows * factor), kind)
        channels.append(np.asarray(large)[:height, :width])
    return np.stack(channels, -1)


def telea(image: Array, lost: Array, radius: int) -> Array:
    """Telea 2004: lost pixels from their neighbours, from the border of the hole inwards; by OpenCV."""
    import cv2

    values = (image * 255).round().astype(np.uint8)
    return cv2.inpaint(values, lost.astype(np.uint8), radius, cv2.INPAINT_TELEA) / 255


def has_opencv() -> bool:
    """Whether OpenCV is installed: it is not asked for by any extra."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return False
    return True
