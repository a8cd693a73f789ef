"""Configurations of adversarial training. A field is documented on the lines below it."""

from __future__ import annotations

from dataclasses import field

from transformers import PreTrainedConfig

from .configuration import VAEConfig


class DiscriminatorConfig(PreTrainedConfig):
    """Configuration of [`DiscriminatorModel`]."""

    model_type = "hf_ae_discriminator"

    num_channels: int = 3
    """Colour channels of `pixel_values`."""
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Channels of each level; each halves height and width."""

    _auto_class = "AutoConfig"


class VAEGANConfig(VAEConfig):
    """Configuration of [`VAEGANModel`]."""

    model_type = "hf_ae_vaegan"

    reconstruction_weight: float = 1.0
    """Weight of the reconstruction term on pixels. Larsen et al. (2016) have 0, with `feature_weight` above 0."""
    feature_weight: float = 0.0
    """Weight of the squared error of the discriminator's last features, summed over an image (Larsen et al. 2016, equation 7)."""
    adversarial_loss: str = "hinge"
    """`hinge` (Lim and Ye 2017) or `non_saturating` (Goodfellow et al. 2014, section 3)."""
    adversarial_weight: float = 0.5
    """Weight of the generator's adversarial term."""
    adaptive_weight: bool = True
    """Also multiply that term by λ of Esser et al. (2021, equation 7): it then pulls at the decoder's last layer
    `adversarial_weight` times as hard as the reconstruction does, whatever their scales."""
    adversarial_start: int = 0
    """Training forward passes until the discriminator takes part."""
    prior_samples: bool = True
    """Train on pictures decoded from N(0, 1) too, not on reconstructions alone (Larsen et al. 2016): better samples."""
    discriminator_channels: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Channels of the discriminator's levels; each halves height and width."""

    choices = {**VAEConfig.choices, "adversarial_loss": ("hinge", "non_saturating")}

    def check(self):
        super().check()
        for name in ("reconstruction_weight", "feature_weight", "adversarial_weight", "adversarial_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.reconstruction_weight == 0 and self.feature_weight == 0:
            raise ValueError("reconstruction_weight=0 leaves nothing that ties a reconstruction to its image: write feature_weight=0.01.")
        levels = len(self.discriminator_channels)
        if not levels or min(self.discriminator_channels) < 1:
            raise ValueError(f"discriminator_channels={self.discriminator_channels} must be positive whole numbers, such as [32, 64].")
        if min(self.image_hw) < 2**levels:
            raise ValueError(
                f"discriminator_channels={self.discriminator_channels} halve {levels} times, too often for image_size={self.image_size}: "
                "write fewer."
            )
