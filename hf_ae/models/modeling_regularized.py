"""Sparse, denoising and contractive autoencoders: an AutoencoderModel with a penalty or a corruption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_regularized import (
    ContractiveAutoencoderConfig,
    DenoisingAutoencoderConfig,
    SparseAutoencoderConfig,
)
from .corruptions import corrupt
from .modeling_autoencoder import AutoencoderModel, AutoencoderOutput, EncoderOutput, check_unused


class SparseAutoencoderModel(AutoencoderModel):
    """Autoencoder whose latents are mostly close to zero.

    Adds λ·Σ|latents| (`sparsity="l1"`), or λ·Σ_j KL(ρ̂_j ‖ ρ) with ρ̂_j the mean activation of unit j over the batch
    (`sparsity="kl"`; over batch and positions for spatial latents), after Ng's lecture notes CS294A, 2011, where the
    two sides of the divergence are swapped. With `sparsity="topk"` all latents but the k greatest of an image are zero
    (Makhzani and Frey 2014).
    """

    config: SparseAutoencoderConfig
    config_class = SparseAutoencoderConfig

    @property
    def is_regularized(self) -> bool:
        return self.config.sparsity == "topk" or (self.config.sparsity != "none" and self.config.sparsity_weight > 0)

    def bottleneck(self, encoder_output: Tensor) -> EncoderOutput:
        encoded = super().bottleneck(encoder_output)
        if self.config.k is not None:
            flat = encoded.latents.flatten(1)
            kept = torch.zeros_like(flat).scatter(1, flat.topk(self.config.k).indices, 1)
            encoded.latents = (flat * kept).view_as(encoded.latents)
        return encoded

    def penalties(self, pixel_values: Tensor, encoded: EncoderOutput) -> dict[str, Tensor]:
        latents, weight = encoded.latents.float(), self.config.sparsity_weight
        if self.config.sparsity in ("none", "topk"):
            return {}
        if self.config.sparsity == "l1":
            return {"sparsity": weight * latents.abs().sum() / len(latents)}
        mean = latents.transpose(0, 1).flatten(1).mean(1)
        return {"sparsity": weight * bernoulli_kl(mean, self.config.sparsity_target).sum()}


def bernoulli_kl(p: Tensor, target: float) -> Tensor:
    """KL(Bernoulli(p) ‖ Bernoulli(target)) in nats, element by element."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return p * torch.log(p / target) + (1 - p) * torch.log((1 - p) / (1 - target))


class DenoisingAutoencoderModel(SparseAutoencoderModel):
    """Autoencoder that sees a damaged image and is trained to give back the clean one (Vincent et al. 2010).

    The input is damaged in `train()` only, unless `corrupt=True` asks for it (`corrupt=False` turns it off).
    """

    config: DenoisingAutoencoderConfig
    config_class = DenoisingAutoencoderConfig
    is_regularized = True
    can_denoise = True

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool | None = None,
        return_loss: bool = True, *, corrupt: bool | None = None, **unused: Any,
    ) -> AutoencoderOutput | tuple[Any, ...]:  # fmt: skip
        """pixel_values -> reconstruction; the loss is against `pixel_values` as given, before the damage."""
        check_unused(unused)
        self._check_pixels(pixel_values)
        seen = self.corrupt(pixel_values) if (self.training if corrupt is None else corrupt) else pixel_values
        output = self._run(pixel_values, seen, return_loss, self._hidden_states(output_hidden_states))
        return output if self._as_dict(return_dict) else output.to_tuple()

    def corrupt(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`pixel_values` with the configured damage."""
        low, high = self.config.pixel_range
        config = self.config
        kind, level, side = config.corruption, config.corruption_level, config.corruption_patch_size
        return corrupt(pixel_values, kind, level, low, high, generator, side)


class ContractiveAutoencoderModel(AutoencoderModel):
    """Autoencoder whose latents change little when the image does: adds λ·‖∂latents/∂x‖²_F (Rifai et al. 2011).

    The norm is exact for an encoder of one layer (`network="mlp"`, `hidden_sizes=[]`), else Hutchinson's unbiased
    estimate with one random ±1 vector an image; in `eval()` the vectors are fixed.
    """

    config: ContractiveAutoencoderConfig
    config_class = ContractiveAutoencoderConfig
    differentiates_in_forward = True

    @property
    def is_regularized(self) -> bool:
        return self.config.contraction_weight > 0

    def penalties(self, pixel_values: Tensor, encoded: EncoderOutput) -> dict[str, Tensor]:
        return {"contraction": self.config.contraction_weight * self.jacobian_norm(pixel_values).mean()}

    @torch.compiler.disable  # differentiates inside forward, which a compiled graph cannot do
    def jacobian_norm(self, pixel_values: Tensor) -> Tensor:
        """‖∂latents/∂x‖²_F of each image: (batch,)."""
        if self.config.network == "mlp" and not self.config.hidden_sizes:
            return self._one_layer_jacobian_norm(pixel_values)
        with torch.enable_grad():
            x = pixel_values.detach().requires_grad_()
            latents = self._encode(x).latents
            generator = None if self.training else torch.Generator(latents.device).manual_seed(0)
            signs = torch.randint(0, 2, latents.shape, generator=generator, device=latents.device) * 2.0 - 1.0
            (gradient,) = torch.autograd.grad((latents * signs).sum(), x, create_graph=self.training)
        return gradient.float().square().flatten(1).sum(1)

    def _one_layer_jacobian_norm(self, pixel_values: Tensor) -> Tensor:
        """Σ_j σ'(a_j)²·‖W_j‖², with σ the activation of the latents."""
        linear: Any = self.encoder.to_code
        with torch.enable_grad():
            before = F.linear(pixel_values.flatten(1), linear.weight, linear.bias).float()
            if self.config.latent_activation == "sigmoid":
                slope = before.sigmoid() * (1 - before.sigmoid())
            elif self.config.latent_activation == "relu":
                slope = (before > 0).float()
            else:
                slope = torch.ones_like(before)
            norms = slope.square() @ linear.weight.float().square().sum(1)
        return norms if torch.is_grad_enabled() else norms.detach()
