"""A variational autoencoder trained against a discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .configuration_vae import DiscriminatorConfig, VAEGANConfig
from .discriminators import PatchGAN, adaptive_weight, discriminator_loss, frozen, generator_loss
from .modeling_autoencoder import AutoencoderOutput, total
from .modeling_vae import VAEModel


@dataclass
class DiscriminatorOutput(ModelOutput):
    """logits: (batch, 1, rows, columns), higher is more real. features: the map that they are computed from."""

    logits: Tensor | None = None
    features: Tensor | None = None


class DiscriminatorModel(PreTrainedModel):
    """PatchGAN (Isola et al. 2017) as a model of its own: `pixel_values` in [-1, 1], of any size -> `.logits`.

    It is the `discriminator` of a VAE-GAN, and fits the component of that name of the text-to-image pipeline.
    """

    config: DiscriminatorConfig
    config_class = DiscriminatorConfig
    base_model_prefix = "discriminator"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _auto_class = "AutoModel"

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__(config)
        self.patchgan = PatchGAN(config.num_channels, config.hidden_sizes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> DiscriminatorOutput | tuple[Tensor, ...]:
        """pixel_values in [-1, 1] -> logits and features."""
        output = DiscriminatorOutput(*self.patchgan(pixel_values))
        return output if return_dict else output.to_tuple()


class VAEGANModel(VAEModel):
    """VAE-GAN (Larsen et al. 2016), with the adaptive weight of VQGAN (Esser et al. 2021).

    ```
    pixel_values -> encoder -> mean, log-variance -> sample -> decoder -> reconstruction -+
                                          N(0, 1) -> sample -> decoder -> image ----------+-> discriminator: real?
    pixel_values -------------------------------------------------------------------------+
    ```

    `losses` adds `adversarial` (and `feature`), whose gradients reach encoder and decoder alone, and `discriminator`,
    whose gradients reach the discriminator alone: it sees the images detached, and they see it frozen. So one backward
    pass of the sum trains both parts, each by its own optimizer, also under accumulation, mixed precision and several
    processes. In `eval()` reconstructions alone are judged; without gradients λ is 1.
    """

    config: VAEGANConfig
    config_class = VAEGANConfig
    differentiates_in_forward = True

    def __init__(self, config: VAEGANConfig) -> None:
        super().__init__(config)
        self.discriminator = DiscriminatorModel(
            DiscriminatorConfig(num_channels=config.num_channels, hidden_sizes=config.discriminator_channels)
        )
        self.register_buffer("forward_passes", torch.zeros((), dtype=torch.int64))

    @property
    def last_layer(self) -> Tensor:
        """Weights of the decoder's last layer."""
        return [weight for weight in self.decoder.parameters() if weight.ndim >= 2][-1]

    def _run(
        self, pixel_values: Tensor, seen: Tensor, return_loss: bool = True,
        hidden_states: list[Tensor] | None = None, **how: Any,
    ) -> AutoencoderOutput:  # fmt: skip
        output = super()._run(pixel_values, seen, return_loss, hidden_states, **how)
        if not return_loss:
            return output
        fakes, losses = output.reconstruction, output.losses
        if self.training and self.config.prior_samples:
            fakes = torch.cat([fakes, self._to_pixels(self._decode(torch.randn_like(output.latents)))])
        losses["reconstruction"] = self.config.reconstruction_weight * losses["reconstruction"]
        losses |= self.adversarial_terms(pixel_values, fakes, losses["reconstruction"])
        output.loss = total(losses)
        return output

    def adversarial_terms(self, pixel_values: Tensor, fakes: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """The named terms of the game; `fakes` begins with the reconstructions of `pixel_values`, and `reference` is
        their reconstruction term."""
        kind, terms = self.config.adversarial_loss, {}
        real, fakes = self._for_discriminator(pixel_values), self._for_discriminator(fakes)
        started = (self.forward_passes >= self.config.adversarial_start).float()
        judged = frozen(self.discriminator, fakes)
        if self.config.feature_weight:
            with torch.no_grad():
                wanted = self.discriminator(real).features.float()
            error = (judged.features[: len(real)].float() - wanted).square().sum() / len(real)
            terms["feature"] = self.config.feature_weight * started * error
            reference = reference + terms["feature"]
        adversarial = generator_loss(kind, judged.logits)
        weight = self.config.adversarial_weight * started
        if self.config.adaptive_weight and adversarial.requires_grad:
            weight = weight * adaptive_weight(reference, adversarial, self.last_layer)
        terms["adversarial"] = weight * adversarial
        logits = self.discriminator(torch.cat([real, fakes.detach()])).logits
        real_logits, fake_logits = logits.split([len(real), len(fakes)])
        terms["discriminator"] = started * discriminator_loss(kind, real_logits, fake_logits)
        if self.training and torch.is_grad_enabled():
            self.forward_passes += 1
        return terms

    def _for_discriminator(self, pixels: Tensor) -> Tensor:
        """Images in the model's pixel range -> in [-1, 1]."""
        pixels = pixels.to(self.dtype)
        return pixels if self.config.pixel_range == [-1.0, 1.0] else pixels * 2 - 1
