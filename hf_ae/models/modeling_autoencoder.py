"""The flow that every variant shares, and the plain autoencoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .blocks import ACTIVATIONS
from .bottlenecks import DiagonalGaussian
from .configuration_autoencoder import AutoencoderConfig
from .networks import build_decoder, build_encoder

logger = logging.get_logger(__name__)

ALWAYS_GIVEN: Any = None
"""Default of an output's field that is never left out: transformers allows no other default than None."""


@dataclass
class AutoencoderOutput(ModelOutput):
    """What `model(pixel_values)` returns.

    loss: scalar, the sum of `losses`. losses: the named terms, each summed over an image and averaged over the batch,
    with its weight applied. reconstruction: like `pixel_values`, in the model's pixel range. latents: what `decode`
    takes. indices: of discrete codes. measures: named numbers to watch that are no part of the loss.
    """

    loss: Tensor = ALWAYS_GIVEN
    losses: dict[str, Tensor] = ALWAYS_GIVEN
    reconstruction: Tensor = ALWAYS_GIVEN
    latents: Tensor = ALWAYS_GIVEN
    indices: Any = None
    measures: dict[str, Tensor] | None = None


@dataclass
class EncoderOutput(ModelOutput):
    """What `encode` returns.

    latents: (batch, latent_dim) or (batch, latent_channels, height, width). latent_dist: the posterior of a VAE.
    pool_positions: one tensor a level, where the decoder unpools at remembered positions. indices: of discrete codes.
    """

    latents: Tensor = ALWAYS_GIVEN
    latent_dist: DiagonalGaussian | None = None
    pool_positions: list[Tensor] | None = None
    indices: Any = None


@dataclass
class DecoderOutput(ModelOutput):
    """What `decode` returns: sample (batch, channels, height, width), in the model's pixel range."""

    sample: Tensor = ALWAYS_GIVEN


def with_offload_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let accelerate's offloading, which wraps only `forward`, bring the weights in for `method` too."""

    @functools.wraps(method)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return wrapped


class AutoencoderModel(PreTrainedModel):
    """Autoencoder: fully connected, convolutional or residual, with vector or spatial latents.

    ```
    pixel_values -> corrupt -> encoder -> bottleneck -> decoder -> reconstruction
                                             |
                                          latents          loss = reconstruction term + penalties
    ```

    A variant redefines only what differs: `bottleneck`, `penalties`, or what `forward` shows the encoder.
    `pixel_values` are (batch, num_channels, height, width) in `config.pixel_range`; the image processor makes them.
    """

    config: AutoencoderConfig
    config_class = AutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MLPLayer", "ConvDown", "ConvUp", "ResBlock"]
    _auto_class = "AutoModel"

    outputs_per_latent = 1
    """Encoder outputs for each value of the latents: a Gaussian posterior needs two."""
    can_sample = False
    """Whether latents drawn from N(0, I) decode to images."""
    can_denoise = False
    """Whether it is trained to restore damaged images, and has `corrupt`."""
    has_discrete_codes = False
    """Whether `encode` gives indices of codewords."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config, self.outputs_per_latent)
        self.decoder = build_decoder(config)
        self.latent_activation = ACTIVATIONS[config.latent_activation]()
        self.post_init()
        self._warn_if_it_can_copy()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation of each layer; N(0, 0.02), the default here, is too small for deep networks."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def _warn_if_it_can_copy(self) -> None:
        values = math.prod(self.config.latent_shape)
        if values >= self.config.num_pixels and not self.is_regularized:
            logger.warning_once(
                f"The latents have {values} values and the image only {self.config.num_pixels}, and nothing penalises "
                "them: this model can learn to copy its input without learning anything about it. Use a smaller "
                "latent_dim or latent_channels, or a sparse, denoising, contractive or variational autoencoder."
            )

    # What the model can do

    @property
    def is_regularized(self) -> bool:
        """Whether something other than narrow latents keeps the model from copying its input."""
        return False

    @property
    def can_generate_images(self) -> bool:
        """Whether it has a working `generate`."""
        return False

    @property
    def codec_method(self) -> str | None:
        """How the codec writes the latents; None where the decoder needs more than the latents."""
        return None if self.config.upsample == "unpool" else "latents"

    @property
    def kl_weight_field(self) -> str | None:
        """The configuration's field that multiplies the KL term, where the loss term `kl` is that product alone."""
        return None

    @property
    def needs_dataset_size(self) -> bool:
        """Whether training needs `config.dataset_size`."""
        return False

    # The steps of the flow

    def bottleneck(self, encoder_output: Tensor) -> EncoderOutput:
        """The encoder's output -> latents."""
        return EncoderOutput(latents=self.latent_activation(encoder_output))

    def penalties(self, pixel_values: Tensor, encoded: EncoderOutput) -> dict[str, Tensor]:
        """Named terms added to the reconstruction term; `encoded` is what `bottleneck` returned."""
        return {}

    def measures(self, encoded: EncoderOutput) -> dict[str, Tensor] | None:
        """Named numbers to watch beside the loss."""
        return None

    # What users call

    @with_offload_hook
    def encode(self, pixel_values: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Any, ...]:
        """pixel_values -> `.latents`. In `eval()` the same input gives the same latents."""
        self._check_pixels(pixel_values)
        encoded = self._encode(pixel_values.to(self.dtype))
        return encoded if return_dict else encoded.to_tuple()

    @with_offload_hook
    def decode(
        self, latents: Tensor, return_dict: bool = True, generator: torch.Generator | None = None,
        pool_positions: list[Tensor] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:  # fmt: skip
        """latents -> `.sample`, images in `config.pixel_range`.

        `pool_positions` are those of `encode`, for `upsample="unpool"`: a part of what the encoder tells of the image.
        Without them each value goes to the upper left corner of its window. `generator` is accepted because diffusers
        pipelines pass it; decoding draws nothing.
        """
        self._check_latents(latents)
        sample = self._decode_to_pixels(latents.to(self.dtype), pool_positions)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> AutoencoderOutput | tuple[Any, ...]:
        """pixel_values -> reconstruction, latents and the loss against `pixel_values`."""
        self._check_pixels(pixel_values)
        output = self._run(pixel_values, pixel_values)
        return output if return_dict else output.to_tuple()

    def _run(self, pixel_values: Tensor, seen: Tensor) -> AutoencoderOutput:
        """Encode what the encoder is shown, decode, and compare with `pixel_values`."""
        pixel_values = pixel_values.to(self.dtype)
        encoded = self._encode(seen.to(self.dtype))
        logits = self._decode(encoded.latents, encoded.pool_positions)
        reconstruction = self._to_pixels(logits.float())
        losses = {
            "reconstruction": self.reconstruction_term(logits.float(), reconstruction, pixel_values.float()),
            **self.penalties(pixel_values, encoded),
        }
        loss, measures = torch.stack([*losses.values()]).sum(), self.measures(encoded)
        reconstruction = reconstruction.to(logits.dtype)
        return AutoencoderOutput(loss, losses, reconstruction, encoded.latents, encoded.indices, measures)

    def reconstruction_term(self, logits: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Summed over the values of an image, averaged over the batch; `logits` are the reconstruction before the
        sigmoid.

        mse: squared errors, without a factor ½. l1: absolute errors. bce: binary cross-entropy in nats.
        """
        if self.config.reconstruction_loss == "bce":
            total = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        elif self.config.reconstruction_loss == "l1":
            total = F.l1_loss(reconstruction, target, reduction="sum")
        else:
            total = F.mse_loss(reconstruction, target, reduction="sum")
        return total / len(target)

    # Internals

    def _encode(self, pixel_values: Tensor) -> EncoderOutput:
        encoder_output, positions = self.encoder(pixel_values)
        encoded = self.bottleneck(encoder_output)
        if positions:
            encoded.pool_positions = positions
        return encoded

    def _decode(self, latents: Tensor, pool_positions: list[Tensor] | None = None) -> Tensor:
        return self.decoder(latents, pool_positions or [])

    def _decode_to_pixels(self, latents: Tensor, pool_positions: list[Tensor] | None = None) -> Tensor:
        return self._to_pixels(self._decode(latents, pool_positions))

    def _to_pixels(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.pixel_range == [0.0, 1.0] else logits

    def _check_pixels(self, pixel_values: Tensor) -> None:
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

    def _check_latents(self, latents: Tensor) -> None:
        shape, given = self.config.latent_shape, list(latents.shape[1:])
        same_channels = len(shape) == len(given) == 3 and given[0] == shape[0]
        if given != shape and not same_channels:
            wanted = f"(batch, {', '.join(map(str, shape))})"
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this model decodes {wanted}.")
