"""hf_ae: every autoencoder as a Hugging Face model.

Importing it registers each configuration, model and image processor with transformers' Auto classes, and the pipeline
that extracts features. Its rooms, such as `hf_ae.codec` and `hf_ae.latents`, are imported when they are first used.
"""

import importlib
import sys
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from .models.configuration_autoencoder import AutoencoderConfig
from .models.configuration_compressive import CompressiveAutoencoderConfig
from .models.configuration_prompt_discriminator import PromptDiscriminatorConfig
from .models.configuration_regularized import (
    ContractiveAutoencoderConfig,
    DenoisingAutoencoderConfig,
    SparseAutoencoderConfig,
)
from .models.configuration_vae import BetaVAEConfig, DiscriminatorConfig, VAEConfig, VAEGANConfig
from .models.configuration_vqvae import VQVAE2Config, VQVAEConfig
from .models.image_processing import AutoencoderImageProcessor
from .models.modeling_autoencoder import AutoencoderModel
from .models.modeling_compressive import CompressiveAutoencoderModel
from .models.modeling_prompt_discriminator import PromptDiscriminatorModel
from .models.modeling_regularized import ContractiveAutoencoderModel, DenoisingAutoencoderModel, SparseAutoencoderModel
from .models.modeling_vae import BetaVAEModel, VAEModel
from .models.modeling_vaegan import DiscriminatorModel, VAEGANModel
from .models.modeling_vqvae import VQVAE2Model, VQVAEModel

__version__ = "0.2.0"

MODELS: dict[str, type[AutoencoderModel]] = {
    model.config_class.model_type: model
    for model in (
        AutoencoderModel,
        SparseAutoencoderModel,
        DenoisingAutoencoderModel,
        ContractiveAutoencoderModel,
        VAEModel,
        BetaVAEModel,
        VAEGANModel,
        CompressiveAutoencoderModel,
        VQVAEModel,
        VQVAE2Model,
    )
}
"""model_type -> model class, of every image variant."""

for _model_type, _model in MODELS.items():
    AutoConfig.register(_model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
    _processors: dict[str, type] = {"pil": AutoencoderImageProcessor}
    AutoImageProcessor.register(_model.config_class, image_processor_classes=_processors, exist_ok=True)
    # A diffusers pipeline that holds a model loads it by the base class that it finds, by this name, in its module.
    vars(sys.modules[_model.__module__]).setdefault("PreTrainedModel", PreTrainedModel)

AutoConfig.register(DiscriminatorConfig.model_type, DiscriminatorConfig, exist_ok=True)
AutoModel.register(DiscriminatorConfig, DiscriminatorModel, exist_ok=True)
AutoConfig.register(PromptDiscriminatorConfig.model_type, PromptDiscriminatorConfig, exist_ok=True)
AutoModel.register(PromptDiscriminatorConfig, PromptDiscriminatorModel, exist_ok=True)

# The class by name, imported when a pipeline is made. Of other models it does what transformers' own does.
PIPELINE_REGISTRY.supported_tasks["image-feature-extraction"]["impl"] = (
    "hf_ae.models.feature_extraction.LatentExtractionPipeline"
)

_ROOMS = (
    "anomaly", "codec", "data", "diffusion", "disentanglement", "evaluation", "export", "hub", "latents", "loading",
    "metrics", "pipelines", "plots", "sampling", "sklearn", "training",
)  # fmt: skip


_PARTS = {"AnomalyDetector": "anomaly", "encode_dataset": "latents.encoding"}
"""What is imported when it is first used -> its module."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in _PARTS:
        return getattr(importlib.import_module(f".{_PARTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MODELS", "AutoencoderConfig", "AutoencoderImageProcessor", "AutoencoderModel", "BetaVAEConfig", "BetaVAEModel",
    "CompressiveAutoencoderConfig", "CompressiveAutoencoderModel", "ContractiveAutoencoderConfig",
    "ContractiveAutoencoderModel", "DenoisingAutoencoderConfig", "DenoisingAutoencoderModel", "DiscriminatorConfig",
    "DiscriminatorModel", "PromptDiscriminatorConfig", "PromptDiscriminatorModel", "SparseAutoencoderConfig",
    "SparseAutoencoderModel", "VAEConfig", "VAEGANConfig", "VAEGANModel", "VAEModel", "VQVAE2Config", "VQVAE2Model",
    "VQVAEConfig", "VQVAEModel",
]  # fmt: skip
