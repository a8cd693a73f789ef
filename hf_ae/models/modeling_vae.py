"""Variational autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bottlenecks import DiagonalGaussian, total_correlation_terms
from .configuration_vae import BetaVAEConfig, VAEConfig
from .discriminators import LatentDiscriminator, discriminator_loss, frozen, permuted
from .modeling_autoencoder import AutoencoderModel, AutoencoderOutput, EncoderOutput, check_unused
from .tiling import tiled


class VAEModel(AutoencoderModel):
    """Variational autoencoder (Kingma and Welling 2014) with vector or spatial latents.

    ```
    pixel_values -> encoder -> mean, log-variance -> sample = mean + std·ε -> decoder -> reconstruction
                                      |
                                     KL(q(z|x) ‖ N(0, 1)), closed form
    ```

    Both terms are sums over one image (all pixels; all values of the latents), averaged over the batch. With `bce` on
    binary images and `kl_weight=1` the loss is the negative evidence lower bound in nats; with `mse` it is that of
    p(x|z) = N(x; x̂, ½) up to a constant. `latents` are a sample in `train()`, the mean in `eval()`.

    With spatial latents it replaces diffusers' AutoencoderKL: `encode(x).latent_dist`, `decode(z).sample`,
    `config.scaling_factor`, `enable_tiling()`, `enable_slicing()`.
    """

    config: VAEConfig
    config_class = VAEConfig
    outputs_per_latent = 2
    can_sample = True
    forward_passes: Tensor
    """Training forward passes so far: a scalar buffer of the variants that count them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.use_slicing = False
        self.tile_size: int | None = None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "forward_passes"):  # which a variant registers after this class's __init__
            nn.init.zeros_(self.forward_passes)

    @property
    def is_regularized(self) -> bool:
        return self.config.kl_weight > 0

    @property
    def kl_weight_field(self) -> str | None:
        return "kl_weight"

    def bottleneck(
        self, encoder_output: Tensor, sample_posterior: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> EncoderOutput:  # fmt: skip
        posterior = DiagonalGaussian(encoder_output)
        draw = self.training if sample_posterior is None else sample_posterior
        return EncoderOutput(latents=posterior.sample(generator) if draw else posterior.mode(), latent_dist=posterior)

    def penalties(self, pixel_values: Tensor, encoded: Any) -> dict[str, Tensor]:
        return {"kl": self.config.kl_weight * encoded.latent_dist.kl().mean()}

    def forward(
        self, pixel_values: Tensor | None = None, return_dict: bool | None = None,
        output_hidden_states: bool | None = None, return_loss: bool = True, *, sample: Tensor | None = None,
        sample_posterior: bool | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        **unused: Any,
    ) -> AutoencoderOutput | tuple[Any, ...]:  # fmt: skip
        """pixel_values, also called `sample` -> reconstruction, latents and the loss against `pixel_values`.

        `sample_posterior`: decode a draw from the posterior, of `generator` or one for each image, and not its mean;
        default: in `train()`.
        """
        check_unused(unused)
        pixel_values = sample if pixel_values is None else pixel_values
        if pixel_values is None:
            raise TypeError("forward() needs pixel_values")
        self._check_pixels(pixel_values)
        how: dict[str, Any] = dict(sample_posterior=sample_posterior, generator=generator)
        hidden_states = self._hidden_states(output_hidden_states)
        output = self._run(pixel_values, pixel_values, return_loss, hidden_states, **how)
        return output if self._as_dict(return_dict) else output.to_tuple()

    # Large images and batches

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True, *, tile_size: int | None = None) -> None:
        """Work on overlapping tiles of at most `tile_size` pixels (default: `config.image_size`) and blend them; with
        `use_tiling=False` on whole images again, as diffusers has it.

        Raises ValueError for vector latents, and for a size in the place of `use_tiling`.
        """
        if not isinstance(use_tiling, bool):
            raise ValueError(f"use_tiling={use_tiling!r} must be True or False: write tile_size={use_tiling!r}.")
        if not use_tiling:
            return self.disable_tiling()
        if self.config.latent_dim is not None:
            raise ValueError("tiling needs spatial latents: train with latent_channels instead of latent_dim.")
        self.tile_size = max(tile_size or max(self.config.image_hw), 4 * self.config.downsampling)

    def disable_tiling(self) -> None:
        """Work on whole images again."""
        self.tile_size = None

    def encode(
        self, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool | None = None
    ) -> EncoderOutput | tuple[Any, ...]:
        """pixel_values -> `.latent_dist` (sample, mode, kl) and `.latents`; as a tuple, `latent_dist` alone."""
        encoded: Any = super().encode(pixel_values, True, output_hidden_states)
        return encoded if self._as_dict(return_dict) else (encoded.latent_dist,)

    def _encoder_output(
        self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        whole = super()._encoder_output
        if hidden_states is not None:  # of whole images
            return whole(pixel_values, hidden_states)
        return self._in_parts(lambda x: whole(x)[0], pixel_values, down=True), []

    def _decode_to_pixels(self, latents: Tensor, pool_positions: list[Tensor] | None = None) -> Tensor:
        return self._in_parts(super()._decode_to_pixels, latents, down=False)

    def _in_parts(self, function: Callable[[Tensor], Tensor], x: Tensor, down: bool) -> Tensor:
        """`function` on images (`down`) or latents `x`: one by one, and in tiles, where that is enabled."""
        scale = self.config.downsampling
        tile = self.tile_size if down or self.tile_size is None else self.tile_size // scale

        def one(part: Tensor) -> Tensor:
            if tile is not None and max(part.shape[-2:]) > tile:
                return tiled(function, part, tile, scale, down)
            return function(part)

        return torch.cat([one(part) for part in x.split(1)]) if self.use_slicing and len(x) > 1 else one(x)


class BetaVAEModel(VAEModel):
    """VAE with a weighted, capacity-controlled or decomposed KL term.

    `objective`: `beta`: β·KL (Higgins et al. 2017). `capacity`: β·|KL − C| with C growing linearly over the first
    `capacity_steps` training forward passes (Burgess et al. 2018, equation 8). `total_correlation`: mutual information
    + β·total correlation + dimension-wise KL (Chen et al. 2018), estimated from the batch. `factor`: KL + β·total
    correlation (Kim and Mnih 2018, equation 2), estimated by a `discriminator` of latents: the gradients of the term
    `total_correlation` reach the encoder alone, those of the term `discriminator` the discriminator alone.
    """

    config: BetaVAEConfig
    config_class = BetaVAEConfig

    def __init__(self, config: BetaVAEConfig) -> None:
        super().__init__(config)
        if config.objective == "capacity":
            self.register_buffer("forward_passes", torch.zeros((), dtype=torch.int64))
        if config.objective == "factor":
            self.discriminator = LatentDiscriminator(config.latent_shape[0])

    @property
    def is_regularized(self) -> bool:
        return self.config.beta > 0 or self.config.objective == "factor"

    @property
    def kl_weight_field(self) -> str | None:
        return "beta" if self.config.objective == "beta" else None

    @property
    def needs_dataset_size(self) -> bool:
        return self.config.objective == "total_correlation"

    @property
    def current_capacity(self) -> Tensor:
        """C in nats at this point of the training (objective `capacity`), a scalar."""
        fraction = (self.forward_passes / (self.config.capacity_steps or 1)).clamp(max=1.0)
        return (self.config.capacity or 0.0) * fraction

    def penalties(self, pixel_values: Tensor, encoded: Any) -> dict[str, Tensor]:
        beta, posterior = self.config.beta, encoded.latent_dist
        if self.config.objective == "total_correlation":
            return self._decomposed(encoded)
        kl = posterior.kl().mean()
        if self.config.objective == "factor":
            return {"kl": kl, **self._factor_terms(encoded)}
        if self.config.objective == "beta":
            return {"kl": beta * kl}
        if self.training and torch.is_grad_enabled():
            self.forward_passes += 1
        return {"kl": beta * (kl - self.current_capacity).abs()}

    def _decomposed(self, encoded: Any) -> dict[str, Tensor]:
        if self.config.dataset_size is None:
            raise ValueError("objective='total_correlation' needs dataset_size, the number of training images.")
        z, _ = self._drawn(encoded)
        terms = total_correlation_terms(z.float(), encoded.latent_dist, self.config.dataset_size)
        return {**terms, "total_correlation": self.config.beta * terms["total_correlation"]}

    def _factor_terms(self, encoded: Any) -> dict[str, Tensor]:
        z, generator = self._drawn(encoded)
        independent = permuted(z.detach(), generator)
        joint, product = self.discriminator(torch.cat([z.detach(), independent])).chunk(2)
        return {
            "total_correlation": self.config.beta * frozen(self.discriminator, z).float().mean(),
            "discriminator": discriminator_loss("non_saturating", joint, product),
        }

    def _drawn(self, encoded: Any) -> tuple[Tensor, torch.Generator | None]:
        """Draws of the posteriors, which the latents are in `train()`; in `eval()` always the same, by the generator
        that is returned."""
        if self.training:
            return encoded.latents, None
        generator = torch.Generator(encoded.latents.device).manual_seed(0)
        return encoded.latent_dist.sample(generator), generator
