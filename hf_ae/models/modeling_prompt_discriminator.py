"""A discriminator of images given prompts: does the image show what the prompt says?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .blocks import ResBlock
from .configuration_prompt_discriminator import PromptDiscriminatorConfig


@dataclass
class PromptDiscriminatorOutput(ModelOutput):
    """loss: with labels, the mean of `losses`, the cross-entropies of right and of wrong prompts. logits:
    (n · batch,), higher where the image fits the prompt; their sigmoid is a probability, if right and wrong are as
    likely."""

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None


class PromptDiscriminatorModel(PreTrainedModel):
    """Image-text matching (Li et al. 2021, section 3.2) by a small network, for the `discriminator` of a text-to-image
    pipeline.

    ```
    pixel_values -> residual blocks -> positions -> [attention -> attention to the prompt -> MLP] x layers -> logit
                                                                        ^
    prompt_embeds (a text encoder's states) ----------------------------'
    ```
    """

    config: PromptDiscriminatorConfig
    config_class = PromptDiscriminatorConfig
    base_model_prefix = "discriminator"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    reads_prompts = True
    """A pipeline gives it the states of the prompts, too."""
    _auto_class = "AutoModel"

    def __init__(self, config: PromptDiscriminatorConfig) -> None:
        super().__init__(config)
        widths = config.hidden_sizes
        self.stem = nn.Conv2d(config.num_channels, widths[0], 4, 2, 1)
        self.levels = nn.Sequential(ResBlock(widths[0], widths[0], "silu"))
        for narrow, wide in pairwise(widths):
            self.levels.append(nn.Conv2d(narrow, wide, 3, 2, 1))
            self.levels.append(ResBlock(wide, wide, "silu"))
        width, side = widths[-1], config.image_size // 2 ** len(widths)
        self.norm = nn.LayerNorm(width)  # group norm would take the colour out of plain images
        self.positions = nn.Parameter(torch.zeros(side * side, width))
        self.read_text = nn.Sequential(nn.LayerNorm(config.text_width), nn.Linear(config.text_width, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, config.num_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.num_layers)
        )
        self.to_logit = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation."""
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()

    def forward(
        self, pixel_values: Tensor, prompt_embeds: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> PromptDiscriminatorOutput | tuple[Tensor, ...]:
        """pixel_values: in [-1, 1], (batch, channels, height, width), of any size. prompt_embeds: (n · batch, tokens,
        text_width), n prompts for each image, those of the first prompts first. labels: (n · batch,), 1 where the
        prompt is right and 0 where it is wrong, with some of both."""
        size = (self.config.image_size, self.config.image_size)
        if pixel_values.shape[2:] != size:
            resized = F.interpolate(
                pixel_values.float(), size=size, mode="bilinear", antialias=True
            )  # CPUs: float32 only
            pixel_values = resized.to(pixel_values.dtype)
        x = self.levels(self.stem(pixel_values)).flatten(2).transpose(1, 2)
        x = self.norm(x) + self.positions
        x = x.repeat(len(prompt_embeds) // len(x), 1, 1)
        text = self.read_text(prompt_embeds)
        for layer in self.layers:
            x = layer(x, text)
        logits = self.to_logit(x.mean(1))[:, 0]
        output = PromptDiscriminatorOutput(logits=logits)
        if labels is not None:
            right, wrong = labels.to(logits.dtype), 1 - labels.to(logits.dtype)
            output.losses = {
                "right": (right * F.softplus(-logits)).sum() / right.sum().clamp(min=1),
                "wrong": (wrong * F.softplus(logits)).sum() / wrong.sum().clamp(min=1),
            }
            output.loss = (output.losses["right"] + output.losses["wrong"]) / 2
        return output if return_dict else output.to_tuple()
