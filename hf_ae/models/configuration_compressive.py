"""Configuration of compressive autoencoders. A field is documented on the lines below it."""

from __future__ import annotations

import math
from dataclasses import field

from .configuration_autoencoder import AutoencoderConfig, require


class CompressiveAutoencoderConfig(AutoencoderConfig):
    """Configuration of [`CompressiveAutoencoderModel`]. The defaults suit photos: 96 channels at 1/8 of the
    resolution."""

    model_type = "hf_ae_compressive"

    image_size: int | list[int] = 256
    """Height and width in training; the model takes any size."""
    num_channels: int = 3
    """1 gray or 3 RGB."""
    network: str = "transform"
    """`transform`: a DCT of patches, plus residual blocks."""
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 128])
    """Channels of each level, from `patch_size` on; each after the first halves."""
    latent_channels: int | None = 96
    """Channels of the latents."""
    patch_size: int | None = 4
    """The residual part begins on squares of this side: the stride of the latents is `patch_size`·2^(len(hidden_sizes)
    - 1) pixels."""
    num_res_blocks: int | None = 2
    """Residual blocks of each level."""
    hyper_channels: list[int] = field(default_factory=lambda: [80, 48])
    """Channels inside the hyperprior's networks, and of the hyper-latents (1/4 of the height and width of the
    latents)."""
    reconstruction_loss: str = "mse"
    """The distortion: `mse` (times 255²), `ms_ssim` (1 - MS-SSIM; images of at least 176 pixels), or `mse+ms_ssim`."""
    lambda_range: list[float] = field(default_factory=lambda: [0.0006, 0.03])
    """λ of the loss bits per pixel + λ·distortion, at quality 0 and at quality 1; its logarithm is linear between."""
    quality: float = 0.5
    """0 (smallest files) to 1: what `encode` and the codec take where none is asked for. In training it is drawn at
    random."""

    choices = {
        **AutoencoderConfig.choices,
        "network": ("transform",),
        "latent_activation": ("identity",),
        "reconstruction_loss": ("mse", "ms_ssim", "mse+ms_ssim"),
    }

    def check(self) -> None:
        super().check()
        good = self.latent_channels is not None
        require(good, "hf_ae_compressive has spatial latents: write latent_channels, not latent_dim.")
        require(self.num_channels in (1, 3), f"num_channels={self.num_channels} must be 1 (gray) or 3 (RGB) here.")
        good = len(self.hyper_channels) == 2 and all(1 <= width <= 1024 for width in self.hyper_channels)
        require(
            good, f"hyper_channels={self.hyper_channels} must be two whole numbers from 1 to 1024, such as [80, 48]."
        )
        good = len(self.lambda_range) == 2 and 0 < self.lambda_range[0] < self.lambda_range[1] < math.inf
        require(good, f"lambda_range={self.lambda_range} must be two rising positive numbers, such as [0.0006, 0.03].")
        require(0 <= self.quality <= 1, f"quality={self.quality} must lie between 0 and 1.")
        loss, size = self.reconstruction_loss, self.image_size
        good = loss == "mse" or min(self.image_hw) >= 176
        require(good, f"reconstruction_loss={loss!r} needs an image_size of at least 176, not {size}: write 'mse'.")

    def check_size(self, height: int, width: int) -> None:
        """Any size works: images are padded."""
