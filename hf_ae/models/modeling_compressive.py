"""Compressive autoencoders: trained for rate and distortion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration_compressive import CompressiveAutoencoderConfig
from .entropy_models import QUALITY_ANCHORS, QUALITY_LEVELS, Hyperprior, QualityTable, Quantized
from .modeling_autoencoder import (
    ALWAYS_GIVEN,
    AutoencoderModel,
    AutoencoderOutput,
    EncoderOutput,
    check_unused,
    with_offload_hook,
)

MS_SSIM_WEIGHT = 1000
"""What `mse+ms_ssim` weighs 1 - MS-SSIM with, beside 255² × mean squared error: about half as much as would make them
equal."""


@dataclass
class CompressiveEncoderOutput(EncoderOutput):
    """What `encode` of a [`CompressiveAutoencoderModel`] returns: `latents`, and what the codec writes.

    symbols, scale_index: like the latents; hyper_symbols (batch, hyper-channels, height, width): all whole numbers in
    `eval()`. bits, hyper_bits: as the model estimates them, (batch,). level: quality in 1/128, (batch,).
    """

    symbols: Tensor = ALWAYS_GIVEN
    scale_index: Tensor = ALWAYS_GIVEN
    hyper_symbols: Tensor = ALWAYS_GIVEN
    bits: Tensor = ALWAYS_GIVEN
    hyper_bits: Tensor = ALWAYS_GIVEN
    level: Tensor = ALWAYS_GIVEN


class CompressiveAutoencoderModel(AutoencoderModel):
    """Autoencoder trained for bits per pixel + λ·distortion, one model for all rates.

    ```
    pixel_values -> encoder -> ÷ steps(quality) -> round around means -> × steps(quality) -> decoder -> reconstruction
                                      |                      |
                                  hyperprior ----------> means, scales -> bits
    ```

    After Ballé et al. 2018 and Cui et al. 2021. In training quality is drawn for each image, uniform noise stands for
    rounding where bits are counted, and the decoder sees rounded values (straight-through). A λ weighs an image's two
    terms by (λ of quality ½ / λ)^½, so that no rate drowns the others; at quality ½ the loss is the plain one.
    `latents` are dequantized. Means and scales are exact in `eval()` (see `entropy_models`), so what `hf_ae.codec`
    writes is read on any machine.

    Takes images of any size: they are padded by repeating their border, and reconstructions cropped.
    """

    config: CompressiveAutoencoderConfig
    config_class = CompressiveAutoencoderConfig
    is_regularized = True
    codec_method = "hyperprior"
    tables_are_stale = False
    """Whether the weights were trained after the tables of the entropy coder were made."""

    def __init__(self, config: CompressiveAutoencoderConfig) -> None:
        super().__init__(config)
        low, high = (math.log(value) for value in config.lambda_range)
        lambdas = [math.exp(low + (high - low) * i / (QUALITY_ANCHORS - 1)) for i in range(QUALITY_ANCHORS)]
        equal = 1 / 2000 if config.reconstruction_loss == "ms_ssim" else 1.0  # λ of MS-SSIM to that of MSE, roughly
        steps = [0.5 * math.log(18 / (math.log(2) * equal * value * 255**2)) for value in lambdas]
        channels = config.latent_shape[0]
        self.log_steps = QualityTable(steps, channels)
        self.hyperprior = Hyperprior(channels, *config.hyper_channels)
        self.post_init()

    # What users call

    @with_offload_hook
    def encode(
        self, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool | None = None,
        quality: float | Tensor | None = None,
    ) -> CompressiveEncoderOutput | tuple[Any, ...]:  # fmt: skip
        """pixel_values -> `.latents` and what the codec writes. `quality`: 0…1, for all or (batch,); see the
        configuration."""
        self._check_pixels(pixel_values)
        hidden_states = self._hidden_states(output_hidden_states)
        encoded: Any = self._encode(pixel_values.to(self.dtype), hidden_states, quality=quality)
        return encoded if self._as_dict(return_dict) else encoded.to_tuple()

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool | None = None,
        return_loss: bool = True, *, quality: float | Tensor | None = None, **unused: Any,
    ) -> AutoencoderOutput | tuple[Any, ...]:  # fmt: skip
        """pixel_values -> reconstruction, latents and the loss: rates in bits per pixel, λ·distortion."""
        check_unused(unused)
        self._check_pixels(pixel_values)
        hidden_states = self._hidden_states(output_hidden_states)
        output = self._run(pixel_values, pixel_values, return_loss, hidden_states, quality=quality)
        return output if self._as_dict(return_dict) else output.to_tuple()

    def loss_terms(self, encoded: Any, logits: Tensor, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        lambdas, size = self.lambda_of(encoded.level), target.shape[2] * target.shape[3]
        weight = (math.sqrt(math.prod(self.config.lambda_range)) / lambdas).sqrt()
        distortion = self.distortion(reconstruction, target)
        return {
            "reconstruction": (weight * lambdas * distortion).mean(),
            "latent_rate": (weight * encoded.bits).mean() / size,
            "hyper_rate": (weight * encoded.hyper_bits).mean() / size,
        }

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every model; the tables of the entropy coder are brought up to date first."""
        self.update_tables()
        super().save_pretrained(*args, **kwargs)

    # The steps of the flow

    def bottleneck(self, encoder_output: Tensor, quality: float | Tensor | None = None) -> CompressiveEncoderOutput:
        if self.training:
            self.tables_are_stale = True
        level = self.levels(quality, encoder_output.shape[0])
        written = self.quantize(encoder_output.float(), level)._asdict()
        latents = self.to_latents(written.pop("values"), level).to(self.dtype)
        return CompressiveEncoderOutput(latents=latents, level=level, **written)

    # Quality and distortion

    def lambda_of(self, level: Tensor) -> Tensor:
        """λ of quality levels (batch,)."""
        low, high = (math.log(value) for value in self.config.lambda_range)
        return torch.exp(low + (high - low) * level.float() / QUALITY_LEVELS)

    def levels(self, quality: float | Tensor | None, batch: int) -> Tensor:
        """Quality 0…1 (one number, (batch,) or None: as configured, in training at random) -> levels 0…128 (batch,).
        Raises ValueError for a quality outside 0…1."""
        if quality is None and self.training:
            return torch.randint(0, QUALITY_LEVELS + 1, (batch,), device=self.device)
        given = self.config.quality if quality is None else quality
        quality = torch.as_tensor(given, dtype=torch.float32, device=self.device)
        if isinstance(given, Tensor):
            good = torch.compiler.is_compiling() or bool(((quality >= 0) & (quality <= 1)).all())
        else:
            good = 0 <= given <= 1  # without waiting for the device
        if not good:
            raise ValueError(f"quality={quality.tolist()} must lie between 0 (smallest files) and 1 (best images).")
        return (quality * QUALITY_LEVELS).round().long().expand(batch)

    def distortion(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Of each image: 255² × mean squared error, 1 - MS-SSIM, or the first plus MS_SSIM_WEIGHT × the second;
        (batch,)."""
        low, high = self.config.pixel_range
        x, y = ((image - low) / (high - low) for image in (reconstruction, target))
        kind = self.config.reconstruction_loss
        error = x.new_zeros(len(x)) if kind == "ms_ssim" else 255**2 * (x - y).square().flatten(1).mean(1)
        if kind == "mse":
            return error
        with torch.autocast(x.device.type, enabled=False):  # variances are small differences
            return error + (1 if kind == "ms_ssim" else MS_SSIM_WEIGHT) * (1 - ms_ssim(x, y))

    # The codec's view

    def analyse(self, pixel_values: Tensor) -> Tensor:
        """pixel_values, padded to whole positions -> the latents before quantization, float32."""
        return self._encoder_output(pixel_values)[0].float()

    def update_tables(self) -> None:
        """Bring the tables of the entropy coder up to date with trained weights. Loaded models keep the tables they
        carry."""
        if self.tables_are_stale:
            self.hyperprior.prior.update_table()
            self.tables_are_stale = False

    def quantize(self, latents: Tensor, level: Tensor) -> Quantized:
        """The latents in quantization steps, rounded around predicted means, with what the entropy coder needs."""
        return self.hyperprior(latents / self.log_steps(level).exp(), level)

    def to_latents(self, values: Tensor, level: Tensor) -> Tensor:
        """Values in quantization steps -> latents, float32."""
        return values.float() * self.log_steps(level).exp()

    # Internals

    def _encoder_output(
        self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        low, high = self.config.pixel_range
        rows, columns = pixel_values.shape[2:]
        stride = self.config.downsampling
        padding = (0, -columns % stride, 0, -rows % stride)
        x = F.pad((pixel_values - low) / (high - low) - 0.5, padding, mode="replicate")
        return super()._encoder_output(x.to(self.dtype), hidden_states)

    def _to_pixels(self, logits: Tensor) -> Tensor:
        low, high = self.config.pixel_range
        pixels = (logits + 0.5) * (high - low) + low
        return pixels if self.training else pixels.clamp(low, high)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003): (batch,).

    Of images (batch, channels, height, width) in 0…1, so high and wide that the window of 11 pixels still fits after
    four halvings.
    """
    position = torch.arange(11, device=x.device) - 5.0
    window = torch.exp(-position.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 1, 11)

    def blur(image: Tensor) -> Tensor:
        image = F.conv2d(image, window, groups=x.shape[1])
        return F.conv2d(image, window.transpose(2, 3), groups=x.shape[1])

    weights, result = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333), torch.ones(len(x), x.shape[1], device=x.device)
    for scale, weight in enumerate(weights):
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        term = (2 * cov + 0.03**2) / (var_x + var_y + 0.03**2)
        if scale == len(weights) - 1:
            term = term * (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        result = result * term.flatten(2).mean(2).clamp(min=1e-6) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result.mean(1)
