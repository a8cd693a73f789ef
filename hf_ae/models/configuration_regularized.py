"""Configurations of sparse, denoising and contractive autoencoders. A field is documented on the lines below it."""

from __future__ import annotations

import math

from .configuration_autoencoder import AutoencoderConfig, require


class SparseAutoencoderConfig(AutoencoderConfig):
    """Configuration of [`SparseAutoencoderModel`]."""

    model_type = "hf_ae_sparse"

    sparsity: str = "l1"
    """`l1` (sum of absolute latents), `kl` (mean activation against `sparsity_target`: needs
    `latent_activation="sigmoid"`), `topk` (only the `k` greatest latents of an image stay) or `none`."""
    sparsity_weight: float = 0.1
    """λ: the weight of the penalty."""
    sparsity_target: float = 0.05
    """ρ: the wanted mean activation of a unit, for `kl`."""
    k: int | None = None
    """How many latents of an image may differ from zero, for `topk`."""

    choices = {**AutoencoderConfig.choices, "sparsity": ("l1", "kl", "topk", "none")}

    def check(self) -> None:
        super().check()
        require(
            self.sparsity != "kl" or self.latent_activation == "sigmoid",
            "sparsity='kl' compares mean activations in (0, 1): write latent_activation='sigmoid' (or sparsity='l1').",
        )
        require(0 < self.sparsity_target < 1, f"sparsity_target={self.sparsity_target} must lie between 0 and 1.")
        require(self.sparsity_weight >= 0, f"sparsity_weight={self.sparsity_weight} must not be negative.")
        size, given = math.prod(self.latent_shape), self.k is not None
        require(given == (self.sparsity == "topk"), "k belongs to sparsity='topk', which needs it: write both.")
        require(self.k is None or 1 <= self.k <= size, f"k={self.k} must lie between 1 and the {size} latents.")


class DenoisingAutoencoderConfig(SparseAutoencoderConfig):
    """Configuration of [`DenoisingAutoencoderModel`]; sparsity is optional and off unless asked for."""

    model_type = "hf_ae_denoising"

    network: str = "mlp"
    """As in [`AutoencoderConfig`], or `transform` (a DCT of patches, plus residual blocks; with `latent_channels` and
    `pixel_range=[-1, 1]`): it starts by giving back what the latents keep of the damaged image, and learns the
    repair."""
    corruption: str = "gaussian"
    """`gaussian`, `masking`, `salt_pepper`, `patches`, `brightness`, `low_resolution` or `grayscale`."""
    corruption_level: float = 0.3
    """gaussian: standard deviation, in units of the pixel range's width. masking and salt_pepper: fraction of the
    pixels hit. patches: fraction of the squares. brightness: greatest logarithm of the factor. low_resolution: whole
    factor, at least 2. grayscale: unused."""
    corruption_patch_size: int = 4
    """Height and width of the squares that `patches` hides, in pixels."""
    sparsity: str = "none"
    """As in [`SparseAutoencoderConfig`]."""

    choices = {
        **SparseAutoencoderConfig.choices,
        "network": (*AutoencoderConfig.choices["network"], "transform"),
        "corruption": ("gaussian", "masking", "salt_pepper", "patches", "brightness", "low_resolution", "grayscale"),
    }

    def check(self) -> None:
        super().check()
        kind, level = self.corruption, self.corruption_level
        require(
            self.network != "transform" or (self.latent_channels is not None and self.pixel_range == [-1.0, 1.0]),
            "network='transform' has spatial latents and no sigmoid: write latent_channels and pixel_range=[-1, 1].",
        )
        good = kind != "grayscale" or self.num_channels == 3
        require(good, f"corruption='grayscale' needs num_channels=3, not {self.num_channels}.")
        good = kind != "low_resolution" or (level == int(level) and level >= 2)
        require(good, f"corruption='low_resolution' needs a whole corruption_level of at least 2, not {level}.")
        good = kind not in ("masking", "salt_pepper", "patches") or 0 <= level <= 1
        require(good, f"corruption={kind!r} needs a corruption_level from 0 to 1, not {level}.")
        require(level >= 0, f"corruption_level={level} must not be negative.")
        side, most = self.corruption_patch_size, max(self.image_hw)
        good = kind != "patches" or 1 <= side < most
        require(
            good, f"corruption_patch_size={side} must lie between 1 and {most - 1}: an image holds several patches."
        )


class ContractiveAutoencoderConfig(AutoencoderConfig):
    """Configuration of [`ContractiveAutoencoderModel`]."""

    model_type = "hf_ae_contractive"

    contraction_weight: float = 0.1
    """λ: the weight of ‖∂latents/∂x‖²_F."""

    def check(self) -> None:
        super().check()
        require(self.contraction_weight >= 0, f"contraction_weight={self.contraction_weight} must not be negative.")
