"""A denoiser that draws in few steps, without guidance, what another draws in many guided ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..pipelines.text_to_image import guide
from .denoiser import DiffusionOutput, LatentDiffusion


class Distillation(LatentDiffusion):
    """Progressive distillation (Salimans and Ho 2022, algorithm 2) of guided sampling (Meng et al. 2023).

    The `unet`, which begins as a copy of the teacher, learns to do in one of `steps` DDIM steps what two guided ones
    of the teacher do. `empty` (1, tokens, width): the states of the empty prompt.
    """

    def __init__(self, unet: Any, scheduler: Any, empty: Tensor, steps: int, guidance_scale: float) -> None:
        super().__init__(unet, scheduler)
        most = len(self.alphas_cumprod) // 2
        require(
            1 <= steps <= most, f"distill={steps} must be between 1 and {most}: each step is two of the teacher's."
        )
        self.__dict__["teacher"] = deepcopy(unet).requires_grad_(False).eval()  # no part of the model: checkpoints
        self.empty, self.steps, self.guidance_scale = empty, steps, guidance_scale
        self.config.distill, self.config.guidance_scale = steps, guidance_scale

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Where the unet goes, the teacher goes, too."""
        self.__dict__["teacher"]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(
        self, latents: Tensor, text: Tensor | None = None, tokens: dict[str, Tensor] | None = None
    ) -> DiffusionOutput:
        """latents, text: as of [`LatentDiffusion`]. The loss is the squared error of what the unet should predict."""
        assert text is not None, "the text encoder of a distilled pipeline is frozen"
        batch, trained = len(latents), len(self.alphas_cumprod)
        first = torch.randint(self.steps, ())  # so that small batches come to all steps, too
        which = (torch.arange(batch) + first).to(latents.device) % self.steps + 1
        times = (which * trained / self.steps).round().long() - 1
        noise = torch.randn_like(latents)
        kept = self.kept(times)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        with torch.no_grad():
            target = self.target(noisy, times, text)
        predicted = self.unet(noisy, times, text, return_dict=False)[0]
        error = (predicted.float() - target).square().mean()
        return DiffusionOutput(error, {"prediction": error})

    def target(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """What the unet has to predict, so that one DDIM step lands where the teacher's two land."""
        step = len(self.alphas_cumprod) // self.steps
        middle, end = times - step // 2, times - step
        halfway = self.ddim(noisy, self.taught(noisy, times, text), times, middle)
        there = self.ddim(halfway, self.taught(halfway, middle, text), middle, end)
        kept, left = self.kept(times), self.kept(end)
        fraction = ((1 - left) / (1 - kept)).sqrt()
        clean = (there - fraction * noisy) / (left.sqrt() - fraction * kept.sqrt())
        if self.prediction == "epsilon":
            return (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()
        return (kept.sqrt() * noisy - clean) / (1 - kept).sqrt()

    def taught(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """What the guided teacher predicts."""
        both = torch.cat([self.empty.to(text).expand(len(text), -1, -1), text])
        teacher = self.__dict__["teacher"]
        predicted = teacher(torch.cat([noisy] * 2), torch.cat([times] * 2), both, return_dict=False)[0]
        return guide(predicted.float(), self.guidance_scale, 0.0)

    def ddim(self, noisy: Tensor, predicted: Tensor, times: Tensor, end: Tensor) -> Tensor:
        """A deterministic step (Song et al. 2021, equation 12) to the times `end`."""
        kept, left = self.kept(times), self.kept(end)
        if self.prediction == "epsilon":
            noise, clean = predicted, (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
        else:
            clean = kept.sqrt() * noisy - (1 - kept).sqrt() * predicted
            noise = kept.sqrt() * predicted + (1 - kept).sqrt() * noisy
        return left.sqrt() * clean + (1 - left).sqrt() * noise

    def kept(self, times: Tensor) -> Tensor:
        """ᾱ of time steps, for images; 1 before the first."""
        kept = self.alphas_cumprod[times.clamp(min=0)]
        return torch.where(times < 0, 1.0, kept)[:, None, None, None]
