"""Every configuration of the family. A field is documented on the lines below it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import field

from transformers import GenerationConfig, PreTrainedConfig

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
