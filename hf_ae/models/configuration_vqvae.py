"""Configurations of the models with discrete codes. A field is documented on the lines below it."""

from __future__ import annotations

import math
from dataclasses import field

from .configuration import AutoencoderConfig


class VQVAEConfig(AutoencoderConfig):
    """Configuration of [`VQVAEModel`].

    With `latent_channels` each position of the code is one codeword of so many numbers; with `latent_dim` the vector is
    divided evenly into `num_codes` codewords.
    """

    model_type = "hf_ae_vqvae"

    quantizer: str = "ema"
    """`ema` (codewords are moving averages of the vectors they stand for), `gradient` (trained by the codebook term,
    van den Oord et al. 2017) or `fsq` (finite scalar quantization, Mentzer et al. 2023: a fixed grid, nothing to learn)."""
    codebook_size: int | None = None
    """Codewords (default 512). With `fsq` it is the product of `fsq_levels`."""
    num_codes: int | None = None
    """Codewords of a vector code (default 1); a spatial code has one at each position."""
    commitment_weight: float = 0.25
    """β: the weight of ‖encoder output - codeword‖², which keeps the encoder near the codewords. `fsq` has no such term."""
    code_distance: str = "euclidean"
    """`euclidean`, or `cosine`: vectors and codewords are normalised to length 1 (Yu et al. 2022)."""
    ema_decay: float = 0.99
    """γ of the moving averages (quantizer `ema`)."""
    kmeans_rounds: int = 10
    """Rounds of k-means that place the codewords on the first training batch; 0: they start at random."""
    revive_after: int = 100
    """A codeword that no vector chose in so many training passes moves to a random vector of the batch; 0: never."""
    fsq_levels: list[int] | None = None
    """Values of each number of a codeword, for `fsq` (default [8, 5, 5, 5]: 1,000 codewords)."""
    prior_layers: int | None = None
    """Layers of the autoregressive prior over the codes, a GPT-2; without it the model reconstructs and cannot generate.
    `hf_ae.train_prior` adds and trains it."""
    prior_hidden_size: int | None = None
    """Width of the prior (default 256)."""
    prior_heads: int | None = None
    """Attention heads of the prior (default `prior_hidden_size` / 64)."""
    prior_classes: int | None = None
    """Classes that the prior can be asked for (default 0: none). Their names, where known, are in `id2label`."""
    prior_temperature: float | None = None
    """`temperature` of `generate` where none is given (default 1)."""
    prior_guidance_scale: float | None = None
    """`guidance_scale` of `generate` where none is given (default 1)."""

    choices = {
        **AutoencoderConfig.choices,
        "network": ("mlp", "conv", "resnet"),
        "latent_activation": ("identity",),
        "quantizer": ("ema", "gradient", "fsq"),
        "code_distance": ("euclidean", "cosine"),
    }
    num_levels = 1

    def fill_defaults(self):
        if self.quantizer == "fsq":
            self.fsq_levels = [8, 5, 5, 5] if self.fsq_levels is None else list(self.fsq_levels)
            self.codebook_size = math.prod(self.fsq_levels) if self.codebook_size is None else self.codebook_size
            if self.latent_dim is None and self.latent_channels is None:
                values = len(self.fsq_levels) * self.num_levels
                if self.network == "mlp":
                    self.latent_dim = values * (self.num_codes or 1)
                else:
                    self.latent_channels = values
        super().fill_defaults()
        self.codebook_size = 512 if self.codebook_size is None else self.codebook_size
        if self.latent_dim is not None:
            self.num_codes = 1 if self.num_codes is None else self.num_codes
        if self.prior_layers is not None:
            self.prior_hidden_size = 256 if self.prior_hidden_size is None else self.prior_hidden_size
            self.prior_heads = max(1, self.prior_hidden_size // 64) if self.prior_heads is None else self.prior_heads
            self.prior_classes = 0 if self.prior_classes is None else self.prior_classes
            self.prior_temperature = 1.0 if self.prior_temperature is None else self.prior_temperature
            self.prior_guidance_scale = 1.0 if self.prior_guidance_scale is None else self.prior_guidance_scale

    def check(self):
        super().check()
        if self.upsample == "unpool":
            raise ValueError("upsample='unpool' needs positions that codes do not have: write 'transpose' or 'nearest'.")
        for name, least in {"codebook_size": 2, "kmeans_rounds": 0, "revive_after": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight={self.commitment_weight} must not be negative.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and less than 1.")
        self._check_codes()
        self._check_fsq()
        self._check_prior()

    def _check_codes(self):
        if self.latent_dim is None and self.num_codes is not None:
            raise ValueError("num_codes divides a vector code (latent_dim); a spatial code has one at each position: leave it out.")
        if self.latent_dim is not None and (not self.num_codes or self.num_codes < 1 or self.latent_dim % self.num_codes):
            raise ValueError(f"num_codes={self.num_codes} must divide latent_dim={self.latent_dim}.")

    def _check_fsq(self):
        if self.quantizer != "fsq":
            if self.fsq_levels is not None:
                raise ValueError(f"fsq_levels belongs to quantizer='fsq', not {self.quantizer!r}: write codebook_size.")
            return
        levels = self.fsq_levels or []
        if not levels or min(levels) < 2:
            raise ValueError(f"fsq_levels={levels} must be whole numbers of at least 2, such as [8, 5, 5, 5].")
        if self.codebook_size != math.prod(levels):
            raise ValueError(f"codebook_size={self.codebook_size} is not the product of fsq_levels={levels}: leave it out.")
        if self.code_distance != "euclidean":
            raise ValueError("code_distance='cosine' needs codewords to learn: write quantizer='ema' or 'gradient'.")
        if self.codeword_length != len(levels):
            raise ValueError(f"fsq_levels={levels} give codewords of {len(levels)} numbers, and this code has {self.codeword_length}: "
                             "leave out latent_dim and latent_channels.")  # fmt: skip

    def _check_prior(self):
        sizes = {name: getattr(self, name) for name in ("prior_hidden_size", "prior_heads", "prior_classes")}
        draws = {name: getattr(self, name) for name in ("prior_temperature", "prior_guidance_scale")}
        if self.prior_layers is None:
            if given := [name for name, value in {**sizes, **draws}.items() if value is not None]:
                raise ValueError(f"{given[0]} belongs to a prior: write prior_layers too, or leave it out.")
            return
        hidden, heads, classes = (value or 0 for value in sizes.values())
        if self.prior_layers < 1 or heads < 1 or hidden < 1 or hidden % heads or classes < 0:
            raise ValueError(f"prior_layers={self.prior_layers} and prior_heads={heads} must be positive, and prior_heads divide "
                             f"prior_hidden_size={hidden}.")  # fmt: skip
        if bad := [f"{name}={value}" for name, value in draws.items() if not (value or 0) > 0]:
            raise ValueError(f"{bad[0]} must be positive.")

    @property
    def codeword_length(self) -> int:
        """Numbers in a codeword."""
        return (self.latent_dim or 0) // (self.num_codes or 1) if self.latent_channels is None else self.latent_channels // self.num_levels

    def level_shapes(self, height: int | None = None, width: int | None = None) -> list[list[int]]:
        """Shape of the indices of one image of `height` × `width` pixels (default: `image_size`), the coarsest level first."""
        if self.latent_channels is None:
            return [[self.num_codes or 1]]
        rows, columns = (-(-size // self.downsampling) for size in (height or self.image_hw[0], width or self.image_hw[1]))
        return [[-(-size // 2**level) for size in (rows, columns)] for level in reversed(range(self.num_levels))]


class VQVAE2Config(VQVAEConfig):
    """Configuration of [`VQVAE2Model`]. Its finest level has the positions of a [`VQVAEModel`] of the same fields; each
    coarser level has half as many rows and columns, rounded up."""

    model_type = "hf_ae_vqvae2"

    network: str = "resnet"
    """`conv` or `resnet`."""
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 128])
    """As in [`AutoencoderConfig`]."""
    latent_channels: int | None = None
    """Channels of the latents, divided evenly among the levels (default: 32 for each)."""
    num_levels: int = 2
    """Levels of codes; a coarser one conditions those below it."""

    choices = {**VQVAEConfig.choices, "network": ("conv", "resnet")}

    def fill_defaults(self):
        if self.latent_channels is None and self.latent_dim is None and self.quantizer != "fsq":
            self.latent_channels = 32 * self.num_levels
        if self.latent_channels is None and self.latent_dim is None:
            self.latent_channels = self.num_levels * len(self.fsq_levels or [8, 5, 5, 5])
        super().fill_defaults()

    def _check_codes(self):
        if self.num_levels < 1:
            raise ValueError(f"num_levels={self.num_levels} must be at least 1.")
        if self.latent_channels is None or self.num_codes is not None:
            raise ValueError("hf_ae_vqvae2 has spatial codes: write latent_channels, not latent_dim or num_codes.")
        if self.latent_channels % self.num_levels:
            raise ValueError(f"num_levels={self.num_levels} must divide latent_channels={self.latent_channels}.")
