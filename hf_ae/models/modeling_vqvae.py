"""Autoencoders with discrete codes: VQ-VAE and VQ-VAE-2."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ResBlock
from .configuration_vqvae import VQVAE2Config, VQVAEConfig
from .modeling_autoencoder import ALWAYS_GIVEN, AutoencoderModel, EncoderOutput, with_offload_hook
from .modeling_code_prior import CodePrior
from .quantizers import QuantizedCode, make_quantizer, usage_and_perplexity, usage_counts


@dataclass
class DiscreteEncoderOutput(EncoderOutput):
    """What `encode` returns: `latents`, the codewords; `indices`, theirs; `terms`, squared distances to them."""

    terms: dict[str, Tensor] = ALWAYS_GIVEN


class VQVAEModel(AutoencoderModel):
    """VQ-VAE (van den Oord et al. 2017), or with `quantizer="fsq"` finite scalar quantization (Mentzer et al. 2023).

    ```
    pixel_values -> encoder -> nearest codewords -> decoder -> reconstruction
                                   |        |
                                indices   latents       prior -> indices -> latents -> decoder -> new images
    ```

    The loss is reconstruction + β·‖encoder output - codeword‖². `latents` are codewords, also in training, with the
    gradient of the encoder's output (straight-through). `indices` are (batch, height, width), or (batch, num_codes) of
    vector latents; `indices_to_latents` brings them back. `measures` are the batch's usage (fraction of the codewords)
    and perplexity. What a training learns of the codebook beside the gradients, it learns in each forward pass in
    `train()`.
    """

    config: VQVAEConfig
    config_class = VQVAEConfig
    is_regularized = True
    has_discrete_codes = True
    codec_method = "indices"

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.quantizers: Any = nn.ModuleList(make_quantizer(config) for _ in range(config.num_levels))
        self.prior = None if config.prior_layers is None else CodePrior(config)
        kept = ("codebook", "cluster_sizes")
        self._keep_in_fp32_modules_strict = {name for name in kept if hasattr(self.quantizers[0], name)}
        self.post_init()

    @property
    def can_generate_images(self) -> bool:
        return self.prior is not None

    # The steps of the flow

    def bottleneck(self, encoder_output: Tensor) -> DiscreteEncoderOutput:
        if encoder_output.ndim == 4:
            latents, indices, terms = self.quantizers[0](encoder_output)
        else:
            words, indices, terms = self.quantizers[0](encoder_output.unflatten(1, (self.config.num_codes, -1)).mT)
            latents = words.mT.flatten(1)
        return DiscreteEncoderOutput(latents=latents, indices=indices, terms=terms)

    def penalties(self, pixel_values: Tensor, encoded: Any) -> dict[str, Tensor]:
        weights = {"commitment": self.config.commitment_weight}
        return {name: weights.get(name, 1.0) * term for name, term in encoded.terms.items()}

    @torch.no_grad()
    def measures(self, encoded: EncoderOutput) -> dict[str, Tensor]:
        return usage_and_perplexity(encoded.indices, self.quantizers[0].size)

    # Indices

    @torch.no_grad()
    def indices_to_latents(self, indices: Any) -> Tensor:
        """The `indices` of `encode` -> its `latents`, exactly."""
        words = self.quantizers[0].lookup(indices)
        return (words if words.ndim == 4 else words.mT.flatten(1)).to(self.dtype)

    @staticmethod
    def levels_of(indices: Any) -> list[Tensor]:
        """Indices as a list, the coarsest level first."""
        return [indices]

    def from_levels(self, levels: list[Tensor]) -> Any:
        """The inverse of `levels_of`."""
        return levels[0]

    @torch.no_grad()
    def count_indices(self, indices: Any) -> None:
        """Add indices of training images to the frequencies that the codec's tables are made of."""
        for quantizer, level in zip(self.quantizers, self.levels_of(indices)):
            quantizer.frequencies += usage_counts(level, quantizer.size)

    # New images

    @torch.no_grad()
    @with_offload_hook
    def generate(
        self, n: int | None = None, labels: int | str | Iterable[int | str] | None = None,
        temperature: float | None = None, top_k: int | None = None, guidance_scale: float | None = None,
        seed: int | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """`n` new images (n, channels, height, width) in `config.pixel_range`, of codes that the prior draws.

        n: default one for each label, else 1. labels: class indices or names, taken in turn; default: any class.
        temperature: below 1 more typical, above 1 more varied. top_k: draw among the k most probable codes.
        guidance_scale: above 1 the label counts more (classifier-free guidance; Ho and Salimans 2022). Temperature and
        guidance scale default to the configuration's. seed or generator make the draw repeatable. Raises ValueError
        without a prior, and for unknown labels.
        """
        if self.prior is None:
            raise ValueError(
                "This model has no prior over its codes, so it cannot generate. Train one:  accelerate launch -m "
                f"hf_ae.train_prior --model {self.name_or_path or 'FOLDER'} --dataset_name DATASET --output_dir OUTPUT"
            )
        names = [labels] if isinstance(labels, int | str) else list(() if labels is None else labels)
        n = max(1, len(names)) if n is None else n
        chosen = None
        if names:
            classes = [self.class_index(names[i % len(names)]) for i in range(n)]
            chosen = torch.tensor(classes, device=self.device)
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        temperature = self.config.prior_temperature if temperature is None else temperature
        guidance_scale = self.config.prior_guidance_scale if guidance_scale is None else guidance_scale
        codes = self.prior.eval().sample(n, chosen, temperature, top_k, guidance_scale, generator)
        levels = self.from_levels(self.prior.to_levels(codes))
        return self.decode(self.indices_to_latents(levels), return_dict=False)[0]

    def class_index(self, label: int | str) -> int:
        """The index of a class that is given by index or name. Raises ValueError for an unknown class."""
        count, names = self.config.prior_classes, self.config.id2label or {}
        if not count:
            raise ValueError("The prior of this model knows no classes: leave out labels.")
        if isinstance(label, str):
            label = next((index for index, name in names.items() if name.lower() == label.lower()), label)
        if isinstance(label, str) or not 0 <= int(label) < count:
            known = ", ".join(names.values()) if len(names) == count else f"0 to {count - 1}"
            raise ValueError(f"labels: {label!r} is not known: write some of {known}.")
        return int(label)


class DownLevel(nn.Module):
    """Features of one level -> those of the next coarser one: half the rows and columns, rounded up."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.halve = nn.Conv2d(channels, channels, 3, 2, 1)
        self.block = ResBlock(channels, channels, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.halve(x))


class ToCode(nn.Module):
    """Features of a level, and the codewords of all coarser levels -> what the quantizer of the level takes."""

    def __init__(self, channels: int, above: int, values: int, activation: str) -> None:
        super().__init__()
        self.block = ResBlock(channels + above, channels, activation)
        self.project = nn.Conv2d(channels, values, 1)

    def forward(self, x: Tensor, words: list[Tensor]) -> Tensor:
        return self.project(self.block(torch.cat([x, *enlarged(words, x)], 1)))


def enlarged(words: list[Tensor], like: Tensor) -> list[Tensor]:
    """Codewords of coarser levels, repeated to the height and width of `like`."""
    return [F.interpolate(word, size=like.shape[2:], mode="nearest") for word in words]


class VQVAE2Model(VQVAEModel):
    """VQ-VAE-2 (Razavi et al. 2019): two or more levels of codes, of which a coarser one conditions the finer ones.

    ```
    pixel_values -> encoder -> features --------------> (+ coarse words) -> nearest codewords --> cat -> decoder
                                  |                              |                                 |
                                  └-> halve -> features -> nearest codewords -> repeated ----------┘
    ```

    `indices` are a tuple of (batch, height, width), the coarsest level first. `latents` are the codewords of all
    levels side by side as channels, the coarse ones repeated to the positions of the finest.
    """

    config: VQVAE2Config
    config_class = VQVAE2Config

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__(config)
        channels, values, levels = config.latent_shape[0], config.codeword_length, config.num_levels
        self.down = nn.ModuleList(DownLevel(channels, config.activation) for _ in range(levels - 1))
        self.to_code = nn.ModuleList(
            ToCode(channels, values * above, values, config.activation) for above in range(levels)
        )
        self.post_init()

    def bottleneck(self, encoder_output: Tensor) -> DiscreteEncoderOutput:
        features = [encoder_output]
        for down in self.down:
            features.append(down(features[-1]))
        levels: list[QuantizedCode] = []
        for x, to_code, quantizer in zip(reversed(features), self.to_code, self.quantizers):
            levels.append(quantizer(to_code(x, [level.latents for level in levels])))
        latents = torch.cat(enlarged([level.latents for level in levels], encoder_output), 1)
        terms = {name: torch.stack([level.terms[name] for level in levels]).sum() for name in levels[0].terms}
        return DiscreteEncoderOutput(latents=latents, indices=tuple(level.indices for level in levels), terms=terms)

    @torch.no_grad()
    def measures(self, encoded: EncoderOutput) -> dict[str, Tensor]:
        measured = {}
        for level, indices in enumerate(encoded.indices, 1):
            for name, value in usage_and_perplexity(indices, self.quantizers[0].size).items():
                measured[f"{name}_{level}"] = value
        return measured

    @torch.no_grad()
    def indices_to_latents(self, indices: Any) -> Tensor:
        words = [quantizer.lookup(level) for quantizer, level in zip(self.quantizers, indices)]
        return torch.cat(enlarged(words, words[-1]), 1).to(self.dtype)

    @staticmethod
    def levels_of(indices: Any) -> list[Tensor]:
        return list(indices)

    def from_levels(self, levels: list[Tensor]) -> Any:
        return tuple(levels)
