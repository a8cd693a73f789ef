"""The network in whose features generated pictures are compared with real ones: a small one that ships, or a user's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("feature_network.safetensors")
SHA256 = "0" * 64
"""Of the file above. benchmarks/feature_network.py trains it; figures measured with other weights cannot be compared."""


class FeatureNetwork(nn.Module):
    """Gray pictures (batch, 1, 28, 28) in 0…1 -> features (batch, 128); `classify` -> logits (batch, num_classes).

    Three convolutions with batch norm, and the mean over positions: 95,000 weights.
    """

    num_features = 128

    def __init__(self, num_classes: int = 20, num_channels: int = 1):
        super().__init__()
        widths, strides = (num_channels, 32, 64, self.num_features), (1, 2, 2)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(widths, widths[1:], strides):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers, self.to_logits = nn.Sequential(*layers), nn.Linear(self.num_features, num_classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures * 2 - 1).mean((2, 3))

    def classify(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.to_logits(self(pictures))
