"""The fields that every image variant shares. A field is documented on the lines below it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What transformers itself passes or stores beside the fields; anything else is a typing error of the user.
_FRAMEWORK_KEYS = {
    "model_type", "auto_map", "torch_dtype", "name_or_path", "attn_implementation", "experts_implementation",
    "output_attentions", "num_labels", "use_cache", "quantization_config", "tie_word_embeddings",
}  # fmt: skip

_RESIDUAL = ("resnet", "transform")
"""Networks of residual blocks, on patches."""


class AutoencoderConfig(PreTrainedConfig):
    """Configuration of [`AutoencoderModel`], and the fields that every image variant shares.

    The defaults make a small fully connected autoencoder for 28×28 gray images. Values are checked when the
    configuration is made: an unknown field, a wrong type or two fields that contradict each other raise ValueError.
    A file may hold fields that are unknown here, such as a later version of transformers writes: they are kept.
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
    """Length of vector latents. Give this or `latent_channels`; with neither: 32 (mlp, conv) or 4 channels
    (resnet)."""
    latent_channels: int | None = None
    """Channels of spatial latents (conv and resnet)."""
    latent_activation: str = "identity"
    """Applied to the latents: `identity`, `sigmoid` or `relu`."""
    num_res_blocks: int | None = None
    """Residual blocks of each level (resnet, default 1)."""
    patch_size: int | None = None
    """Pixels of a square of this side enter and leave as channels of one position (resnet, default 1: no patches).
    With 4, a network of several times the channels costs as much."""
    downsample: str | None = None
    """How conv halves: `stride` (default) or `maxpool`."""
    upsample: str | None = None
    """How conv doubles: `transpose` (default), `unpool` (at the positions that max-pooling remembered: needs
    `downsample="maxpool"`) or `nearest` (nearest neighbour, then a convolution)."""
    reconstruction_loss: str = "mse"
    """`mse`, `bce` (binary cross-entropy, pixel_range [0, 1]) or `l1`: summed over an image, averaged over the
    batch."""
    pixel_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """What `pixel_values` and reconstructions are in: `[0.0, 1.0]` (decoder ends in a sigmoid) or `[-1.0, 1.0]`
    (linear)."""
    scaling_factor: float = 1.0
    """1 / standard deviation of the latents, for diffusion: pipelines multiply latents by it and divide before
    `decode`."""

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "network": ("mlp", "conv", "resnet"), "activation": ("sigmoid", "relu", "gelu", "silu"),
        "latent_activation": ("identity", "sigmoid", "relu"), "downsample": (None, "stride", "maxpool"),
        "upsample": (None, "transpose", "unpool", "nearest"), "reconstruction_loss": ("mse", "bce", "l1"),
        "pixel_range": ([0.0, 1.0], [-1.0, 1.0]),
    }  # fmt: skip
    keys_to_ignore_at_inference = ["losses", "measures", "indices", "pooler_output", "hidden_states"]
    _auto_class = "AutoConfig"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As every configuration; fields that are unknown here become attributes, with a warning."""
        known = {spec.name for spec in dataclasses.fields(cls)} | _FRAMEWORK_KEYS
        foreign = [name for name in config_dict if name not in known and not name.startswith("_")]
        if foreign:
            names = ", ".join(foreign)
            logger.warning_once(f"{cls.__name__} does not know {names}, which the configuration holds: kept unused.")
        kept = {name: value for name, value in config_dict.items() if name not in foreign or not hasattr(cls, name)}
        return super().from_dict({**kept, "_from_a_file": True}, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if not kwargs.pop("_from_a_file", False):
            self._refuse_unknown(kwargs)
        self._check_types()
        self.hidden_sizes = list(self.hidden_sizes)
        self.pixel_range = [float(value) for value in self.pixel_range]
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size)
        for name, accepted in self.choices.items():
            value, listed = getattr(self, name), ", ".join(map(repr, accepted))
            require(value in accepted, f"{name}={value!r} is not known: write one of {listed}.")
        self.fill_defaults()
        super().__post_init__(**kwargs)
        self.check()

    def _refuse_unknown(self, kwargs: Iterable[str]) -> None:
        known = [spec.name for spec in dataclasses.fields(self)]
        for name in kwargs:
            if name in _FRAMEWORK_KEYS or name.startswith("_"):
                continue
            similar = difflib.get_close_matches(name, known, n=1)
            own = [n for n in known if n not in PreTrainedConfig.__dataclass_fields__]
            advice = f"did you mean {similar[0]!r}?" if similar else f"its fields are {', '.join(own)}."
            raise ValueError(f"{type(self).__name__} has no field {name!r}: {advice}")

    def _check_types(self) -> None:
        for spec in dataclasses.fields(self):
            if spec.name not in PreTrainedConfig.__dataclass_fields__:
                value, accepted = getattr(self, spec.name), str(spec.type).split(" | ")
                fits = any(_fits(value, kind) for kind in accepted)
                require(fits, f"{spec.name}={value!r} has the wrong type: write {spec.type}.")

    def fill_defaults(self) -> None:
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

    def check(self) -> None:
        """Raise ValueError where fields contradict each other."""
        twice = self.latent_dim is not None and self.latent_channels is not None
        require(
            not twice,
            "latent_dim (vector latents) and latent_channels (spatial latents) contradict each other: keep one.",
        )
        self._check_positive()
        self._check_network()
        require(
            self.upsample != "unpool" or self.downsample == "maxpool",
            "upsample='unpool' needs the positions that max-pooling remembers: write downsample='maxpool'.",
        )
        require(
            self.reconstruction_loss != "bce" or self.pixel_range == [0.0, 1.0],
            "reconstruction_loss='bce' needs pixel_range=[0.0, 1.0] (or write reconstruction_loss='mse').",
        )
        good = math.isfinite(self.scaling_factor) and self.scaling_factor > 0
        require(
            good, f"scaling_factor={self.scaling_factor} must be positive: latents are multiplied and divided by it."
        )
        self.check_size(*self.image_hw)

    def _check_positive(self) -> None:
        sizes = {"image_size": self.image_hw, "hidden_sizes": self.hidden_sizes}
        for name in ("num_channels", "latent_dim", "latent_channels", "num_res_blocks", "patch_size"):
            sizes[name] = [] if getattr(self, name) is None else [getattr(self, name)]
        for name, values in sizes.items():
            good = all(isinstance(value, int) and value >= 1 for value in values)
            require(good, f"{name}={getattr(self, name)!r} must be positive whole numbers.")
        require(len(self.image_hw) == 2, f"image_size={self.image_size!r} must be one number or [height, width].")

    def _check_network(self) -> None:
        good, instead = self.network != "mlp" or self.latent_channels is None, "latent_dim, not latent_channels"
        require(good, f"network='mlp' has no spatial latents: write {instead}, or network='conv'.")
        good, halving = self.network == "conv" or not (self.downsample or self.upsample), "downsample and upsample"
        wrong = f"{halving} belong to network='conv', not {self.network!r}"
        require(good, f"{wrong}: leave them out, or write network='conv'.")
        for name in ("num_res_blocks", "patch_size"):
            good, instead = self.network in _RESIDUAL or getattr(self, name) is None, "leave it out, or write"
            require(good, f"{name} belongs to network='resnet', not {self.network!r}: {instead} network='resnet'.")
        good = (self.patch_size or 1).bit_count() == 1
        require(good, f"patch_size={self.patch_size} must be a power of two: 1, 2, 4, 8.")
        good = self.network == "mlp" or bool(self.hidden_sizes)
        require(good, f"network={self.network!r} needs at least one value in hidden_sizes, such as [32, 64].")

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError when the network cannot halve `height` × `width` as often as it has levels."""
        factor = self.downsampling
        patches = f", patch_size={self.patch_size}" if (self.patch_size or 1) > 1 else ""
        (low, high), (left, right) = (
            (max(1, v // factor) * factor, (v // factor + 1) * factor) for v in (height, width)
        )
        require(
            height % factor == 0 and width % factor == 0,
            f"image_size {height}×{width} does not divide by {factor} (hidden_sizes={self.hidden_sizes}{patches}): "
            f"use multiples of {factor}, such as {low} or {high} high, {left} or {right} wide, or fewer hidden_sizes.",
        )

    @property
    def image_hw(self) -> list[int]:
        """`[height, width]` of an image."""
        return [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def downsampling(self) -> int:
        """How many pixels high and wide one position of the encoder's last feature map is."""
        if self.network in _RESIDUAL:
            return (self.patch_size or 1) << (len(self.hidden_sizes) - 1)
        return 1 << len(self.hidden_sizes) if self.network == "conv" else 1

    @property
    def latent_shape(self) -> list[int]:
        """Shape of the latents of one image: `[latent_dim]` or `[latent_channels, height, width]`."""
        if self.latent_channels is None:
            return [self.latent_dim or 0]
        return [self.latent_channels, *(-(-size // self.downsampling) for size in self.image_hw)]

    @property
    def code_shape(self) -> list[int]:
        """The former name of `latent_shape`."""
        return self.latent_shape

    @property
    def num_pixels(self) -> int:
        """Values in one image."""
        return self.num_channels * math.prod(self.image_hw)

    # As diffusers calls its autoencoders' fields

    @property
    def in_channels(self) -> int:
        """Channels of `pixel_values`."""
        return self.num_channels

    @property
    def out_channels(self) -> int:
        """Channels of a reconstruction."""
        return self.num_channels

    @property
    def sample_size(self) -> int | list[int]:
        """Height and width in pixels."""
        return self.image_size

    @property
    def shift_factor(self) -> float:
        """What pipelines subtract from latents before they multiply by `scaling_factor`: nothing."""
        return 0.0

    @property
    def block_out_channels(self) -> list[int]:
        """As diffusers counts levels: 2^(len - 1) pixels to a latent position."""
        levels = self.downsampling.bit_length()
        return self.hidden_sizes[:1] * (levels - len(self.hidden_sizes)) + self.hidden_sizes


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of the type that an annotation names; a whole number may stand for a float, a tuple for a
    list."""
    if kind.startswith("list["):
        return isinstance(value, list | tuple) and all(_fits(v, kind[5:-1]) for v in value)
    if kind in ("int", "float"):
        return isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)
    return value is None if kind == "None" else isinstance(value, {"str": str, "bool": bool}[kind])
