"""`pipeline("image-feature-extraction", model=folder)`: images -> latents."""

from __future__ import annotations

from typing import Any

from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.utils.generic import ModelOutput

from .modeling_autoencoder import AutoencoderModel


class LatentExtractionPipeline(ImageFeatureExtractionPipeline):
    """As transformers' own; of an autoencoder only the encoder runs, and a loss, which a batch has only one of, does
    not get in the way of `batch_size`.

    Each image gives its latents, (1, latent_dim) or (1, latent_channels, height, width); with `pool=True` their mean
    over positions, (1, values).
    """

    _load_video_processor: Any = False  # the search for one would ask whether to run the code in the model's folder

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:  # type: ignore[override]
        if not isinstance(self.model, AutoencoderModel):
            return super()._forward(input_tensors, **forward_parameters)
        encoded: Any = self.model.encode(**input_tensors)
        return ModelOutput(latents=encoded.latents, pooler_output=encoded.pooler_output)
