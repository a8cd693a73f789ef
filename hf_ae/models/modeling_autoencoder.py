"""The flow that every variant shares, and the plain autoencoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .blocks import ACTIVATIONS
from .bottlenecks import DiagonalGaussian
from .configuration_autoencoder import AutoencoderConfig, logger
from .networks import build_decoder, build_encoder

P = ParamSpec("P")
Result = TypeVar("Result")

FAR_OUT = 20.0
"""No image, with whatever noise added, has pixels so large in a range of [0, 1] or [-1, 1]."""
ALWAYS_GIVEN: Any = None
"""Default of an output's field that is never left out: transformers allows no other default than None."""


@dataclass
class AutoencoderOutput(ModelOutput):
    """What `model(pixel_values)` returns.

    latents: what `decode` takes. reconstruction (also called `sample`): like `pixel_values`, in the model's pixel
    range. loss: scalar, the sum of `losses`. losses: the named terms, each summed over an image and averaged over the
    batch, with its weight applied. indices: of discrete codes. measures: named numbers to watch that are no part of
    the loss. pooler_output: the latents averaged over their positions, (batch, latent_dim or latent_channels).
    hidden_states: where asked for, the output of each layer of the encoder, the last is what the bottleneck takes.

    As a tuple the reconstruction comes first, as that of diffusers' autoencoders.
    """

    latents: Tensor = ALWAYS_GIVEN
    reconstruction: Tensor = ALWAYS_GIVEN
    loss: Tensor = ALWAYS_GIVEN
    losses: dict[str, Tensor] = ALWAYS_GIVEN
    indices: Any = None
    measures: dict[str, Tensor] | None = None
    pooler_output: Tensor = ALWAYS_GIVEN
    hidden_states: tuple[Tensor, ...] | None = None

    @property
    def sample(self) -> Tensor:
        """The reconstruction, by diffusers' name."""
        return self.reconstruction

    def to_tuple(self) -> tuple[Any, ...]:
        """All that is not None, the reconstruction first."""
        return (self.reconstruction, *(self[name] for name in self if name != "reconstruction"))


@dataclass
class EncoderOutput(ModelOutput):
    """What `encode` returns.

    latents: (batch, latent_dim) or (batch, latent_channels, height, width). latent_dist: the posterior of a VAE.
    pool_positions: one tensor a level, where the decoder unpools at remembered positions. indices: of discrete codes.
    pooler_output, hidden_states: as in [`AutoencoderOutput`].
    """

    latents: Tensor = ALWAYS_GIVEN
    latent_dist: DiagonalGaussian | None = None
    pool_positions: list[Tensor] | None = None
    indices: Any = None
    pooler_output: Tensor = ALWAYS_GIVEN
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class DecoderOutput(ModelOutput):
    """What `decode` returns: sample (batch, channels, height, width), in the model's pixel range."""

    sample: Tensor = ALWAYS_GIVEN


def with_offload_hook(method: Callable[P, Result]) -> Callable[P, Result]:
    """Let accelerate's offloading, which wraps only `forward`, bring the weights in for `method` too."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Result:
        hook = getattr(args[0], "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(args[0])
        return method(*args, **kwargs)

    return wrapped


def check_unused(arguments: Iterable[str]) -> None:
    """Raise TypeError for arguments of `forward` beyond those that other libraries pass along with a batch."""
    for name in arguments:
        if name != "labels":
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the terms, a scalar."""
    return torch.stack([*losses.values()]).sum()


def pooled(latents: Tensor) -> Tensor:
    """Latents averaged over their positions: (batch, values)."""
    return latents if latents.ndim == 2 else latents.flatten(2).mean(2)


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
    accepts_loss_kwargs = False  # Trainer averages the loss over accumulated batches itself
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
    differentiates_in_forward = False
    """Whether `forward` itself takes gradients, which reentrant checkpoints do not allow."""
    _saw_pixels = False

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

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        if self.differentiates_in_forward:
            gradient_checkpointing_func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)

    def _warn_if_it_can_copy(self) -> None:
        values = math.prod(self.config.latent_shape)
        if values >= self.config.num_pixels and not self.is_regularized:
            logger.warning_once(
                f"The latents have {values} values and the input only {self.config.num_pixels}, and nothing penalises "
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
    def encode(
        self, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool | None = None
    ) -> EncoderOutput | tuple[Any, ...]:
        """pixel_values -> `.latents`. In `eval()` the same input gives the same latents."""
        self._check_pixels(pixel_values)
        encoded = self._encode(pixel_values.to(self.dtype), self._hidden_states(output_hidden_states))
        return encoded if self._as_dict(return_dict) else encoded.to_tuple()

    @with_offload_hook
    def decode(
        self, latents: Tensor, return_dict: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None, pool_positions: list[Tensor] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:  # fmt: skip
        """latents -> `.sample`, images in `config.pixel_range`.

        `pool_positions` are those of `encode`, for `upsample="unpool"`: a part of what the encoder tells of the image.
        Without them each value goes to the upper left corner of its window. `generator` is accepted because diffusers
        pipelines pass it; decoding draws nothing.
        """
        self._check_latents(latents)
        sample = self._decode_to_pixels(latents.to(self.dtype), pool_positions)
        return DecoderOutput(sample=sample) if self._as_dict(return_dict) else (sample,)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, output_hidden_states: bool | None = None,
        return_loss: bool = True, **unused: Any,
    ) -> AutoencoderOutput | tuple[Any, ...]:  # fmt: skip
        """pixel_values -> reconstruction, latents and the loss against `pixel_values`.

        `return_loss=False` leaves out the loss and its terms. `labels`, which a Trainer passes where the dataset has
        them, are left alone.
        """
        check_unused(unused)
        self._check_pixels(pixel_values)
        output = self._run(pixel_values, pixel_values, return_loss, self._hidden_states(output_hidden_states))
        return output if self._as_dict(return_dict) else output.to_tuple()

    def _run(
        self, pixel_values: Tensor, seen: Tensor, return_loss: bool = True,
        hidden_states: list[Tensor] | None = None, **how: Any,
    ) -> AutoencoderOutput:  # fmt: skip
        """Encode what the encoder is shown, decode, and compare with `pixel_values`; `how` is for `bottleneck`."""
        pixel_values = pixel_values.to(self.dtype)
        encoded = self._encode(seen.to(self.dtype), hidden_states, **how)
        rows, columns = pixel_values.shape[2:]
        logits = self._decode(encoded.latents, encoded.pool_positions)[..., :rows, :columns]
        reconstruction = self._to_pixels(logits.float())
        output = AutoencoderOutput(
            latents=encoded.latents,
            reconstruction=reconstruction.to(logits.dtype),
            indices=encoded.indices,
            pooler_output=encoded.pooler_output,
            hidden_states=encoded.hidden_states,
        )
        if return_loss:
            output.losses = self.loss_terms(encoded, logits.float(), reconstruction, pixel_values.float())
            output.loss, output.measures = total(output.losses), self.measures(encoded)
        return output

    def loss_terms(self, encoded: Any, logits: Tensor, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The named terms of the loss: the reconstruction term and the penalties; float32 arguments."""
        term = self.reconstruction_term(logits, reconstruction, target)
        return {"reconstruction": term, **self.penalties(target.to(self.dtype), encoded)}

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

    def _as_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict) if return_dict is None else return_dict

    def _hidden_states(self, asked: bool | None) -> list[Tensor] | None:
        """A list to collect the encoder's hidden states in, where they are asked for."""
        return [] if (self.config.output_hidden_states if asked is None else asked) else None

    def _encode(self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None, **how: Any) -> EncoderOutput:
        encoder_output, positions = self._encoder_output(pixel_values, hidden_states)
        encoded = self.bottleneck(encoder_output, **how)
        if positions:
            encoded.pool_positions = positions
        encoded.pooler_output = pooled(encoded.latents)
        if hidden_states is not None:
            encoded.hidden_states = tuple(hidden_states)
        return encoded

    def _encoder_output(
        self, pixel_values: Tensor, hidden_states: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """What the bottleneck takes, and remembered positions."""
        learns = self.training and torch.is_grad_enabled()
        if learns and any(getattr(layer, "gradient_checkpointing", False) for layer in self.encoder.modules()):
            # reentrant checkpoints only work for what depends on an input with a gradient
            pixel_values = pixel_values if pixel_values.requires_grad else pixel_values.detach().requires_grad_()
        return self.encoder(pixel_values, hidden_states)

    def _decode(self, latents: Tensor, pool_positions: list[Tensor] | None = None) -> Tensor:
        return self.decoder(latents, pool_positions or [])

    def _decode_to_pixels(self, latents: Tensor, pool_positions: list[Tensor] | None = None) -> Tensor:
        return self._to_pixels(self._decode(latents, pool_positions))

    def _to_pixels(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.pixel_range == [0.0, 1.0] else logits

    def _check_pixels(self, pixel_values: Tensor) -> None:
        wanted = (self.config.num_channels, *self.config.image_hw)
        any_size = self.config.latent_dim is None
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != wanted:
            if pixel_values.ndim != 4 or pixel_values.shape[1] != wanted[0] or not any_size:
                shape = f"(batch, {', '.join(map(str, wanted))})"
                raise ValueError(
                    f"pixel_values have shape {tuple(pixel_values.shape)}, but this model takes {shape}"
                    f"{', or another size' if any_size else ''}: the image processor makes them from any image."
                )
            self.config.check_size(*pixel_values.shape[2:])
        self._check_range(pixel_values)

    def _check_range(self, pixel_values: Tensor) -> None:
        """Raise ValueError for whole numbers and for values like 0…255; on a device that runs beside the CPU, only at
        the first call, since it waits for the device."""
        low, high = self.config.pixel_range
        advice = f"this model takes floats from {low:g} to {high:g}: the image processor makes them from any image."
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}, and {advice}")
        if torch.compiler.is_compiling() or pixel_values.device.type == "meta" or not pixel_values.numel():
            return
        if pixel_values.device.type == "cpu" or not self._saw_pixels:
            self._saw_pixels, (least, most) = True, pixel_values.detach().aminmax()
            largest = max(-least.item(), most.item())
            if largest > FAR_OUT:
                raise ValueError(f"pixel_values reach {largest:g}, and {advice}")

    def _check_latents(self, latents: Tensor) -> None:
        shape, given = self.config.latent_shape, list(latents.shape[1:])
        same_channels = len(shape) == len(given) == 3 and given[0] == shape[0]
        if given != shape and not same_channels:
            wanted = f"(batch, {', '.join(map(str, shape))})"
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this model decodes {wanted}.")
