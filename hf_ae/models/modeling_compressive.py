"""Compressive autoencoders: trained for rate and distortion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .configuration import CompressiveAutoencoderConfig
from .entropy_models import QUALITY_ANCHORS, QUALITY_LEVELS, Hyperprior, QualityTable, Quantized
from .modeling_autoencoder import AutoencoderModel, AutoencoderOutput, EncoderOutput, with_offload_hook

MS_SSIM_SHARE = 1000
"""What `mse+ms_ssim` weighs 1 - MS-SSIM with, beside 255² × mean squared error: about half as much as would make them equal."""


@dataclass
class CompressiveEncoderOutput(EncoderOutput):
    """What `encode` of a [`CompressiveAutoencoderModel`] returns: `latents`, and what the codec writes.

    symbols, scale_index: like the latents; hyper_symbols (batch, hyper-channels, height, width): all whole numbers in
    `eval()`. bits, hyper_bits: as the model estimates them, (batch,). level: quality in 1/128, (batch,).
    """

    symbols: torch.Tensor | None = None
    scale_index: torch.Tensor | None = None
    hyper_symbols: torch.Tensor | None = None
    bits: torch.Tensor | None = None
    hyper_bits: torch.Tensor | None = None
    level: torch.Tensor | None = None


class CompressiveAutoencoderModel(AutoencoderModel):
    """Autoencoder trained for bits per pixel + λ·distortion, one model for all rates (Ballé et al. 2018; Cui et al. 2021).

    ```
    pixel_values -> encoder -> ÷ steps(quality) -> round around the means -> × steps(quality) -> decoder -> reconstruction
                                      |                      |
                                  hyperprior ----------> means, scales -> bits
    ```

    In training quality is drawn for each image, uniform noise stands for rounding where bits are counted, and the decoder
    sees rounded values (straight-through). A λ weighs an image's two terms by (λ of quality ½ / λ)^½, so that no rate
    drowns the others; at quality ½ the loss is the plain one. `latents` are the dequantized code. Means and scales are
    exact in `eval()` (see `entropy_models`), so what `hf_ae.codec` writes is read on any machine.

    Takes pictures of any size: they are padded by repeating their border, and reconstructions cropped.
    """

    config_class = CompressiveAutoencoderConfig
    tables_are_stale = False

    def __init__(self, config):
        super().__init__(config)
        low, high = (math.log(value) for value in config.lambda_range)
        lambdas = [math.exp(low + (high - low) * i / (QUALITY_ANCHORS - 1)) for i in range(QUALITY_ANCHORS)]
        equal = 1 / 2000 if config.reconstruction_loss == "ms_ssim" else 1.0  # λ of MS-SSIM to that of MSE, roughly
        steps = [0.5 * math.log(18 / (math.log(2) * equal * value * 255**2)) for value in lambdas]
        self.log_steps = QualityTable(steps, config.latent_channels)
        self.hyperprior = Hyperprior(config.latent_channels, *config.hyper_channels)
        self.post_init()

    @property
    def is_regularized(self):
        return True

    # What users call

    @with_offload_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True, quality=None):
        """pixel_values -> `.latents` and what the codec writes. `quality`: 0…1, for all or (batch,); see the configuration."""
        self._check_pixels(pixel_values)
        encoded = self._encode(pixel_values.to(self.dtype), quality)
        return encoded if return_dict else encoded.to_tuple()

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True, quality=None):
        """pixel_values -> reconstruction, latents and the loss: rates in bits per pixel, λ·distortion."""
        self._check_pixels(pixel_values)
        pixel_values = pixel_values.to(self.dtype)
        encoded = self._encode(pixel_values, quality)
        rows, columns = pixel_values.shape[2:]
        logits = self._decode(encoded.latents)[..., :rows, :columns]
        reconstruction = self._to_pixels(logits.float())
        lambdas = self.lambda_of(encoded.level)
        weight = (math.sqrt(math.prod(self.config.lambda_range)) / lambdas).sqrt()
        distortion = self.distortion(reconstruction, pixel_values.float())
        losses = {
            "reconstruction": (weight * lambdas * distortion).mean(),
            "latent_rate": (weight * encoded.bits).mean() / (rows * columns),
            "hyper_rate": (weight * encoded.hyper_bits).mean() / (rows * columns),
        }
        loss = torch.stack([*losses.values()]).sum()
        output = AutoencoderOutput(loss, losses, reconstruction.to(logits.dtype), encoded.latents)
        return output if return_dict else output.to_tuple()

    def save_pretrained(self, *args, **kwargs):
        """As every model; the tables of the entropy coder are brought up to date first."""
        self.update_tables()
        return super().save_pretrained(*args, **kwargs)

    # Quality and distortion

    def lambda_of(self, level: torch.Tensor) -> torch.Tensor:
        """λ of quality levels (batch,)."""
        low, high = (math.log(value) for value in self.config.lambda_range)
        return torch.exp(low + (high - low) * level.float() / QUALITY_LEVELS)

    def levels(self, quality, batch: int) -> torch.Tensor:
        """Quality 0…1 (one number, (batch,) or None: as configured, in training at random) -> levels 0…128 (batch,)."""
        if quality is None and self.training:
            return torch.randint(0, QUALITY_LEVELS + 1, (batch,), device=self.device)
        quality = torch.as_tensor(self.config.quality if quality is None else quality, dtype=torch.float32, device=self.device)
        if not bool(((quality >= 0) & (quality <= 1)).all()):
            raise ValueError(f"quality={quality.tolist()} must lie between 0 (smallest files) and 1 (best pictures).")
        return (quality * QUALITY_LEVELS).round().long().expand(batch)

    def distortion(self, reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of each image: 255² × mean squared error, 1 - MS-SSIM, or the first plus MS_SSIM_SHARE of the second; (batch,)."""
        low, high = self.config.pixel_range
        x, y = ((image - low) / (high - low) for image in (reconstruction, target))
        kind = self.config.reconstruction_loss
        error = x.new_zeros(len(x)) if kind == "ms_ssim" else 255**2 * (x - y).square().flatten(1).mean(1)
        if kind == "mse":
            return error
        with torch.autocast(x.device.type, enabled=False):  # variances are small differences
            return error + (1 if kind == "ms_ssim" else MS_SSIM_SHARE) * (1 - ms_ssim(x, y))

    # The codec's view

    def analyse(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values, padded to whole positions -> the code before quantization, float32."""
        low, high = self.config.pixel_range
        rows, columns = pixel_values.shape[2:]
        stride = self.config.downsampling
        x = F.pad((pixel_values - low) / (high - low) - 0.5, (0, -columns % stride, 0, -rows % stride), mode="replicate")
        return self.encoder(x.to(self.dtype))[0].float()

    def update_tables(self):
        """Bring the tables of the entropy coder up to date with trained weights. Loaded models keep the tables they carry."""
        if self.tables_are_stale:
            self.hyperprior.prior.update_table()
            self.tables_are_stale = False

    def quantize(self, code: torch.Tensor, level: torch.Tensor) -> Quantized:
        """The code in quantization steps, rounded around its predicted means, with what the entropy coder needs."""
        return self.hyperprior(code / self.log_steps(level).exp(), level)

    def to_latents(self, values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Code in quantization steps -> latents."""
        return values.float() * self.log_steps(level).exp()

    # The shared inside

    def _encode(self, pixel_values, quality=None):
        if self.training:
            self.tables_are_stale = True
        code = self.analyse(pixel_values)
        level = self.levels(quality, len(code))
        quantized = self.quantize(code, level)
        latents = self.to_latents(quantized.values, level).to(self.dtype)
        return CompressiveEncoderOutput(latents=latents, level=level, **{k: v for k, v in quantized._asdict().items() if k != "values"})

    def _to_pixels(self, logits):
        low, high = self.config.pixel_range
        pixels = (logits + 0.5) * (high - low) + low
        return pixels if self.training else pixels.clamp(low, high)


def ms_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity (Wang et al. 2003) of images in 0…1 of at least 161 pixels: (batch,)."""
    position = torch.arange(11, device=x.device) - 5.0
    window = torch.exp(-position.square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(x.shape[1], 1, 1, 11)

    def blur(image):
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
