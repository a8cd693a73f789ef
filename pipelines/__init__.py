"""Custom diffusers pipelines: installed as `hf_ae.pipelines`, uploaded as a model repo's `pipeline.py`, joined into
one file."""

from .caption_prior import CaptionPrior
from .drawing_request import Preview, TextToImageOutput
from .text_to_image import TextToImagePipeline
from .vae_roundtrip import VAERoundTripOutput, VAERoundTripPipeline

__all__ = [
    "CaptionPrior", "Preview", "TextToImageOutput", "TextToImagePipeline", "VAERoundTripOutput",
    "VAERoundTripPipeline",
]  # fmt: skip
