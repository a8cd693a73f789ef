"""Configuration of the discriminator of images given prompts. A field is documented on the lines below it."""

from __future__ import annotations

from dataclasses import field

from transformers import PreTrainedConfig

from .configuration_autoencoder import require


class PromptDiscriminatorConfig(PreTrainedConfig):
    """Configuration of [`PromptDiscriminatorModel`]."""

    model_type = "hf_ae_prompt_discriminator"

    image_size: int = 64
    """Height and width that images are resized to."""
    num_channels: int = 3
    """Colour channels of `pixel_values`."""
    text_width: int = 384
    """Width of the text encoder's states."""
    hidden_sizes: list[int] = field(default_factory=lambda: [48, 96, 192])
    """Channels of each level; each halves height and width."""
    num_layers: int = 2
    """Transformer layers in which the positions of the image read the prompt."""
    num_heads: int = 6
    """Heads of their attention."""

    _auto_class = "AutoConfig"

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        levels = len(self.hidden_sizes)
        good = levels > 0 and self.image_size % 2**levels == 0
        require(
            good, f"hidden_sizes={self.hidden_sizes} halve {levels} times: image_size={self.image_size} cannot be."
        )
        good = self.hidden_sizes[-1] % self.num_heads == 0
        require(good, f"num_heads={self.num_heads} must divide the last of hidden_sizes={self.hidden_sizes}.")
