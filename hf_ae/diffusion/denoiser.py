"""The part of a latent-diffusion pipeline that is trained: a denoiser of latents, given text states, and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import UserError
from .text_encoders import text_states

PREDICTIONS = ("v_prediction", "epsilon")
BETA_SCHEDULES = ("squaredcos_cap_v2", "scaled_linear", "linear")


@dataclass
class DiffusionOutput:
    """`loss` (a scalar) and `losses`, the unweighted squared error of the prediction."""

    loss: Tensor
    losses: dict[str, Tensor]


class LatentDiffusion(nn.Module):
    """Denoising of latents (Ho et al. 2020; Rombach et al. 2022): the mean squared error of what the `unet` predicts.

    `scheduler` fixes the noise and what is predicted (`epsilon` or `v_prediction`, Salimans and Ho 2022).
    `text_encoder` is given only where it is trained jointly. With `snr_gamma` each image's error has the weight
    min(SNR, γ) / SNR (Hang et al. 2023), for v-prediction min(SNR + 1, γ) / (SNR + 1), as diffusers' examples have it:
    so pure noise, where sampling begins, has weight 1 and not 0. With `timestep_shift` s > 1 noisy
    steps, where the text matters most, are drawn more often: t -> s·t / (1 + (s − 1)·t), t in 0…1 (Esser et al. 2024,
    equation 23).
    """

    alphas_cumprod: Tensor

    def __init__(
        self, unet: Any, scheduler: Any, text_encoder: Any = None, snr_gamma: float | None = None,
        timestep_shift: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unet, self.text_encoder, self.snr_gamma, self.timestep_shift = (
            unet, text_encoder, snr_gamma, timestep_shift,
        )  # fmt: skip
        self.prediction = scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float(), persistent=False)
        fields = {
            name: value for name, value in unet.config.items() if name[0] != "_"
        }  # diffusers' notes always differ
        parts = {"unet": fields, "text_encoder": text_encoder and text_encoder.config.to_dict()}
        settings = {"prediction_type": self.prediction, "snr_gamma": snr_gamma, "timestep_shift": timestep_shift}
        self.config = PreTrainedConfig(**parts, **settings)

    def forward(
        self, latents: Tensor, text: Tensor | None = None, tokens: dict[str, Tensor] | None = None
    ) -> DiffusionOutput:
        """latents: (batch, channels, height, width), scaled to a standard deviation of about 1. text: states (batch,
        length, width), or `tokens` for the own text encoder. Noise and time steps are drawn; the steps evenly over a
        batch."""
        if tokens is not None:
            text = text_states(self.text_encoder, **tokens)
        batch, steps = len(latents), len(self.alphas_cumprod)
        spread = (torch.arange(batch, device=latents.device) + torch.rand(batch, device=latents.device)) / batch
        spread = self.timestep_shift * spread / (1 + (self.timestep_shift - 1) * spread)
        times = (spread * steps).long().clamp(max=steps - 1)
        noise = torch.randn_like(latents)
        kept = self.alphas_cumprod[times][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        target = noise if self.prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
        predicted = self.unet(noisy, times, text, return_dict=False)[0]
        error = (predicted.float() - target).square().mean((1, 2, 3))
        weight = self.weight(kept.flatten())
        return DiffusionOutput((weight * error).mean(), {"prediction": error.mean()})

    def weight(self, kept: Tensor) -> Tensor:
        """The weight of each image's error: 1, or min-SNR where `snr_gamma` is given. kept: ᾱ of its time step."""
        if self.snr_gamma is None:
            return torch.ones_like(kept)
        snr = kept / (1 - kept).clamp(min=1e-12)
        if self.prediction == "v_prediction":
            snr = snr + 1
        return torch.where(snr > 0, snr.clamp(max=self.snr_gamma) / snr.clamp(min=1e-12), 1.0)

    def save_pretrained(self, folder: str | Path) -> None:
        """All weights in one file, for a checkpoint."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")


def make_unet(channels: int, size: tuple[int, int], text_width: int, overrides: dict[str, Any]) -> Any:
    """A UNet2DConditionModel for latents of `channels` × `size`, conditioned on text states of `text_width`.

    The text also goes into the time embedding, pooled by attention (as in DeepFloyd IF), so that every block knows it.
    `overrides` are fields of the diffusers configuration. Raises ValueError where they do not fit.
    """
    from diffusers import UNet2DConditionModel

    fields: dict[str, Any] = dict(
        sample_size=size[0] if size[0] == size[1] else list(size), in_channels=channels, out_channels=channels,
        block_out_channels=[128, 256], layers_per_block=1, cross_attention_dim=text_width, attention_head_dim=8,
        addition_embed_type="text", addition_embed_type_num_heads=8,
    )  # fmt: skip
    fields.update(overrides)
    levels = len(fields["block_out_channels"])
    fields.setdefault("down_block_types", ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1))
    fields.setdefault("up_block_types", ["CrossAttnUpBlock2D"] * (levels - 1) + ["UpBlock2D"])
    try:
        return UNet2DConditionModel(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"unet_overrides do not make a UNet2DConditionModel: {error}") from error


def make_scheduler(prediction_type: str, beta_schedule: str, zero_terminal_snr: bool) -> Any:
    """The noise that a new denoiser is trained with; `zero_terminal_snr`: the last step is pure noise (Lin et al.
    2024)."""
    from diffusers import DDIMScheduler

    start, end = (0.00085, 0.012) if beta_schedule == "scaled_linear" else (0.0001, 0.02)
    return DDIMScheduler(
        beta_schedule=beta_schedule, beta_start=start, beta_end=end, prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr, timestep_spacing="trailing", clip_sample=False,
        set_alpha_to_one=True,
    )  # fmt: skip
