"""Configurations of variational autoencoders. A field is documented on the lines below it."""

from __future__ import annotations

from dataclasses import field

from transformers import PreTrainedConfig

from .configuration_autoencoder import AutoencoderConfig, require


class VAEConfig(AutoencoderConfig):
    """Configuration of [`VAEModel`]."""

    model_type = "hf_ae_vae"

    kl_weight: float = 1.0
    """Weight of the KL term. 1 gives the evidence lower bound. With a tiny weight (latent diffusion uses 1e-6) the
    latents do not follow N(0, 1), so decoding samples of N(0, 1) gives noise."""

    def check(self) -> None:
        super().check()
        require(
            self.upsample != "unpool",
            "upsample='unpool' needs positions that a sampled code does not have: write 'transpose' or 'nearest'.",
        )
        require(
            self.latent_activation == "identity",
            "latent_activation must stay 'identity' here: a Gaussian posterior covers all real numbers.",
        )
        require(self.kl_weight >= 0, f"kl_weight={self.kl_weight} must not be negative.")


class BetaVAEConfig(VAEConfig):
    """Configuration of [`BetaVAEModel`]."""

    model_type = "hf_ae_beta_vae"

    objective: str = "beta"
    """`beta` (β·KL, Higgins 2017), `capacity` (β·|KL − C|, C growing from 0 to `capacity`, Burgess 2018),
    `total_correlation` (mutual information + β·TC + dimension-wise KL, Chen 2018) or `factor` (KL + β·TC, with the
    total correlation told by a discriminator, Kim and Mnih 2018)."""
    beta: float = 4.0
    """β, called γ by Burgess et al. and by Kim and Mnih."""
    capacity: float | None = None
    """Final C in nats (objective `capacity`, default 25)."""
    capacity_steps: int | None = None
    """Training forward passes until C is reached (objective `capacity`, default 10,000)."""
    dataset_size: int | None = None
    """Images in the training set (objective `total_correlation`; hf_ae.train fills it in)."""

    choices = {**VAEConfig.choices, "objective": ("beta", "capacity", "total_correlation", "factor")}

    def fill_defaults(self) -> None:
        super().fill_defaults()
        if self.objective == "capacity":
            self.capacity = 25.0 if self.capacity is None else self.capacity
            self.capacity_steps = 10_000 if self.capacity_steps is None else self.capacity_steps

    def check(self) -> None:
        super().check()
        require(self.kl_weight == 1.0, "kl_weight belongs to hf_ae_vae: write beta instead.")
        require(self.beta >= 0, f"beta={self.beta} must not be negative.")
        require(
            self.objective == "capacity" or (self.capacity is None and self.capacity_steps is None),
            f"capacity and capacity_steps contradict objective={self.objective!r}: write objective='capacity'.",
        )
        good = self.objective not in ("total_correlation", "factor") or self.latent_dim is not None
        require(good, f"objective={self.objective!r} needs vector latents: write latent_dim.")
        good = self.capacity_steps is None or self.capacity_steps >= 1
        require(good, f"capacity_steps={self.capacity_steps} must be at least 1.")


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
    """Weight of the squared error of the discriminator's last features, summed over an image (Larsen et al. 2016,
    equation 7)."""
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
    """Train on images decoded from N(0, 1) too, not on reconstructions alone (Larsen et al. 2016): better samples."""
    discriminator_channels: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Channels of the discriminator's levels; each halves height and width."""

    choices = {**VAEConfig.choices, "adversarial_loss": ("hinge", "non_saturating")}

    def check(self) -> None:
        super().check()
        for name in ("reconstruction_weight", "feature_weight", "adversarial_weight", "adversarial_start"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative.")
        tied, nothing = self.reconstruction_weight > 0 or self.feature_weight > 0, "leaves nothing that ties"
        require(tied, f"reconstruction_weight=0 {nothing} a reconstruction to its image: write feature_weight=0.01.")
        channels = f"discriminator_channels={self.discriminator_channels}"
        good = bool(self.discriminator_channels) and min(self.discriminator_channels) >= 1
        require(good, f"{channels} must be positive whole numbers, such as [32, 64].")
        levels = len(self.discriminator_channels)
        good = min(self.image_hw) >= 2**levels
        require(good, f"{channels} halve {levels} times, too often for image_size={self.image_size}: write fewer.")
