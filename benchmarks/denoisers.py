"""Denoisers of latents after equal time: a U-Net or a transformer, v-prediction or flow matching.

    python benchmarks/denoisers.py EMOJI_STYLES [--scenes outputs/emoji-styles/scenes] [--minutes 10] [--seeds 1]
        [--pipeline model_cards/emoji-text-to-image]

Each is trained for so many minutes on the latents and captions of the scenes (made by scenes.py of
model_cards/emoji-text-to-image), by Muon, in bfloat16; then it draws 200 names in styles that they were seen in, by 20
Euler steps with guidance of 2, and the judges of judges.py look at these.
"""

import argparse
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from composition import World, judged
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor

from hf_ae.data import image_column, open_dataset, row_batches
from hf_ae.diffusion.captions import Captions, cached_latents
from hf_ae.diffusion.denoiser import make_unet
from hf_ae.diffusion.text_encoders import TextStates, text_states, tokenize
from hf_ae.loading import image_processor_for, load_pipeline
from hf_ae.pipelines.image_io import decode
from hf_ae.training.optimizers import KernelMuon

BATCH, RATE, STEPS, GUIDANCE, DRAWN = 64, 3e-3, 20, 2.0, 200
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy latents, times in 0…1 (1 is noise) and text states -> what is predicted."""


def unet(channels: int, side: int, width: int) -> tuple[torch.nn.Module, Denoiser]:
    down, up = ["CrossAttnDownBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2
    fields = dict(block_out_channels=[96, 192], resnet_time_scale_shift="scale_shift")
    model = make_unet(channels, (side, side), width, fields | dict(down_block_types=down, up_block_types=up))
    return model, lambda x, t, text: model(x, t * 999, text, return_dict=False)[0]


def transformer(channels: int, side: int, width: int) -> tuple[torch.nn.Module, Denoiser]:
    """PixArt's (Chen et al. 2023), with about as many parameters."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=channels, out_channels=channels, num_layers=8,
        cross_attention_dim=256, sample_size=side, patch_size=1, caption_channels=width,
        use_additional_conditions=False,
    )  # fmt: skip
    none = {"resolution": None, "aspect_ratio": None}
    return model, lambda x, t, text: model(
        x, encoder_hidden_states=text, timestep=t * 999, added_cond_kwargs=none, return_dict=False
    )[0]


def coefficients(kind: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(of the image, of the noise) in what is seen, and (of the image, of the noise) in what is predicted."""
    if kind == "flow":  # Lipman et al. 2023
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    angle = t * torch.pi / 2  # Salimans and Ho 2022, on the cosine schedule
    return angle.cos(), angle.sin(), -angle.sin(), angle.cos()


def loss_of(predict: Denoiser, kind: str, clean: Tensor, text: Tensor) -> Tensor:
    spread = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
    t = 2 * spread / (1 + spread)  # shifted by 2 towards noise (Esser et al. 2024)
    noise = torch.randn_like(clean)
    a, b, c, d = (x[:, None, None, None] for x in coefficients(kind, t))
    with torch.autocast("cpu", torch.bfloat16):
        predicted = predict(a * clean + b * noise, t, text)
    return (predicted.float() - (c * clean + d * noise)).square().mean()


@torch.no_grad()
def sampled(predict: Denoiser, kind: str, shape: tuple[int, ...], text: Tensor, empty: Tensor) -> Tensor:
    """Latents, by deterministic steps of equal length in time."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, STEPS + 1)
    for t, end in pairwise(times):
        both = predict(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([empty.expand_as(text), text]))
        without, prompted = both.chunk(2)
        predicted = without + GUIDANCE * (prompted - without)
        a, b, c, d = coefficients(kind, t)
        clean = (d * x - b * predicted) / (a * d - b * c)
        noise = (a * predicted - c * x) / (a * d - b * c)
        a, b, *_ = coefficients(kind, end)
        x = a * clean + b * noise
    return x


def trained(make: Any, kind: str, data: tuple[Tensor, Captions, TextStates], minutes: float, seed: int) -> Any:
    """(predict with averaged weights, images seen, seconds)."""
    latents, captions, states = data
    torch.manual_seed(seed)
    model, predict = make(latents.shape[1], latents.shape[2], states.kept.shape[2])
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(AttnProcessor())
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    optimizers = [KernelMuon(matrices, RATE, 0.0), torch.optim.AdamW(rest, RATE, weight_decay=0.0)]
    average, generator, seen, started, epoch = (
        EMAModel(parameters, decay=0.999),
        random.Random(seed),
        0,
        time.time(),
        0,
    )
    while time.time() - started < 60 * minutes:
        for rows in row_batches(len(captions), BATCH, epoch, seed=seed):
            text = states(captions.draw(rows, 0.1, generator)).float()
            loss_of(predict, kind, latents[rows], text).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.step(parameters)
            seen += len(rows)
            if time.time() - started > 60 * minutes:
                break
        epoch += 1
    average.copy_to(parameters)
    model.eval()
    return predict, seen, time.time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji_styles")
    parser.add_argument("--scenes", default="outputs/emoji-styles/scenes")
    parser.add_argument("--held_out", default="outputs/emoji-styles/held_out.json")
    parser.add_argument("--pipeline", default="model_cards/emoji-text-to-image")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    pipe, world = load_pipeline(args.pipeline), World(args.emoji_styles, args.held_out)
    rows = open_dataset(args.scenes)["train"]
    place, processor = Path("outputs/denoisers"), image_processor_for(pipe.vae)
    latents = cached_latents(pipe.vae, rows, image_column(rows), processor, place, Accelerator(cpu=True))
    captions = Captions(rows, ["styled", "styled", "styled", "plain"])
    states = TextStates(pipe.text_encoder, tokenize(pipe.tokenizer, captions.texts, "cpu"))
    chosen = random.Random(0).sample(range(world.count), DRAWN)
    names, styles = [world.names[i] for i in chosen], [world.styles[i] for i in chosen]
    prompts = tokenize(pipe.tokenizer, [f"{n}, {s}" for n, s in zip(names, styles)], "cpu")
    with torch.no_grad():
        text = text_states(pipe.text_encoder, **prompts)
        empty = text_states(pipe.text_encoder, **tokenize(pipe.tokenizer, [""], "cpu"))
    data = (latents * pipe.vae.config.scaling_factor, captions, states)
    print(f"| denoiser, {args.minutes:g} minutes | seed | images a second | name | top 5 | style |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for make, kind in ((unet, "v"), (unet, "flow"), (transformer, "v"), (transformer, "flow")):
        for seed in range(args.seeds):
            predict, seen, seconds = trained(make, kind, data, args.minutes, seed)
            x = sampled(predict, kind, (DRAWN, *latents.shape[1:]), text, empty)
            drawn = torch.cat([decode(pipe.vae, part / pipe.vae.config.scaling_factor) for part in x.split(25)])
            found = judged(world, drawn, names, styles)
            figures = f"{found['top1']:.3f} | {found['top5']:.3f} | {found['style']:.3f}"
            print(f"| {make.__name__}, {kind} | {seed} | {seen / seconds:.0f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
