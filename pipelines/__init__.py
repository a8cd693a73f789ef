"""Custom diffusers pipelines, one file each: installed as `hf_ae.pipelines`, uploaded as a model repo's `pipeline.py`."""

from .text_to_image import CaptionPrior, Preview, TextToImageOutput, TextToImagePipeline
from .vae_roundtrip import VAERoundTripOutput, VAERoundTripPipeline

__all__ = ["CaptionPrior", "Preview", "TextToImageOutput", "TextToImagePipeline", "VAERoundTripOutput", "VAERoundTripPipeline"]
