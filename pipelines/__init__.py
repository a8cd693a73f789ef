"""Custom diffusers pipelines: installed as `hf_ae.pipelines`, uploaded as a model repo's `pipeline.py`, joined into
one file."""

from .caption_prior import CaptionPrior
from .text_to_image import Preview, TextToImageOutput, TextToImagePipeline
from .vae_roundtrip import VAERoundTripOutput, VAERoundTripPipeline

__all__ = [
    "CaptionPrior",
    "Preview",
    "TextToImageOutput",
    "TextToImagePipeline",
    "VAERoundTripOutput",
    "VAERoundTripPipeline",
]
