"""The network in whose features generated images are compared with real ones: a small one that ships, or a user's
own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import require
from ..loading import opening
from .record import own_random_numbers

WEIGHTS = Path(__file__).with_name("feature_network.safetensors")
SHA256 = "2b0b73ccb5bce2208305b027050277d3df6e0c5bdd9d44f6adfd7e1510557c3d"
"""Of the file above. benchmarks/feature_network.py trains it; figures measured with other weights cannot be
compared."""


class FeatureNetwork(nn.Module):
    """Gray images (batch, 1, 28, 28) in 0…1 -> features (batch, 64); `classify` -> logits (batch, num_classes).

    Five convolutions with batch norm and a linear layer: 164,000 weights.
    """

    num_features = 64

    def __init__(self, num_classes: int = 20, num_channels: int = 1) -> None:
        super().__init__()
        widths, sizes, strides = (num_channels, 16, 32, 64, 64, 64), (5, 3, 3, 3, 3), (2, 1, 2, 1, 2)
        layers: list[nn.Module] = []
        for inputs, outputs, size, stride in zip(widths, widths[1:], sizes, strides):
            conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        head = [
            nn.Flatten(), nn.Linear(widths[-1] * 16, self.num_features), nn.BatchNorm1d(self.num_features), nn.ReLU(),
        ]  # fmt: skip
        self.layers, self.to_logits = nn.Sequential(*layers, *head), nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)

    def classify(self, images: Tensor) -> Tensor:
        return self.to_logits(self(images))


class TransformersFeatures(nn.Module):
    """Images of any size and 1, 3 or 4 channels in 0…1 -> pooled features of a transformers image model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        with opening("feature network", name):
            self.network: Any = AutoModel.from_pretrained(name, use_safetensors=True)
            self.processor: Any = AutoImageProcessor.from_pretrained(name)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        values = self.processor(list(images), do_rescale=False, return_tensors="pt").pixel_values
        output = self.network(values.to(self.network.device))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            states = output.last_hidden_state
            pooled = states.mean(1) if states.ndim == 3 else states.mean((2, 3))
        return pooled.flatten(1)


def load_feature_network(name: str | None = None) -> nn.Module:
    """The network that ships, its file's SHA-256 checked; or the transformers image model in a folder or Hub id.

    In eval mode. Raises ValueError where the file is damaged or the model cannot be loaded.
    """
    if name is not None:
        return TransformersFeatures(name).eval()
    data = WEIGHTS.read_bytes() if WEIGHTS.is_file() else b""
    good = hashlib.sha256(data).hexdigest() == SHA256
    require(good, f"{WEIGHTS.name} is not the file that this version was released with: install hf_ae again.")
    with own_random_numbers():  # its first weights are random
        network = FeatureNetwork()
    network.load_state_dict(load(data))
    return network.eval()


@torch.no_grad()
def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """Images (images, channels, height, width) in 0…1 -> (images, features) on the CPU. Raises ValueError.

    The network that ships takes gray images of at most 64 pixels, which are brought to 28×28.
    """
    if isinstance(network, FeatureNetwork):
        _, channels, height, width = images.shape
        require(
            channels == 1 and max(height, width) <= 64,
            f"Images of {channels} channels and {height}×{width} pixels need another feature network than the one "
            "that ships, for small gray ones: write --feature_network with an image model of transformers.",
        )
        if (height, width) != (28, 28):
            images = F.interpolate(images, size=(28, 28), mode="bilinear", antialias=True)
    return torch.cat([network(x).float().cpu() for x in images.split(250)])
