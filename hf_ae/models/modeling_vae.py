"""Variational autoencoders."""

from __future__ import annotations

import torch

from .bottlenecks import DiagonalGaussian, total_correlation_terms
from .configuration import BetaVAEConfig, VAEConfig
from .modeling_autoencoder import AutoencoderModel, DecoderOutput, EncoderOutput, with_offload_hook
from .tiling import tiled


class VAEModel(AutoencoderModel):
    """Variational autoencoder (Kingma and Welling 2014) with a vector or a spatial code.

    ```
    pixel_values -> encoder -> mean, log-variance -> sample = mean + std·ε -> decoder -> reconstruction
                                      |
                                     KL(q(z|x) ‖ N(0, 1)), closed form
    ```

    Both terms are sums over one image (all pixels; all values of the code), averaged over the batch. With `bce` on
    binary images and `kl_weight=1` the loss is the negative evidence lower bound in nats; with `mse` it is that of
    p(x|z) = N(x; x̂, ½) up to a constant. `latents` are a sample in `train()`, the mean in `eval()`.

    With a spatial code it stands in for diffusers' AutoencoderKL: `encode(x).latent_dist`, `decode(z).sample`,
    `config.scaling_factor`, `enable_tiling()`, `enable_slicing()`.
    """

    config_class = VAEConfig
    values_per_code = 2

    def __init__(self, config):
        super().__init__(config)
        self.use_slicing, self.tile_size = False, None

    @property
    def is_regularized(self):
        return self.config.kl_weight > 0

    def bottleneck(self, code):
        posterior = DiagonalGaussian(code)
        return EncoderOutput(latents=posterior.sample() if self.training else posterior.mode(), latent_dist=posterior)

    def penalties(self, pixel_values, encoded):
        return {"kl": self.config.kl_weight * encoded.latent_dist.kl().mean()}

    # Large images and batches

    def enable_slicing(self):
        """Encode and decode one image of a batch at a time, to save memory."""
        self.use_slicing = True

    def disable_slicing(self):
        self.use_slicing = False

    def enable_tiling(self, tile_size: int | None = None):
        """Work on overlapping tiles of at most `tile_size` pixels (default: `config.image_size`) and blend them."""
        if self.config.latent_dim is not None:
            raise ValueError("tiling needs a spatial code: train with latent_channels instead of latent_dim.")
        self.tile_size = max(tile_size or max(self.config.image_hw), 4 * self.config.downsampling)

    def disable_tiling(self):
        self.tile_size = None

    @with_offload_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True):
        """pixel_values -> `.latent_dist` (sample, mode, kl) and `.latents`."""
        self._check_pixels(pixel_values)
        scale = self.config.downsampling
        code = self._in_parts(lambda x: self.encoder(x)[0], pixel_values.to(self.dtype), self.tile_size, scale, down=True)
        encoded = self.bottleneck(code)
        return encoded if return_dict else (encoded.latent_dist,)

    @with_offload_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True, generator=None, pool_positions=None):
        """latents -> `.sample`, pictures in `config.pixel_range`. Nothing is drawn; `generator` is accepted for pipelines."""
        self._check_latents(latents)
        scale = self.config.downsampling
        tile = self.tile_size and self.tile_size // scale
        sample = self._in_parts(lambda z: self._to_pixels(self._decode(z)), latents.to(self.dtype), tile, scale, down=False)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _in_parts(self, function, x, tile, scale, down):
        def one(part):
            if tile and max(part.shape[-2:]) > tile:
                return tiled(function, part, tile, scale, down)
            return function(part)

        return torch.cat([one(part) for part in x.split(1)]) if self.use_slicing and len(x) > 1 else one(x)


class BetaVAEModel(VAEModel):
    """VAE with a weighted, capacity-controlled or decomposed KL term.

    `objective`: `beta`: β·KL (Higgins et al. 2017). `capacity`: β·|KL − C| with C growing linearly over the first
    `capacity_steps` training forward passes (Burgess et al. 2018, equation 8). `total_correlation`: mutual information
    + β·total correlation + dimension-wise KL (Chen et al. 2018), estimated from the batch.
    """

    config_class = BetaVAEConfig
    forward_passes: torch.Tensor

    def __init__(self, config):
        super().__init__(config)
        if config.objective == "capacity":
            self.register_buffer("forward_passes", torch.zeros((), dtype=torch.int64))

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self and self.config.objective == "capacity" and hasattr(self, "forward_passes"):
            torch.nn.init.zeros_(self.forward_passes)

    @property
    def is_regularized(self):
        return self.config.beta > 0

    @property
    def current_capacity(self) -> torch.Tensor:
        """C in nats at this point of the training."""
        share = (self.forward_passes / self.config.capacity_steps).clamp(max=1.0)
        return self.config.capacity * share

    def penalties(self, pixel_values, encoded):
        beta, posterior = self.config.beta, encoded.latent_dist
        if self.config.objective == "total_correlation":
            if self.config.dataset_size is None:
                raise ValueError("objective='total_correlation' needs dataset_size, the number of training images.")
            z = encoded.latents
            if not self.training:  # latents are the mean there; the estimate needs samples, always the same ones
                z = posterior.sample(torch.Generator(z.device).manual_seed(0))
            terms = total_correlation_terms(z.float(), posterior, self.config.dataset_size)
            return {**terms, "total_correlation": beta * terms["total_correlation"]}
        kl = posterior.kl().mean()
        if self.config.objective == "beta":
            return {"kl": beta * kl}
        if self.training and torch.is_grad_enabled():
            self.forward_passes += 1
        return {"kl": beta * (kl - self.current_capacity).abs()}
