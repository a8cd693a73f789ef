"""The flow that every variant shares, and the plain autoencoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .bottlenecks import DiagonalGaussian
from .configuration import AutoencoderConfig
from .networks import ACTIVATIONS, build_decoder, build_encoder

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
