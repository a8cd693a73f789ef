"""Modules of hf_ae, joined into one file: change them there."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field
from itertools import pairwise
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, logging
from typing import Any
import dataclasses
import difflib
import math
import torch


# bottlenecks.py

"""What happens to the code between encoder and decoder."""


class DiagonalGaussian:
    """A Gaussian with a diagonal covariance for each image: the posterior q(z|x) of a VAE (Kingma and Welling, 2014).

    `parameters` holds means and log-variances side by side in dimension 1: (batch, 2·latent_dim) or
    (batch, 2·latent_channels, height, width). Log-variances are limited to [-30, 20].
    """

    def __init__(self, parameters: torch.Tensor):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> torch.Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """mean + std·ε with ε ~ N(0, 1): the reparameterization that lets gradients through."""
        where = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=where, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> torch.Tensor:
        """The most probable code, which is the mean."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """KL(q ‖ N(0, 1)) in nats, summed over the code: (batch,). Appendix B of Kingma and Welling."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log q(z) in nats of each value of `z`, in the shape that `z` and the mean broadcast to."""
        return gaussian_log_prob(z, self.mean, self.logvar)


def gaussian_log_prob(z: torch.Tensor, mean, logvar) -> torch.Tensor:
    """log N(z; mean, exp(logvar)), value by value, in nats."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    return -0.5 * (1.8378770664093453 + logvar + (z - mean).square() * torch.exp(-logvar))


def total_correlation_terms(z: torch.Tensor, posterior: DiagonalGaussian, dataset_size: int) -> dict[str, torch.Tensor]:
    """KL(q(z|x) ‖ p(z)), averaged over the data, in three parts (Chen et al. 2018, equation 2).

    mutual information I(x; z) + total correlation KL(q(z) ‖ Π q(z_j)) + dimension-wise KL Σ KL(q(z_j) ‖ p(z_j)).
    q(z) is estimated by minibatch stratified sampling (their appendix C.2): `z` (batch, latent_dim) are samples of
    `posterior`, drawn from a data set of `dataset_size` images. Returns three scalars in nats.
    """
    n, size = len(z), max(dataset_size, len(z))
    log_q_zx = posterior.log_prob(z).sum(1)
    pairs = gaussian_log_prob(z[:, None], posterior.mean[None], posterior.logvar[None])  # (sample, image, latent_dim)
    log_weights = stratified_log_weights(n, size, z.device)
    log_q_z = torch.logsumexp(log_weights + pairs.sum(2), dim=1)
    log_q_each = torch.logsumexp(log_weights[..., None] + pairs, dim=1).sum(1)
    log_p = gaussian_log_prob(z, 0.0, 0.0).sum(1)
    return {
        "mutual_information": (log_q_zx - log_q_z).mean(),
        "total_correlation": (log_q_z - log_q_each).mean(),
        "dimension_wise_kl": (log_q_each - log_p).mean(),
    }


def stratified_log_weights(batch: int, dataset_size: int, device=None) -> torch.Tensor:
    """log w[i, j]: how much image j stands for in an estimate of q(z_i), (batch, batch). Rows sum to 1 (nearly).

    An image stands for itself alone (1/N), one other for all that the batch does not hold, the rest for 1/M each.
    """
    if batch == 1:
        return torch.zeros(1, 1, device=device)
    others = batch - 1
    weights = torch.full((batch, batch), 1.0 / others, device=device)
    weights.fill_diagonal_(1.0 / dataset_size)
    index = torch.arange(batch, device=device)
    weights[index, (index + 1) % batch] = (dataset_size - others) / (dataset_size * others)
    return weights.log()


# configuration.py

"""Every configuration of the family. A field is documented on the lines below it."""


# What transformers itself passes or stores beside the fields; anything else is a typing error of the user.
_FRAMEWORK_KEYS = {
    "model_type", "auto_map", "torch_dtype", "name_or_path", "attn_implementation", "experts_implementation",
    "output_attentions", "num_labels", "use_cache", "quantization_config",
}  # fmt: skip

_RESIDUAL = ("resnet", "transform")
"""Networks of residual blocks, on patches."""


class AutoencoderConfig(PreTrainedConfig):
    """Configuration of [`AutoencoderModel`], and the fields that every image variant shares.

    The defaults make a small fully connected autoencoder for 28×28 gray images. Values are checked when the
    configuration is made: an unknown field, a wrong type or two fields that contradict each other raise ValueError.
    """

    model_type = "hf_ae_autoencoder"

    image_size: int | list[int] = 28
    """Height and width in pixels: one number for both, or `[height, width]`."""
    num_channels: int = 1
    """Colour channels of `pixel_values`: 1 gray, 3 RGB, 4 RGBA; any number for arrays."""
    network: str = "mlp"
    """`mlp` (fully connected), `conv` (one convolution a level) or `resnet` (residual blocks with group norm)."""
    hidden_sizes: list[int] = field(default_factory=lambda: [512])
    """mlp: widths of the encoder's hidden layers. conv: channels of each level, each halves height and width.
    resnet: channels of each level, each after the first halves. The decoder mirrors the encoder."""
    activation: str = "silu"
    """`sigmoid`, `relu`, `gelu` or `silu`."""
    latent_dim: int | None = None
    """Length of a vector code. Give this or `latent_channels`; with neither: 32 (mlp, conv) or 4 channels (resnet)."""
    latent_channels: int | None = None
    """Channels of a spatial code (conv and resnet)."""
    latent_activation: str = "identity"
    """Applied to the code: `identity`, `sigmoid` or `relu`."""
    num_res_blocks: int | None = None
    """Residual blocks of each level (resnet, default 1)."""
    patch_size: int | None = None
    """Pixels of a square of this side enter and leave as channels of one position (resnet, default 1: no patches). With 4,
    a network of several times the channels costs as much."""
    downsample: str | None = None
    """How conv halves: `stride` (default) or `maxpool`."""
    upsample: str | None = None
    """How conv doubles: `transpose` (default), `unpool` (at the positions that max-pooling remembered: needs
    `downsample="maxpool"`) or `nearest` (nearest neighbour, then a convolution)."""
    reconstruction_loss: str = "mse"
    """`mse`, `bce` (binary cross-entropy, pixel_range [0, 1]) or `l1`: summed over an image, averaged over the batch."""
    pixel_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """What `pixel_values` and reconstructions are in: `[0.0, 1.0]` (decoder ends in a sigmoid) or `[-1.0, 1.0]` (linear)."""
    scaling_factor: float = 1.0
    """1 / standard deviation of the latents, for diffusion: pipelines multiply latents by it and divide before `decode`."""

    choices = {
        "network": ("mlp", "conv", "resnet"),
        "activation": ("sigmoid", "relu", "gelu", "silu"),
        "latent_activation": ("identity", "sigmoid", "relu"),
        "downsample": (None, "stride", "maxpool"),
        "upsample": (None, "transpose", "unpool", "nearest"),
        "reconstruction_loss": ("mse", "bce", "l1"),
        "pixel_range": ([0.0, 1.0], [-1.0, 1.0]),
    }
    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        self._check_types()
        self.hidden_sizes = list(self.hidden_sizes)
        self.pixel_range = [float(value) for value in self.pixel_range]
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size)
        for name, accepted in self.choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: write one of {_listed(accepted)}.")
        self.fill_defaults()
        super().__post_init__(**kwargs)
        self.check()

    def _refuse_unknown(self, kwargs):
        known = [spec.name for spec in dataclasses.fields(self)]
        accepted = _FRAMEWORK_KEYS | set(GenerationConfig._get_default_generation_params())
        for name in kwargs:
            if name in accepted or name.startswith("_"):
                continue
            near = difflib.get_close_matches(name, known, n=1)
            own = [n for n in known if n not in PreTrainedConfig.__dataclass_fields__]
            advice = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(own)}."
            raise ValueError(f"{type(self).__name__} has no field {name!r}: {advice}")

    def _check_types(self):
        for spec in dataclasses.fields(self):
            if spec.name in PreTrainedConfig.__dataclass_fields__:
                continue
            value, accepted = getattr(self, spec.name), str(spec.type).split(" | ")
            fits = any(_fits(value, kind) for kind in accepted)
            if not fits:
                raise ValueError(f"{spec.name}={value!r} has the wrong type: write {spec.type}.")

    def fill_defaults(self):
        """Fill what depends on other fields."""
        if self.latent_dim is None and self.latent_channels is None:
            if self.network in _RESIDUAL:
                self.latent_channels = 4
            else:
                self.latent_dim = 32
        if self.network == "conv":
            self.downsample = self.downsample or "stride"
            self.upsample = self.upsample or "transpose"
        if self.network in _RESIDUAL:
            self.num_res_blocks = 1 if self.num_res_blocks is None else self.num_res_blocks
            self.patch_size = 1 if self.patch_size is None else self.patch_size

    def check(self):
        """Raise ValueError where fields contradict each other."""
        if self.latent_dim is not None and self.latent_channels is not None:
            raise ValueError("latent_dim (a vector code) and latent_channels (a spatial code) contradict each other: keep one.")
        sizes = {"image_size": self.image_hw, "num_channels": [self.num_channels], "hidden_sizes": self.hidden_sizes,
                 "latent_dim": [self.latent_dim or 1], "latent_channels": [self.latent_channels or 1],
                 "num_res_blocks": [self.num_res_blocks or 1], "patch_size": [self.patch_size or 1]}  # fmt: skip
        for name, values in sizes.items():
            if min(values, default=1) < 1 or any(isinstance(v, float) for v in values) or getattr(self, name) == 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive whole numbers.")
        if len(self.image_hw) != 2:
            raise ValueError(f"image_size={self.image_size!r} must be one number or [height, width].")
        if self.network == "mlp" and self.latent_channels is not None:
            raise ValueError("network='mlp' has no spatial code: write latent_dim, not latent_channels, or network='conv'.")
        if self.network != "conv" and (self.downsample or self.upsample):
            raise ValueError(
                f"downsample and upsample belong to network='conv', not {self.network!r}: leave them out, or write network='conv'."
            )
        for name in ("num_res_blocks", "patch_size"):
            if self.network not in _RESIDUAL and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to network='resnet', not {self.network!r}: leave it out, or write network='resnet'.")
        if (self.patch_size or 1).bit_count() != 1:
            raise ValueError(f"patch_size={self.patch_size} must be a power of two: 1, 2, 4, 8.")
        if self.network != "mlp" and not self.hidden_sizes:
            raise ValueError(f"network={self.network!r} needs at least one value in hidden_sizes, such as [32, 64].")
        if self.upsample == "unpool" and self.downsample != "maxpool":
            raise ValueError("upsample='unpool' needs the positions that max-pooling remembers: write downsample='maxpool'.")
        if self.reconstruction_loss == "bce" and self.pixel_range != [0.0, 1.0]:
            raise ValueError("reconstruction_loss='bce' needs pixel_range=[0.0, 1.0] (or write reconstruction_loss='mse').")
        if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise ValueError(f"scaling_factor={self.scaling_factor} must be positive: latents are multiplied and divided by it.")
        self.check_size(*self.image_hw)

    def check_size(self, height: int, width: int):
        """Raise ValueError when the network cannot halve `height` × `width` as often as it has levels."""
        factor = self.downsampling
        if height % factor or width % factor:
            patches = f", patch_size={self.patch_size}" if (self.patch_size or 1) > 1 else ""
            near = [[max(1, v // factor) * factor, (v // factor + 1) * factor] for v in (height, width)]
            raise ValueError(
                f"image_size {height}×{width} does not divide by {factor} (hidden_sizes={self.hidden_sizes}{patches}): use multiples "
                f"of {factor}, such as {near[0][0]} or {near[0][1]} high and {near[1][0]} or {near[1][1]} wide, or fewer hidden_sizes."
            )

    @property
    def image_hw(self) -> list[int]:
        """`[height, width]` of an image."""
        return [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def downsampling(self) -> int:
        """How many pixels high and wide one position of the encoder's last feature map is."""
        if self.network in _RESIDUAL:
            return (self.patch_size or 1) * 2 ** (len(self.hidden_sizes) - 1)
        return 2 ** len(self.hidden_sizes) if self.network == "conv" else 1

    @property
    def code_shape(self) -> list[int]:
        """Shape of the code of one image: `[latent_dim]` or `[latent_channels, height, width]`."""
        if self.latent_channels is None:
            return [self.latent_dim or 0]
        return [self.latent_channels, *(size // self.downsampling for size in self.image_hw)]

    @property
    def num_pixels(self) -> int:
        """Values in one image."""
        return self.num_channels * math.prod(self.image_hw)

    @property
    def block_out_channels(self) -> list[int]:
        """As diffusers counts levels: 2^(len - 1) pixels to a latent position."""
        levels = int(math.log2(self.downsampling)) + 1
        return self.hidden_sizes[:1] * (levels - len(self.hidden_sizes)) + self.hidden_sizes


class SparseAutoencoderConfig(AutoencoderConfig):
    """Configuration of [`SparseAutoencoderModel`]."""

    model_type = "hf_ae_sparse"

    sparsity: str = "l1"
    """`l1` (sum of absolute code values), `kl` (mean activation against `sparsity_target`: needs
    `latent_activation="sigmoid"`) or `none`."""
    sparsity_weight: float = 0.1
    """λ: the weight of the penalty."""
    sparsity_target: float = 0.05
    """ρ: the wanted mean activation of a unit, for `kl`."""

    choices = {**AutoencoderConfig.choices, "sparsity": ("l1", "kl", "none")}

    def check(self):
        super().check()
        if self.sparsity == "kl" and self.latent_activation != "sigmoid":
            raise ValueError("sparsity='kl' compares mean activations in (0, 1): write latent_activation='sigmoid' (or sparsity='l1').")
        if not 0 < self.sparsity_target < 1:
            raise ValueError(f"sparsity_target={self.sparsity_target} must lie between 0 and 1.")
        if self.sparsity_weight < 0:
            raise ValueError(f"sparsity_weight={self.sparsity_weight} must not be negative.")


class DenoisingAutoencoderConfig(SparseAutoencoderConfig):
    """Configuration of [`DenoisingAutoencoderModel`]; sparsity is optional and off unless asked for."""

    model_type = "hf_ae_denoising"

    network: str = "mlp"
    """As in [`AutoencoderConfig`], or `transform` (a DCT of patches, plus residual blocks; with `latent_channels` and
    `pixel_range=[-1, 1]`): it starts by giving back what the code keeps of the damaged picture, and learns the repair."""
    corruption: str = "gaussian"
    """`gaussian`, `masking`, `salt_pepper`, `low_resolution` or `grayscale`."""
    corruption_level: float = 0.3
    """gaussian: standard deviation, in units of the pixel range's width. masking and salt_pepper: share of the pixels
    hit. low_resolution: whole factor, at least 2. grayscale: unused."""
    sparsity: str = "none"
    """As in [`SparseAutoencoderConfig`]."""

    choices = {
        **SparseAutoencoderConfig.choices,
        "network": (*AutoencoderConfig.choices["network"], "transform"),
        "corruption": ("gaussian", "masking", "salt_pepper", "low_resolution", "grayscale"),
    }

    def check(self):
        super().check()
        level = self.corruption_level
        if self.network == "transform" and (self.latent_channels is None or self.pixel_range != [-1.0, 1.0]):
            raise ValueError("network='transform' has a spatial code and no sigmoid: write latent_channels and pixel_range=[-1, 1].")
        if self.corruption == "grayscale" and self.num_channels != 3:
            raise ValueError(f"corruption='grayscale' needs num_channels=3, not {self.num_channels}.")
        if self.corruption == "low_resolution" and (level != int(level) or level < 2):
            raise ValueError(f"corruption='low_resolution' needs a whole corruption_level of at least 2, not {level}.")
        if self.corruption in ("masking", "salt_pepper") and not 0 <= level <= 1:
            raise ValueError(f"corruption={self.corruption!r} needs a corruption_level from 0 to 1, not {level}.")
        if level < 0:
            raise ValueError(f"corruption_level={level} must not be negative.")


class ContractiveAutoencoderConfig(AutoencoderConfig):
    """Configuration of [`ContractiveAutoencoderModel`]."""

    model_type = "hf_ae_contractive"

    contraction_weight: float = 0.1
    """λ: the weight of ‖∂code/∂x‖²_F."""

    def check(self):
        super().check()
        if self.contraction_weight < 0:
            raise ValueError(f"contraction_weight={self.contraction_weight} must not be negative.")


class VAEConfig(AutoencoderConfig):
    """Configuration of [`VAEModel`]."""

    model_type = "hf_ae_vae"

    kl_weight: float = 1.0
    """Weight of the KL term. 1 gives the evidence lower bound. With a tiny weight (latent diffusion uses 1e-6) the code
    does not follow N(0, 1), so decoding samples of N(0, 1) gives noise."""

    def check(self):
        super().check()
        if self.upsample == "unpool":
            raise ValueError("upsample='unpool' needs positions that a sampled code does not have: write 'transpose' or 'nearest'.")
        if self.latent_activation != "identity":
            raise ValueError("latent_activation must stay 'identity' here: a Gaussian posterior covers all real numbers.")
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative.")


class BetaVAEConfig(VAEConfig):
    """Configuration of [`BetaVAEModel`]."""

    model_type = "hf_ae_beta_vae"

    objective: str = "beta"
    """`beta` (β·KL, Higgins 2017), `capacity` (β·|KL − C|, C growing from 0 to `capacity`, Burgess 2018) or
    `total_correlation` (mutual information + β·TC + dimension-wise KL, Chen 2018)."""
    beta: float = 4.0
    """β, called γ by Burgess et al."""
    capacity: float | None = None
    """Final C in nats (objective `capacity`, default 25)."""
    capacity_steps: int | None = None
    """Training forward passes until C is reached (objective `capacity`, default 10,000)."""
    dataset_size: int | None = None
    """Images in the training set (objective `total_correlation`; hf_ae.train fills it in)."""

    choices = {**VAEConfig.choices, "objective": ("beta", "capacity", "total_correlation")}

    def fill_defaults(self):
        super().fill_defaults()
        if self.objective == "capacity":
            self.capacity = 25.0 if self.capacity is None else self.capacity
            self.capacity_steps = 10_000 if self.capacity_steps is None else self.capacity_steps

    def check(self):
        super().check()
        if self.kl_weight != 1.0:
            raise ValueError("kl_weight belongs to hf_ae_vae: write beta instead.")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative.")
        if self.objective != "capacity" and (self.capacity is not None or self.capacity_steps is not None):
            raise ValueError(f"capacity and capacity_steps contradict objective={self.objective!r}: write objective='capacity'.")
        if self.objective == "total_correlation" and self.latent_dim is None:
            raise ValueError("objective='total_correlation' needs a vector code: write latent_dim.")
        if self.capacity_steps is not None and self.capacity_steps < 1:
            raise ValueError(f"capacity_steps={self.capacity_steps} must be at least 1.")


class CompressiveAutoencoderConfig(AutoencoderConfig):
    """Configuration of [`CompressiveAutoencoderModel`]. The defaults suit photos: 96 channels at 1/8 of the resolution."""

    model_type = "hf_ae_compressive"

    image_size: int | list[int] = 256
    """Height and width in training; the model takes any size."""
    num_channels: int = 3
    """1 gray or 3 RGB."""
    network: str = "transform"
    """`transform`: a DCT of patches, plus residual blocks."""
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 128])
    """Channels of each level, from `patch_size` on; each after the first halves."""
    latent_channels: int | None = 96
    """Channels of the code."""
    patch_size: int | None = 4
    """The residual part begins on squares of this side: the code's stride is `patch_size`·2^(len(hidden_sizes) - 1) pixels."""
    num_res_blocks: int | None = 2
    """Residual blocks of each level."""
    hyper_channels: list[int] = field(default_factory=lambda: [80, 48])
    """Channels inside the hyperprior's networks, and of the hyper-latents (1/4 of the code's height and width)."""
    reconstruction_loss: str = "mse"
    """The distortion: `mse` (times 255²), `ms_ssim` (1 - MS-SSIM; images of at least 161 pixels), or `mse+ms_ssim`."""
    lambda_range: list[float] = field(default_factory=lambda: [0.0006, 0.03])
    """λ of the loss bits per pixel + λ·distortion, at quality 0 and at quality 1; its logarithm is linear between."""
    quality: float = 0.5
    """0 (smallest files) to 1: what `encode` and the codec take where none is asked for. In training it is drawn at random."""

    choices = {
        **AutoencoderConfig.choices,
        "network": ("transform",),
        "latent_activation": ("identity",),
        "reconstruction_loss": ("mse", "ms_ssim", "mse+ms_ssim"),
    }

    def check(self):
        super().check()
        if self.latent_channels is None:
            raise ValueError("hf_ae_compressive has a spatial code: write latent_channels, not latent_dim.")
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels={self.num_channels} must be 1 (gray) or 3 (RGB) here.")
        if len(self.hyper_channels) != 2 or not all(1 <= width <= 1024 for width in self.hyper_channels):
            raise ValueError(f"hyper_channels={self.hyper_channels} must be two whole numbers from 1 to 1024, such as [80, 48].")
        if len(self.lambda_range) != 2 or not 0 < self.lambda_range[0] < self.lambda_range[1] < math.inf:
            raise ValueError(f"lambda_range={self.lambda_range} must be two rising positive numbers, such as [0.0006, 0.03].")
        if not 0 <= self.quality <= 1:
            raise ValueError(f"quality={self.quality} must lie between 0 and 1.")
        if self.reconstruction_loss != "mse" and min(self.image_hw) < 161:
            raise ValueError(
                f"reconstruction_loss={self.reconstruction_loss!r} needs an image_size of at least 161, not {self.image_size}: write 'mse'."
            )

    def check_size(self, height: int, width: int):
        """Any size works: pictures are padded."""

    @property
    def code_shape(self) -> list[int]:
        """Shape of the code of one image: `[latent_channels, height, width]`."""
        return [self.latent_channels or 0, *(-(-size // self.downsampling) for size in self.image_hw)]


def _listed(values) -> str:
    return ", ".join(repr(value) for value in values)


def _fits(value, kind: str) -> bool:
    """Whether a value is of the type that an annotation names; a whole number may stand for a float, a tuple for a list."""
    if kind.startswith("list["):
        return isinstance(value, list | tuple) and all(_fits(v, kind[5:-1]) for v in value)
    if kind in ("int", "float"):
        return isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
    return value is None if kind == "None" else isinstance(value, {"str": str, "bool": bool}[kind])


# networks.py

"""Encoders and decoders: mlp, conv, resnet, transform.

An encoder maps `pixel_values` (batch, channels, height, width) to `(code, positions)`: the code before the bottleneck,
and the positions that max-pooling remembered, finest first (an empty list where there are none). A decoder maps a code
and such positions to logits of the shape of `pixel_values`. With `latent_channels` the convolutional networks take any
size that divides.
"""


ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}


def build_encoder(config, values_per_code: int = 1) -> nn.Module:
    """The encoder that `config` asks for, with `values_per_code` outputs for each value of the code."""
    kinds = {"mlp": MLPEncoder, "conv": ConvEncoder, "resnet": ResnetEncoder, "transform": TransformEncoder}
    return kinds[config.network](config, values_per_code)


def build_decoder(config) -> nn.Module:
    """The mirrored decoder."""
    kinds = {"mlp": MLPDecoder, "conv": ConvDecoder, "resnet": ResnetDecoder, "transform": TransformDecoder}
    return kinds[config.network](config)


class MLPLayer(GradientCheckpointingLayer):
    def __init__(self, inputs: int, outputs: int, activation: str):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x):
        return self.activation(self.linear(x))


class MLPEncoder(nn.Module):
    """pixels -> hidden_sizes -> code"""

    gradient_checkpointing = False  # with no hidden layer there is nothing to compute again, and that is no error

    def __init__(self, config, values_per_code: int):
        super().__init__()
        widths = [config.num_pixels, *config.hidden_sizes]
        self.layers = nn.ModuleList(MLPLayer(a, b, config.activation) for a, b in pairwise(widths))
        self.to_code = nn.Linear(widths[-1], config.latent_dim * values_per_code)

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.to_code(x), []


class MLPDecoder(nn.Module):
    """code -> reversed hidden_sizes -> pixels"""

    def __init__(self, config):
        super().__init__()
        widths = [config.latent_dim, *reversed(config.hidden_sizes)]
        self.image_shape = (config.num_channels, *config.image_hw)
        self.layers = nn.ModuleList(MLPLayer(a, b, config.activation) for a, b in pairwise(widths))
        self.to_pixels = nn.Linear(widths[-1], config.num_pixels)

    def forward(self, code, positions=()):
        for layer in self.layers:
            code = layer(code)
        return self.to_pixels(code).unflatten(1, self.image_shape)


class ConvDown(GradientCheckpointingLayer):
    """Halve height and width, by a stride of 2 or by max-pooling after the convolution."""

    def __init__(self, inputs: int, outputs: int, config):
        super().__init__()
        self.pool = config.downsample == "maxpool"
        self.remember = config.upsample == "unpool"
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1) if self.pool else nn.Conv2d(inputs, outputs, 4, 2, 1)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x):
        x = self.activation(self.conv(x))
        if self.remember:
            return F.max_pool2d(x, 2, return_indices=True)
        return (F.max_pool2d(x, 2) if self.pool else x), None


class ConvUp(GradientCheckpointingLayer):
    """Double height and width. Without remembered positions, unpooling writes to each window's upper left corner."""

    def __init__(self, inputs: int, outputs: int, config, last: bool):
        super().__init__()
        self.how = config.upsample
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1) if self.how == "transpose" else nn.Conv2d(inputs, outputs, 3, padding=1)
        self.activation = nn.Identity() if last else ACTIVATIONS[config.activation]()

    def forward(self, x, positions=None):
        if self.how == "nearest":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.how == "unpool":
            x = F.max_unpool2d(x, upper_left(x) if positions is None else positions, [2, 2])
        return self.activation(self.conv(x))


def upper_left(x: torch.Tensor) -> torch.Tensor:
    """Positions, as max-pooling counts them, of the upper left corner of each 2×2 window."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device)[:, None] * 2
    return (rows * width * 2 + torch.arange(width, device=x.device) * 2).expand(x.shape)


class FromFeatures(nn.Module):
    """Last feature map -> code: a linear layer for a vector, a 1×1 convolution for a spatial code."""

    def __init__(self, config, channels: int, values_per_code: int):
        super().__init__()
        self.project: nn.Module
        if config.latent_dim is None:
            self.project = nn.Conv2d(channels, config.latent_channels * values_per_code, 1)
        else:
            positions = math.prod(config.image_hw) // config.downsampling**2
            self.project = nn.Sequential(nn.Flatten(), nn.Linear(channels * positions, config.latent_dim * values_per_code))

    def forward(self, x):
        return self.project(x)


class ToFeatures(nn.Module):
    """Code -> first feature map of the decoder."""

    def __init__(self, config, channels: int):
        super().__init__()
        self.project: nn.Module
        if config.latent_dim is None:
            self.project = nn.Conv2d(config.latent_channels, channels, 1)
        else:
            shape = (channels, *(size // config.downsampling for size in config.image_hw))
            self.project = nn.Sequential(nn.Linear(config.latent_dim, math.prod(shape)), nn.Unflatten(1, shape))

    def forward(self, code):
        return self.project(code)


class ConvEncoder(nn.Module):
    """pixels -> (convolution, halve) for each of hidden_sizes -> code"""

    def __init__(self, config, values_per_code: int):
        super().__init__()
        channels = [config.num_channels, *config.hidden_sizes]
        self.layers = nn.ModuleList(ConvDown(a, b, config) for a, b in pairwise(channels))
        self.to_code = FromFeatures(config, channels[-1], values_per_code)

    def forward(self, x):
        remembered = []
        for layer in self.layers:
            x, positions = layer(x)
            if positions is not None:
                remembered.append(positions)
        return self.to_code(x), remembered


class ConvDecoder(nn.Module):
    """code -> (double, convolution) for each of reversed hidden_sizes -> pixels"""

    def __init__(self, config):
        super().__init__()
        channels = [*reversed(config.hidden_sizes), config.num_channels]
        pairs = list(pairwise(channels))
        self.from_code = ToFeatures(config, channels[0])
        self.activation = ACTIVATIONS[config.activation]()
        self.layers = nn.ModuleList(ConvUp(a, b, config, last=i == len(pairs) - 1) for i, (a, b) in enumerate(pairs))

    def forward(self, code, positions=()):
        x = self.activation(self.from_code(code))
        remembered = list(positions) or [None] * len(self.layers)
        for layer, where in zip(self.layers, reversed(remembered)):
            x = layer(x, where)
        return x


class ResBlock(GradientCheckpointingLayer):
    """x + convolution(activation(norm(·))) twice, with a 1×1 shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, activation: str, norm=None):
        super().__init__()
        norm = norm or group_norm
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.activation = ACTIVATIONS[activation]()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.conv1(self.activation(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.activation(self.norm2(y)))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 32), channels, eps=1e-6)


class ResnetEncoder(nn.Module):
    """pixels -> stem (on patches) -> residual blocks, halving between levels -> norm -> code"""

    def __init__(self, config, values_per_code: int):
        super().__init__()
        channels = config.hidden_sizes
        self.patch_size = config.patch_size
        self.stem = nn.Conv2d(config.num_channels * config.patch_size**2, channels[0], 3, padding=1)
        self.layers = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            if level:
                self.layers.append(nn.Conv2d(before, before, 3, 2, 1))
            for block in range(config.num_res_blocks):
                self.layers.append(ResBlock(before if block == 0 else width, width, config.activation))
        self.norm, self.activation = group_norm(channels[-1]), ACTIVATIONS[config.activation]()
        self.to_code = FromFeatures(config, channels[-1], values_per_code)

    def forward(self, x):
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))
        for layer in self.layers:
            x = layer(x)
        return self.to_code(self.activation(self.norm(x))), []


class ResnetDecoder(nn.Module):
    """code -> residual blocks, doubling between levels -> norm -> pixels"""

    def __init__(self, config):
        super().__init__()
        channels = list(reversed(config.hidden_sizes))
        self.from_code = ToFeatures(config, channels[0])
        self.layers = nn.ModuleList()
        for level, width in enumerate(channels):
            before = channels[max(level - 1, 0)]
            if level:
                self.layers.append(nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(before, before, 3, padding=1)))
            for block in range(config.num_res_blocks):
                self.layers.append(ResBlock(before if block == 0 else width, width, config.activation))
        self.norm, self.activation = group_norm(channels[-1]), ACTIVATIONS[config.activation]()
        self.patch_size = config.patch_size
        self.to_pixels = nn.Conv2d(channels[-1], config.num_channels * config.patch_size**2, 3, padding=1)

    def forward(self, code, positions=()):
        x = self.from_code(code)
        for layer in self.layers:
            x = layer(x)
        return F.pixel_shuffle(self.to_pixels(self.activation(self.norm(x))), self.patch_size)


class DCT(nn.Module):
    """The lowest frequencies of each patch: an orthonormal DCT-II over channels, rows and columns, and its transpose.

    pixels (batch, channels, height, width) <-> (batch, values, height / side, width / side). The frequencies with the smallest
    (row² + column²)·(1 + 3·[not the mean of the channels]) come first. Fixed: it has no weights.
    """

    def __init__(self, channels: int, side: int, values: int):
        super().__init__()
        self.shape, self.values = (channels, side, side), values

    def basis(self, like: torch.Tensor) -> torch.Tensor:
        """(values, pixels of a patch, 1, 1); rows beyond the number of frequencies are zero."""
        c, u, v = torch.meshgrid(*(torch.arange(n) for n in self.shape), indexing="ij")
        order = ((u**2 + v**2) * torch.where(c > 0, 4, 1)).flatten().argsort(stable=True)[: self.values]
        rows = torch.einsum("ax,by,cz->abcxyz", *(dct_matrix(n) for n in self.shape)).flatten(3).flatten(0, 2)[order]
        return F.pad(rows, (0, 0, 0, self.values - len(rows)))[:, :, None, None].to(like)

    def forward(self, pixels):
        return F.conv2d(F.pixel_unshuffle(pixels, self.shape[1]), self.basis(pixels))

    def inverse(self, code):
        return F.pixel_shuffle(F.conv_transpose2d(code, self.basis(code)), self.shape[1])


def dct_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II: row k is the frequency k."""
    k, n = torch.arange(size)[:, None], torch.arange(size)
    rows = torch.cos(math.pi / size * (n + 0.5) * k) * math.sqrt(2 / size)
    rows[0] = math.sqrt(1 / size)
    return rows


class PositionNorm(nn.Module):
    """x / √(0.01 + mean of x² over channels), position by position: what lies far away, or in another tile, has no influence.

    The division of GDN (Ballé et al. 2016), with fixed weights.
    """

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(1, keepdim=True) + 0.01)


def transform_blocks(inputs: int, outputs: int, config) -> list[nn.Module]:
    return [ResBlock(inputs if block == 0 else outputs, outputs, config.activation, PositionNorm) for block in range(config.num_res_blocks)]


class ZeroConv2d(nn.Conv2d):
    """A 1×1 convolution that starts at zero."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class TransformEncoder(nn.Module):
    """pixels -> DCT of patches + (stem -> residual blocks, halving between levels) -> code

    The analysis transform of transform coding. It starts as the DCT alone: the residual part starts at zero.
    """

    def __init__(self, config, values_per_code: int):
        super().__init__()
        channels, values = config.hidden_sizes, config.latent_channels * values_per_code
        self.patch_size = config.patch_size
        self.dct = DCT(config.num_channels, config.downsampling, values)
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[0], 3, padding=1)
        self.layers = nn.ModuleList(transform_blocks(channels[0], channels[0], config))
        for before, width in pairwise(channels):
            self.layers.append(nn.Conv2d(before, width, 3, 2, 1))
            self.layers.extend(transform_blocks(width, width, config))
        self.activation = ACTIVATIONS[config.activation]()
        self.to_code = ZeroConv2d(channels[-1], values)

    def forward(self, x):
        code = self.dct(x)
        x = self.stem(F.pixel_unshuffle(x, self.patch_size))
        for layer in self.layers:
            x = layer(x)
        return code + self.to_code(self.activation(x)), []


class TransformDecoder(nn.Module):
    """code -> inverse DCT + (residual blocks, doubling between levels; the last also sees the inverse DCT) -> pixels"""

    def __init__(self, config):
        super().__init__()
        channels, values = list(reversed(config.hidden_sizes)), config.latent_channels
        self.patch_size = config.patch_size
        self.dct = DCT(config.num_channels, config.downsampling, values)
        self.from_code = nn.Conv2d(values, channels[0], 1)
        self.layers = nn.ModuleList()
        for before, width in pairwise(channels):
            self.layers.extend(transform_blocks(before, before, config))
            self.layers.append(nn.Sequential(nn.Conv2d(before, 4 * width, 1), nn.PixelShuffle(2)))
        self.last_layers = nn.ModuleList(transform_blocks(channels[-1], channels[-1], config))
        self.stem = nn.Conv2d(config.num_channels * self.patch_size**2, channels[-1], 3, padding=1)
        self.activation = ACTIVATIONS[config.activation]()
        self.to_pixels = ZeroConv2d(channels[-1], config.num_channels * self.patch_size**2)

    def forward(self, code, positions=()):
        pixels = self.dct.inverse(code)
        x = self.from_code(code)
        for layer in self.layers:
            x = layer(x)
        x = x + self.stem(F.pixel_unshuffle(pixels, self.patch_size))
        for layer in self.last_layers:
            x = layer(x)
        return pixels + F.pixel_shuffle(self.to_pixels(self.activation(x)), self.patch_size)


# modeling_autoencoder.py

"""The flow that every variant shares, and the plain autoencoder."""


logger = logging.get_logger(__name__)


@dataclass
class AutoencoderOutput(ModelOutput):
    """What `model(pixel_values)` returns.

    loss: scalar, the sum of `losses`. losses: the named terms, each summed over an image and averaged over the batch,
    with its weight applied. reconstruction: like `pixel_values`, in the model's pixel range. latents: what `decode` takes.
    indices: of discrete codes. measures: named numbers to watch that are no part of the loss.
    """

    loss: torch.Tensor | None = None
    losses: dict | None = None
    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    indices: Any = None
    measures: dict | None = None


@dataclass
class EncoderOutput(ModelOutput):
    """What `encode` returns: latents (batch, latent_dim) or (batch, latent_channels, height, width); `latent_dist` of a
    VAE; `pool_positions`, one tensor a level, where the decoder unpools at remembered positions; `indices` of discrete codes."""

    latents: torch.Tensor | None = None
    latent_dist: DiagonalGaussian | None = None
    pool_positions: list | None = None
    indices: Any = None


@dataclass
class DecoderOutput(ModelOutput):
    """What `decode` returns: sample (batch, channels, height, width), in the model's pixel range."""

    sample: torch.Tensor | None = None


def with_offload_hook(method):
    """Let accelerate's offloading, which wraps only `forward`, bring the weights in for `method` too."""

    def wrapped(self, *args, **kwargs):
        hook = getattr(self, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    wrapped.__doc__, wrapped.__name__ = method.__doc__, method.__name__
    return wrapped


class AutoencoderModel(PreTrainedModel):
    """Autoencoder: fully connected, convolutional or residual, with a vector or a spatial code.

    ```
    pixel_values -> corrupt -> encoder -> bottleneck -> decoder -> reconstruction
                                             |
                                          latents          loss = reconstruction term + penalties
    ```

    A variant redefines only what differs: `bottleneck`, `penalties`, or what `forward` shows the encoder.
    `pixel_values` are (batch, num_channels, height, width) in `config.pixel_range`; the image processor makes them.
    """

    config_class = AutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    values_per_code = 1
    """Encoder outputs for each value of the code: a Gaussian posterior needs two."""
    _no_split_modules = ["MLPLayer", "ConvDown", "ConvUp", "ResBlock"]
    _auto_class = "AutoModel"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = build_encoder(config, self.values_per_code)
        self.decoder = build_decoder(config)
        self.latent_activation = ACTIVATIONS[config.latent_activation]()
        self.post_init()
        self._warn_if_it_can_copy()

    def _init_weights(self, module):
        """PyTorch's own initialisation of each layer; N(0, 0.02), the default here, is too small for deep networks."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @property
    def is_regularized(self) -> bool:
        """Whether something other than a narrow code keeps the model from copying its input."""
        return False

    def _warn_if_it_can_copy(self):
        values = math.prod(self.config.code_shape)
        if values >= self.config.num_pixels and not self.is_regularized:
            logger.warning_once(
                f"The code has {values} values and the image only {self.config.num_pixels}, and nothing penalises the code: "
                "this model can learn to copy its input without learning anything about it. Use a smaller latent_dim or "
                "latent_channels, or a sparse, denoising, contractive or variational autoencoder."
            )

    # The steps of the flow

    def bottleneck(self, code: torch.Tensor) -> EncoderOutput:
        """The encoder's output -> latents."""
        return EncoderOutput(latents=self.latent_activation(code))

    def penalties(self, pixel_values: torch.Tensor, encoded: EncoderOutput) -> dict[str, torch.Tensor]:
        """Named terms added to the reconstruction term."""
        return {}

    def measures(self, encoded: EncoderOutput) -> dict[str, torch.Tensor] | None:
        """Named numbers to watch beside the loss."""
        return None

    # What users call

    @with_offload_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True):
        """pixel_values -> `.latents`. In `eval()` the same input gives the same latents."""
        self._check_pixels(pixel_values)
        encoded = self._encode(pixel_values.to(self.dtype))
        return encoded if return_dict else encoded.to_tuple()

    @with_offload_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True, generator=None, pool_positions=None):
        """latents -> `.sample`, pictures in `config.pixel_range`.

        `pool_positions` are those of `encode`, for `upsample="unpool"`: a part of what the encoder says about the image.
        Without them each value goes to the upper left corner of its window. `generator` is accepted because diffusers
        pipelines pass it; decoding draws nothing.
        """
        self._check_latents(latents)
        sample = self._to_pixels(self._decode(latents.to(self.dtype), pool_positions))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True):
        """pixel_values -> reconstruction, latents and the loss against `pixel_values`."""
        self._check_pixels(pixel_values)
        return self._run(pixel_values, pixel_values, return_dict)

    def _run(self, pixel_values, seen, return_dict):
        """Encode what the encoder is shown, decode, and compare with `pixel_values`."""
        pixel_values = pixel_values.to(self.dtype)
        encoded = self._encode(seen.to(self.dtype))
        logits = self._decode(encoded.latents, encoded.pool_positions)
        reconstruction = self._to_pixels(logits.float())
        losses = {
            "reconstruction": self.reconstruction_term(logits.float(), reconstruction, pixel_values.float()),
            **self.penalties(pixel_values, encoded),
        }
        loss = torch.stack([*losses.values()]).sum()
        measures = self.measures(encoded)
        output = AutoencoderOutput(loss, losses, reconstruction.to(logits.dtype), encoded.latents, encoded.indices, measures)
        return output if return_dict else output.to_tuple()

    def reconstruction_term(self, logits: torch.Tensor, reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Summed over the values of an image, averaged over the batch; `logits` are the reconstruction before the sigmoid.

        mse: squared errors, without a factor ½. l1: absolute errors. bce: binary cross-entropy in nats.
        """
        if self.config.reconstruction_loss == "bce":
            total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        elif self.config.reconstruction_loss == "l1":
            total = F.l1_loss(reconstruction, target, reduction="sum")
        else:
            total = F.mse_loss(reconstruction, target, reduction="sum")
        return total / len(target)

    # The shared inside

    def _encode(self, pixel_values):
        code, positions = self.encoder(pixel_values)
        encoded = self.bottleneck(code)
        if positions:
            encoded.pool_positions = positions
        return encoded

    def _decode(self, latents, pool_positions=None):
        return self.decoder(latents, pool_positions or [])

    def _to_pixels(self, logits):
        return logits.sigmoid() if self.config.pixel_range == [0.0, 1.0] else logits

    def _check_pixels(self, pixel_values):
        wanted = (self.config.num_channels, *self.config.image_hw)
        if pixel_values.ndim == 4 and tuple(pixel_values.shape[1:]) == wanted:
            return
        any_size = self.config.latent_dim is None
        if pixel_values.ndim != 4 or pixel_values.shape[1] != wanted[0] or not any_size:
            shape = f"(batch, {', '.join(map(str, wanted))})"
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, but this model takes {shape}"
                f"{', or another size' if any_size else ''}: the image processor makes them from any image."
            )
        self.config.check_size(*pixel_values.shape[2:])

    def _check_latents(self, latents):
        shape = self.config.code_shape
        given = list(latents.shape[1:])
        if given != shape and not (len(shape) == 3 and len(given) == 3 and given[0] == shape[0]):
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this model decodes (batch, {', '.join(map(str, shape))}).")


# tiling.py

"""Work on a large picture in overlapping tiles, and blend them."""


def tiled(function, x: torch.Tensor, tile: int, scale: int, down: bool) -> torch.Tensor:
    """`function` on overlapping tiles of `x` (batch, channels, height, width), blended linearly over the overlap.

    `tile`: height and width of a tile of `x`; neighbours share a quarter of it. `function` divides height and width by
    `scale` (`down`) or multiplies by it. Every output position is the weighted mean of the tiles that cover it, so
    there are no seams and any size is covered.
    """
    step = scale if down else 1
    tile = max(tile // step, 1) * step
    overlap = max(tile // 4 // step, 1) * step

    def out(size: int) -> int:
        return size // scale if down else size * scale

    height, width = x.shape[-2:]
    total = weight = torch.empty(0)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            y = function(x[..., top : top + tile, left : left + tile])
            if not total.numel():
                total = y.new_zeros(*y.shape[:2], out(height), out(width), dtype=torch.float32)
                weight = torch.zeros(out(height), out(width), device=y.device)
            window = ramp(y.shape[-2], out(overlap), y.device)[:, None] * ramp(y.shape[-1], out(overlap), y.device)
            rows, columns = slice(out(top), out(top) + y.shape[-2]), slice(out(left), out(left) + y.shape[-1])
            total[..., rows, columns] += y.float() * window
            weight[rows, columns] += window
    return (total / weight).to(y.dtype)


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `size` and overlap by at least `overlap`."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def ramp(length: int, overlap: int, device) -> torch.Tensor:
    """1 inside, falling linearly towards both ends over `overlap` values."""
    distance = torch.arange(length, device=device) + 0.5
    return torch.minimum(distance, length - distance).div(max(overlap, 1)).clamp(max=1.0)


# modeling_vae.py

"""Variational autoencoders."""


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
