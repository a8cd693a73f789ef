"""Configurations of the models with discrete codes. A field is documented on the lines below it."""

from __future__ import annotations

import math
from dataclasses import field

from .configuration_autoencoder import AutoencoderConfig, require


class VQVAEConfig(AutoencoderConfig):
    """Configuration of [`VQVAEModel`].

    With `latent_channels` each position of the latents is one codeword of so many values; with `latent_dim` the vector
    is divided evenly into `num_codes` codewords.
    """

    model_type = "hf_ae_vqvae"

    quantizer: str = "ema"
    """`ema` (codewords are moving averages of the vectors they stand for), `gradient` (trained by the codebook term,
    van den Oord et al. 2017) or `fsq` (finite scalar quantization, Mentzer et al. 2023: a fixed grid, nothing to
    learn)."""
    codebook_size: int | None = None
    """Codewords (default 512). With `fsq` it is the product of `fsq_levels`."""
    num_codes: int | None = None
    """Codewords of vector latents (default 1); spatial latents have one at each position."""
    commitment_weight: float = 0.25
    """β: the weight of ‖encoder output - codeword‖², which keeps the encoder near the codewords. `fsq` has no such
    term."""
    code_distance: str = "euclidean"
    """`euclidean`, or `cosine`: vectors and codewords are normalised to length 1 (Yu et al. 2022)."""
    ema_decay: float = 0.99
    """γ of the moving averages (quantizer `ema`)."""
    kmeans_rounds: int = 10
    """Rounds of k-means that place the codewords on the first training batch; 0: they start at random."""
    revive_after: int = 100
    """A codeword that no vector chose in so many training passes moves to a random vector of the batch; 0: never."""
    fsq_levels: list[int] | None = None
    """Values of each component of a codeword, for `fsq` (default [8, 5, 5, 5]: 1,000 codewords)."""
    prior_layers: int | None = None
    """Layers of the autoregressive prior over the codes, a GPT-2; without it the model reconstructs and cannot
    generate. `hf_ae.train_prior` adds and trains it."""
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
        **AutoencoderConfig.choices, "network": ("mlp", "conv", "resnet"), "latent_activation": ("identity",),
        "quantizer": ("ema", "gradient", "fsq"), "code_distance": ("euclidean", "cosine"),
    }  # fmt: skip
    num_levels = 1

    def fill_defaults(self) -> None:
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
        defaults: dict[str, float | None] = {"codebook_size": 512, "num_codes": None if self.latent_dim is None else 1}
        if self.prior_layers is not None:
            heads = max(1, (self.prior_hidden_size or 256) // 64)
            defaults |= {"prior_hidden_size": 256, "prior_heads": heads, "prior_classes": 0}
            defaults |= {"prior_temperature": 1.0, "prior_guidance_scale": 1.0}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self) -> None:
        super().check()
        require(
            self.upsample != "unpool",
            "upsample='unpool' needs positions that codes do not have: write 'transpose' or 'nearest'.",
        )
        for name, least in {"codebook_size": 2, "kmeans_rounds": 0, "revive_after": 0}.items():
            require(getattr(self, name) >= least, f"{name}={getattr(self, name)} must be at least {least}.")
        require(self.commitment_weight >= 0, f"commitment_weight={self.commitment_weight} must not be negative.")
        require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must be at least 0 and less than 1.")
        self._check_codes()
        self._check_fsq()
        self._check_prior()

    def _check_codes(self) -> None:
        require(
            self.latent_dim is not None or self.num_codes is None,
            "num_codes divides vector latents (latent_dim); spatial ones have one at each position: leave it out.",
        )
        codes = self.num_codes or 0
        good = self.latent_dim is None or (codes >= 1 and self.latent_dim % codes == 0)
        require(good, f"num_codes={self.num_codes} must divide latent_dim={self.latent_dim}.")

    def _check_fsq(self) -> None:
        if self.quantizer != "fsq":
            wrong = f"fsq_levels belongs to quantizer='fsq', not {self.quantizer!r}: write codebook_size."
            require(self.fsq_levels is None, wrong)
            return
        levels, length = self.fsq_levels or [], self.codeword_length
        good = bool(levels) and min(levels) >= 2
        require(good, f"fsq_levels={levels} must be whole numbers of at least 2, such as [8, 5, 5, 5].")
        good = self.codebook_size == math.prod(levels)
        require(good, f"codebook_size={self.codebook_size} is not the product of fsq_levels={levels}: leave it out.")
        require(
            self.code_distance == "euclidean",
            "code_distance='cosine' needs codewords to learn: write quantizer='ema' or 'gradient'.",
        )
        require(
            length == len(levels),
            f"fsq_levels={levels} give codewords of {len(levels)} values, and these latents have {length}: "
            "leave out latent_dim and latent_channels.",
        )

    def _check_prior(self) -> None:
        sizes = {name: getattr(self, name) for name in ("prior_hidden_size", "prior_heads", "prior_classes")}
        draws = {name: getattr(self, name) for name in ("prior_temperature", "prior_guidance_scale")}
        if self.prior_layers is None:
            given = [name for name, value in {**sizes, **draws}.items() if value is not None]
            require(not given, f"{''.join(given[:1])} belongs to a prior: write prior_layers too, or leave it out.")
            return
        hidden, heads, classes = (value or 0 for value in sizes.values())
        require(
            min(self.prior_layers, heads, hidden) >= 1 and hidden % max(1, heads) == 0 and classes >= 0,
            f"prior_layers={self.prior_layers} and prior_heads={heads} must be positive, and prior_heads divide "
            f"prior_hidden_size={hidden}.",
        )
        for name, value in draws.items():
            require((value or 0) > 0, f"{name}={value} must be positive.")

    @property
    def codeword_length(self) -> int:
        """Values in a codeword."""
        if self.latent_channels is None:
            return (self.latent_dim or 0) // (self.num_codes or 1)
        return self.latent_channels // self.num_levels

    def level_shapes(self, height: int | None = None, width: int | None = None) -> list[list[int]]:
        """Shape of the indices of one image of `height` × `width` pixels (default: `image_size`), the coarsest level
        first."""
        if self.latent_channels is None:
            return [[self.num_codes or 1]]
        sizes = (height or self.image_hw[0], width or self.image_hw[1])
        finest = [-(-size // self.downsampling) for size in sizes]
        return [[-(-size // 2**level) for size in finest] for level in reversed(range(self.num_levels))]


class VQVAE2Config(VQVAEConfig):
    """Configuration of [`VQVAE2Model`]. Its finest level has the positions of a [`VQVAEModel`] of the same fields;
    each coarser level has half as many rows and columns, rounded up."""

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

    def fill_defaults(self) -> None:
        if self.latent_channels is None and self.latent_dim is None:
            values = len(self.fsq_levels or [8, 5, 5, 5]) if self.quantizer == "fsq" else 32
            self.latent_channels = values * self.num_levels
        super().fill_defaults()

    def _check_codes(self) -> None:
        require(self.num_levels >= 1, f"num_levels={self.num_levels} must be at least 1.")
        require(
            self.latent_channels is not None and self.num_codes is None,
            "hf_ae_vqvae2 has spatial latents: write latent_channels, not latent_dim or num_codes.",
        )
        good = (self.latent_channels or 0) % self.num_levels == 0
        require(good, f"num_levels={self.num_levels} must divide latent_channels={self.latent_channels}.")
