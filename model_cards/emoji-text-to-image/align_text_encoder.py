"""The text encoder of this pipeline: `python align_text_encoder.py TEXT_MODEL VAE DATASET OUTPUT [--epochs 8]`.

TEXT_MODEL (a folder or Hub id, here sentence-transformers/all-MiniLM-L6-v2) is fine-tuned on the captions of DATASET,
so that captions of one image lie together, apart from those of others, and say what the image looks like in the latent
space of VAE. Then its matrices are rounded to float8, which stores them in a quarter of the bytes. OUTPUT is what
recipe.yaml names.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_scheduler

from hf_ae.data import image_column, open_dataset, pick_split
from hf_ae.diffusion.captions import Captions, cached_latents
from hf_ae.diffusion.text_encoders import load_text_encoder, mean_states, text_vectors, tokenize
from hf_ae.loading import image_processor_for, load_autoencoder

TEMPERATURE = 0.05
BATCH = 128


class Alignment(nn.Module):
    """A text encoder, a vector for every image, and a linear map from texts to latents."""

    def __init__(self, text_encoder: nn.Module, images: Tensor, latent_size: int) -> None:
        super().__init__()
        self.text_encoder, self.images = text_encoder, nn.Embedding.from_pretrained(images, freeze=False)
        self.to_latents = nn.Linear(images.shape[1], latent_size)

    def forward(self, tokens: dict[str, Tensor], targets: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """targets: (texts, images), rows sum to 1. latents: (texts, values).

        contrast: cross-entropy of a caption's images under the cosine similarities of texts and images, as in CLIP
        (Radford et al. 2021). unexplained: the squared error of the latents as a linear function of the text.
        """
        vectors = mean_states(self.text_encoder, tokens)
        similarity = F.normalize(vectors, dim=1) @ F.normalize(self.images.weight, dim=1).T
        contrast = -(targets * (similarity / TEMPERATURE).log_softmax(1)).sum(1).mean()
        return contrast, (self.to_latents(vectors) - latents).square().mean()


def align_text_encoder(
    text_encoder: Any,
    tokenizer: Any,
    captions: Captions,
    latents: Tensor,
    epochs: int,
    seed: int,
    log: Callable[[str], Any] = print,
) -> None:
    """Fine-tune `text_encoder` in place. Unlike images and captions of CLIP, the images are few and known: each gets a
    vector, that starts as the mean of its captions'."""
    device = next(text_encoder.parameters()).device
    generator = random.Random(seed)
    torch.manual_seed(seed)
    images_of: dict[int, list[int]] = {}
    for image, columns in enumerate(captions.choices):
        for index in {i for indices in columns for i in indices}:
            images_of.setdefault(index, []).append(image)
    tokens = tokenize(tokenizer, captions.texts, device)
    flat = (latents - latents.mean(0)).flatten(1).to(device)
    flat /= flat.square().mean().sqrt()
    model = Alignment(text_encoder, first_vectors(text_encoder, tokens, captions), flat.shape[1]).to(device)
    text_encoder.requires_grad_(True).train()
    # torch's fused attention has a slow backward pass in bf16 on a CPU
    text_encoder.set_attn_implementation("eager")
    steps = max(1, len(images_of) * epochs // BATCH)
    rest = [*model.images.parameters(), *model.to_latents.parameters()]
    optimizer = torch.optim.AdamW([{"params": text_encoder.parameters(), "lr": 1e-4}, {"params": rest, "lr": 1e-3}])
    scheduler = get_scheduler("cosine", optimizer, min(50, steps // 10), steps)
    captioned = [row for row, columns in enumerate(captions.choices) if columns]
    for _ in tqdm(range(steps), desc="aligning text", mininterval=1.0):
        rows = torch.tensor([generator.choice(captioned) for _ in range(BATCH)])
        indices = captions.draw(rows, 0.0, generator)
        targets = torch.zeros(BATCH, len(captions), device=device)
        for row, index in enumerate(indices.tolist()):
            targets[row, images_of[index]] = 1 / len(images_of[index])
        length = int(tokens["attention_mask"][indices].sum(1).max())
        drawn = {name: values[indices, :length] for name, values in tokens.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cpu"):
            contrast, unexplained = model(drawn, targets, targets @ flat)
        (contrast + unexplained).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    text_encoder.requires_grad_(False).eval()
    log(f"Aligned: cross-entropy {contrast.item():.3f}, unexplained fraction of the latents {unexplained.item():.3f}.")


@torch.no_grad()
def first_vectors(text_encoder: Any, tokens: dict[str, Tensor], captions: Captions) -> Tensor:
    """For each image the mean over its columns of the mean of their captions' vectors: (images, width)."""
    vectors = text_vectors(text_encoder, tokens)
    empty = vectors.new_zeros(vectors.shape[1])
    means = [[vectors[indices].mean(0) for indices in columns] or [empty] for columns in captions.choices]
    return torch.stack([torch.stack(columns).mean(0) for columns in means])


@torch.no_grad()
def round_matrices(model: nn.Module) -> None:
    """Round all matrices in place to what float8 (e4m3: three bits of mantissa) holds; vectors stay as they are."""
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.copy_(weight.to(torch.float8_e4m3fn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("text_model", "vae", "dataset", "output"):
        parser.add_argument(name)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--split", default="train+test")
    parser.add_argument("--caption_columns", default="text,text,keywords")
    parser.add_argument("--max_text_length", type=int, default=20)
    args = parser.parse_args()
    rows, vae = pick_split(open_dataset(args.dataset), args.split), load_autoencoder(args.vae)
    captions = Captions(rows, args.caption_columns.split(","))
    cache, processor = Path(args.output).with_name("latents"), image_processor_for(vae)
    latents = cached_latents(vae, rows, image_column(rows), processor, cache, Accelerator(cpu=True))
    tokenizer, text_encoder = load_text_encoder(args.text_model, args.max_text_length)
    set_seed(0)
    align_text_encoder(text_encoder, tokenizer, captions, latents * vae.config.scaling_factor, args.epochs, seed=0)
    round_matrices(text_encoder)
    text_encoder.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
