"""Autoencoders with discrete codes: VQ-VAE and VQ-VAE-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_vqvae import VQVAE2Config, VQVAEConfig
from .modeling_autoencoder import AutoencoderModel, EncoderOutput, with_offload_hook
from .modeling_code_prior import CodePrior
from .networks import ResBlock
from .quantizers import QuantizedCode, make_quantizer, usage_and_perplexity


@dataclass
class DiscreteEncoderOutput(EncoderOutput):
    """What `encode` returns: `latents`, the codewords; `indices`, their numbers; `terms`, squared distances to the codewords."""

    terms: dict | None = None


class VQVAEModel(AutoencoderModel):
    """VQ-VAE (van den Oord et al. 2017), or with `quantizer="fsq"` finite scalar quantization (Mentzer et al. 2023).

    ```
    pixel_values -> encoder -> nearest codewords -> decoder -> reconstruction ;  loss = reconstruction + β·‖code - codeword‖²
                                   |        |
                                indices   latents       prior -> indices -> latents -> decoder -> new pictures
    ```

    `latents` are codewords, also in training, with the gradient of the encoder's output (straight-through). `indices` are
    (batch, height, width), or (batch, num_codes) of a vector code; `indices_to_latents` brings them back. `measures` are the
    batch's usage (share of the codewords) and perplexity. What a training learns of the codebook beside the gradients, it
    learns in each forward pass in `train()`.
    """

    config_class = VQVAEConfig
    _keep_in_fp32_modules_strict = {"codebook", "cluster_sizes"}

    def __init__(self, config):
        super().__init__(config)
        self.quantizers: Any = nn.ModuleList(make_quantizer(config) for _ in range(config.num_levels))
        self.prior = None if config.prior_layers is None else CodePrior(config)
        self.post_init()

    @property
    def is_regularized(self):
        return True

    # The steps of the flow

    def bottleneck(self, code):
        if code.ndim == 4:
            latents, indices, terms = self.quantizers[0](code)
        else:
            words, indices, terms = self.quantizers[0](code.unflatten(1, (self.config.num_codes, -1)).mT)
            latents = words.mT.flatten(1)
        return DiscreteEncoderOutput(latents=latents, indices=indices, terms=terms)

    def penalties(self, pixel_values, encoded):
        weights = {"commitment": self.config.commitment_weight}
        return {name: weights.get(name, 1.0) * term for name, term in encoded.terms.items()}

    @torch.no_grad()
    def measures(self, encoded):
        return usage_and_perplexity(encoded.indices, self.config.codebook_size)

    # Indices

    @torch.no_grad()
    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """The `indices` of `encode` -> its `latents`, exactly."""
        words = self.quantizers[0].lookup(indices)
        return (words if words.ndim == 4 else words.mT.flatten(1)).to(self.dtype)

    @staticmethod
    def levels_of(indices) -> list[torch.Tensor]:
        """Indices as a list, the coarsest level first."""
        return [indices]

    def from_levels(self, levels: list[torch.Tensor]):
        """The inverse of `levels_of`."""
        return levels[0]

    @torch.no_grad()
    def count_indices(self, indices):
        """Add indices of training images to the frequencies that the codec's tables are made of."""
        for quantizer, level in zip(self.quantizers, self.levels_of(indices)):
            quantizer.frequencies += torch.bincount(level.flatten(), minlength=quantizer.size)

    # New pictures

    @torch.no_grad()
    @with_offload_hook
    def generate(
        self,
        n: int | None = None,
        labels=None,
        temperature: float | None = None,
        top_k: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """`n` new pictures (n, channels, height, width) in `config.pixel_range`, of codes that the prior draws.

        labels: class numbers or names, taken in turn; default: any class. temperature: below 1 more typical, above 1 more
        varied. top_k: draw among the k most probable codes. guidance_scale: above 1 the label counts more (classifier-free
        guidance). Both default to what the configuration says. seed or generator make the draw repeatable.
        """
        if self.prior is None:
            raise ValueError(
                "This model has no prior over its codes, so it cannot generate. Train one:  accelerate launch -m hf_ae.train_prior "
                f"--model {self.name_or_path or 'FOLDER'} --dataset_name DATASET --output_dir OUTPUT"
            )
        names = [labels] if isinstance(labels, int | str) else None if labels is None else list(labels)
        n = (len(names) if names else 1) if n is None else n
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        chosen = None if not names else torch.tensor([self.class_number(names[i % len(names)]) for i in range(n)], device=self.device)
        temperature = self.config.prior_temperature if temperature is None else temperature
        guidance_scale = self.config.prior_guidance_scale if guidance_scale is None else guidance_scale
        codes = self.prior.eval().sample(n, chosen, temperature, top_k, guidance_scale, generator)
        levels = self.from_levels(self.prior.to_levels(codes))
        return self.decode(self.indices_to_latents(levels)).sample

    def class_number(self, label: int | str) -> int:
        """The number of a class that is given by number or name."""
        count, names = self.config.prior_classes, self.config.id2label or {}
        if count and isinstance(label, str):
            label = next((number for number, name in names.items() if name.lower() == label.lower()), label)
        if not count:
            raise ValueError("The prior of this model knows no classes: leave out labels.")
        if isinstance(label, str) or not 0 <= int(label) < count:
            known = ", ".join(names.values()) if len(names) == count else f"0 to {count - 1}"
            raise ValueError(f"labels: {label!r} is not known: write some of {known}.")
        return int(label)


class DownLevel(nn.Module):
    """Features of one level -> those of the next coarser one: half the rows and columns, rounded up."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        self.halve = nn.Conv2d(channels, channels, 3, 2, 1)
        self.block = ResBlock(channels, channels, activation)

    def forward(self, x):
        return self.block(self.halve(x))


class ToCode(nn.Module):
    """Features of a level, and the codewords of all coarser levels -> the code of the level."""

    def __init__(self, channels: int, above: int, values: int, activation: str):
        super().__init__()
        self.block = ResBlock(channels + above, channels, activation)
        self.project = nn.Conv2d(channels, values, 1)

    def forward(self, x, words):
        return self.project(self.block(torch.cat([x, *enlarged(words, x)], 1)))


def enlarged(words: list[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    """Codewords of coarser levels, repeated to the height and width of `like`."""
    return [F.interpolate(word, size=like.shape[2:], mode="nearest") for word in words]


class VQVAE2Model(VQVAEModel):
    """VQ-VAE-2 (Razavi et al. 2019): two or more levels of codes, of which a coarser one conditions the finer ones.

    ```
    pixel_values -> encoder -> features --------------> (+ coarse words) -> nearest codewords --> cat -> decoder
                                  |                              |                                 |
                                  └-> halve -> features -> nearest codewords -> repeated ----------┘
    ```

    `indices` are a tuple of (batch, height, width), the coarsest level first. `latents` are the codewords of all levels side by
    side as channels, the coarse ones repeated to the positions of the finest.
    """

    config_class = VQVAE2Config

    def __init__(self, config):
        super().__init__(config)
        channels, values, levels = config.latent_channels, config.codeword_length, config.num_levels
        self.down = nn.ModuleList(DownLevel(channels, config.activation) for _ in range(levels - 1))
        self.to_code = nn.ModuleList(ToCode(channels, values * above, values, config.activation) for above in range(levels))
        self.post_init()

    def bottleneck(self, code):
        features = [code]
        for down in self.down:
            features.append(down(features[-1]))
        levels: list[QuantizedCode] = []
        for x, to_code, quantizer in zip(reversed(features), self.to_code, self.quantizers):
            levels.append(quantizer(to_code(x, [level.latents for level in levels])))
        latents = torch.cat(enlarged([level.latents for level in levels], code), 1)
        terms = {name: torch.stack([level.terms[name] for level in levels]).sum() for name in levels[0].terms}
        return DiscreteEncoderOutput(latents=latents, indices=tuple(level.indices for level in levels), terms=terms)

    @torch.no_grad()
    def measures(self, encoded):
        numbered = enumerate(encoded.indices, 1)
        each = ((level, usage_and_perplexity(indices, self.config.codebook_size)) for level, indices in numbered)
        return {f"{name}_{level}": value for level, values in each for name, value in values.items()}

    @torch.no_grad()
    def indices_to_latents(self, indices) -> torch.Tensor:
        """The `indices` of `encode` -> its `latents`, exactly."""
        words = [quantizer.lookup(level) for quantizer, level in zip(self.quantizers, indices)]
        return torch.cat(enlarged(words, words[-1]), 1).to(self.dtype)

    @staticmethod
    def levels_of(indices):
        return list(indices)

    def from_levels(self, levels):
        return tuple(levels)
