"""The parts that several networks are built of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity,
}  # fmt: skip
"""The layer of each name that `activation` and `latent_activation` of a configuration may have."""


def run_layers(layers: Iterable[nn.Module], x: Tensor, hidden_states: list[Tensor] | None = None) -> Tensor:
    """`x` through one layer after the other; what each gives is added to `hidden_states`, where that is a list."""
    for layer in layers:
        x = layer(x)
        if hidden_states is not None:
            hidden_states.append(x)
    return x


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm (Wu and He 2018) with as many groups, at most 32, as divide the channels."""
    return nn.GroupNorm(math.gcd(channels, 32), channels, eps=1e-6)


class ResBlock(GradientCheckpointingLayer):
    """x + convolution(activation(norm(·))) twice, with a 1×1 shortcut where channels change.

    (batch, inputs, height, width) -> (batch, outputs, height, width). `norm` makes a norm of so many channels.
    """

    def __init__(
        self, inputs: int, outputs: int, activation: str, norm: Callable[[int], nn.Module] = group_norm
    ) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.activation = ACTIVATIONS[activation]()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.activation(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.activation(self.norm2(y)))
