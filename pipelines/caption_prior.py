"""The prior of a text-to-image pipeline whose denoiser knows few captions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch.nn import functional as F


class CaptionPrior(ModelMixin, ConfigMixin):
    """The vector of any text -> the nearest of the captions that the denoiser was trained with.

    A denoiser that saw few images draws a text it does not know as a blend of them; with this prior it draws an image
    it does know, as retrieval-augmented diffusion does (Blattmann et al. 2022, Sheynin et al. 2023). Vectors are the
    means of a text encoder's states. The score of a caption is the sum of three cosines: of the text with the caption,
    with the nearest of the texts that lead to it (itself among them), and with their mean.
    """

    @register_to_config
    def __init__(self, captions: list[str], num_texts: int, num_links: int, width: int) -> None:
        """`vectors` (num_texts, width): unit vectors of texts, first those of `captions`. `means` (captions, width):
        unit vectors too. `links` (2, num_links): the index of a caption and of a text that leads to it."""
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_texts, width))
        self.register_buffer("means", torch.zeros(len(captions), width))
        self.register_buffer("links", torch.zeros(2, num_links, dtype=torch.int32))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> CaptionPrior:
        """As `ModelMixin.from_pretrained`, from safetensors alone."""
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    def forward(self, vectors: torch.Tensor) -> list[str]:
        """(texts, width) -> the nearest caption of each."""
        (captions, texts), vectors = self.links.long(), F.normalize(vectors.float(), dim=1)
        cosines = vectors @ self.vectors.float().T
        nearest = cosines.new_full((len(vectors), len(self.means)), -1.0)
        nearest = nearest.scatter_reduce(1, captions.expand(len(vectors), -1), cosines[:, texts], "amax")
        scores = cosines[:, : len(self.means)] + nearest + vectors @ self.means.float().T
        return [self.config["captions"][i] for i in scores.argmax(1).tolist()]
