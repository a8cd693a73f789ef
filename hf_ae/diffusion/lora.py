"""Low-rank adapters of a denoiser (LoRA, Hu et al. 2022): little to train and to share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import require

LAYERS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
]  # fmt: skip
"""What is adapted: attention, its projections and MLPs, and the convolutions of residual blocks."""


def add_lora(unet: Any, rank: int) -> None:
    """Freeze a UNet, and add adapters of a rank to it, which change nothing yet. Raises ValueError without peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        require(False, f'lora_rank needs peft, which is not installed ({error}): pip install "hf_ae[lora]".')
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LAYERS))


def save_lora(unet: Any, folder: Path, dtype: str) -> None:
    """Write the adapters alone, as `pipe.load_lora_weights(folder)` reads them."""
    from peft import get_peft_model_state_dict

    from ..pipelines.text_to_image import TextToImagePipeline

    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in get_peft_model_state_dict(unet).items()}
    TextToImagePipeline.save_lora_weights(folder, unet_lora_layers=weights)
