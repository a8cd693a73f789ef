"""Train a text-to-image pipeline: `accelerate launch -m hf_ae.train_latent_diffusion [RECIPE.yaml] [--flag value …]`.

text encoder -> denoiser in the latent space of an autoencoder -> picture. The result is a complete pipeline folder.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

import hf_ae
from hf_ae.training.arguments import (
    TrainingArguments,
    check_output_dir,
    find_checkpoint,
    flag,
    one_line_errors,
    parse_arguments,
    parse_overrides,
    write_recipe,
)
from hf_ae.diffusion.captions import Captions, all_text_states, cached_latents, picture_processor, text_states, tokenize
from hf_ae.hub.cards import write_card
from hf_ae.data.images import image_column, num_batches, open_dataset, pick_split
from hf_ae.diffusion.drawing import load_pipeline
from hf_ae.hub.push import check_login, push_folder
from hf_ae.diffusion.denoiser import LatentDiffusion, make_unet
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.plots import image_grid
from hf_ae.diffusion.text_encoders import align_text_encoder, make_prior, round_matrices, text_encoder_from_scratch
from hf_ae.training.run import Run, averaged, begin, clear_output, end, make_accelerator, optimize, show_samples


@dataclass
class LatentDiffusionArguments(TrainingArguments):
    """Train a text-to-image pipeline: a denoiser, conditioned on text, in the latent space of an autoencoder."""

    pretrained_pipeline: str | None = flag(None, "Folder or Hub id of a pipeline to fine-tune; other flags replace its components.")
    vae: str | None = flag(None, "Folder or Hub id of the autoencoder: one of hf_ae's with a spatial code, or diffusers' AutoencoderKL.")
    text_encoder: str | None = flag(None, "Folder or Hub id of a transformers text model, kept frozen; default: a small one, trained too.")
    text_overrides: str | None = flag(None, 'Fields of the small text encoder (a BertConfig): "hidden_size=256,num_hidden_layers=4".')
    align_text_epochs: int = flag(0, "First fine-tune the text encoder, so many epochs, so that captions lie near their pictures' latents.")
    round_text_encoder: bool = flag(False, "Round the matrices of an aligned text encoder to float8: stored in a quarter of the bytes.")
    max_text_length: int = flag(32, "Tokens of a prompt; more are cut off.")
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    caption_columns: str = flag(
        "text",
        "Columns of captions (text, lists of it, or classes): each step draws a column, then one caption of it. Named twice counts twice.",
    )
    caption_prior: bool = flag(
        False,
        "For few pictures: draw each prompt as the nearest caption of the first column; the other columns only lead to it.",
    )
    caption_dropout: float = flag(0.1, "Share of empty captions, which classifier-free guidance needs.")
    image_size: int | None = flag(None, "Height and width of the pictures; default: the autoencoder's.")
    unet_overrides: str | None = flag(None, 'Fields of the UNet2DConditionModel: "block_out_channels=[128,256],layers_per_block=2".')
    prediction_type: str = flag("v_prediction", "v_prediction or epsilon.")
    beta_schedule: str = flag("squaredcos_cap_v2", "Noise schedule: squaredcos_cap_v2, scaled_linear or linear.")
    zero_terminal_snr: bool = flag(False, "Let the last time step be pure noise (Lin et al. 2024); needs v_prediction.")
    snr_gamma: float | None = flag(None, "Min-SNR weighting of the loss (Hang et al. 2023), usually 5.")
    timestep_shift: float = flag(1.0, "More than 1: draw noisy time steps, where the text matters most, more often (Esser et al. 2024).")
    validation_prompts: str | None = flag(None, "Prompts of the sample pictures, separated by |; default: captions of the dataset.")
    num_inference_steps: int = flag(20, "Default number of steps of the finished pipeline.")
    guidance_scale: float = flag(3.0, "Default guidance of the finished pipeline.")
    latent_cache: str | None = flag(None, "Folder for the encoded pictures; default: output_dir/latents.")

    def __post_init__(self):
        super().__post_init__()
        for name, accepted in {
            "prediction_type": ("v_prediction", "epsilon"),
            "beta_schedule": ("squaredcos_cap_v2", "scaled_linear", "linear"),
        }.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: write one of {', '.join(accepted)}.")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction_type v_prediction: from pure noise, the noise says nothing.")
        if not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive.")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be at least 0 and less than 1.")
        for name, least in {"max_text_length": 3, "align_text_epochs": 0, "num_inference_steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")


def main(argv: list[str] | None = None):
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(LatentDiffusionArguments, sys.argv[1:] if argv is None else argv))


def train(args: LatentDiffusionArguments):
    """Everything from the flags to a finished pipeline folder."""
    output = Path(args.output_dir)
    resume_from = check_request(args, output)
    accelerator = make_accelerator(args, output)
    base: Any = load_pipeline(args.pretrained_pipeline) if args.pretrained_pipeline else None
    vae = (load_vae(args.vae) if args.vae else base.vae.eval().requires_grad_(False)).to(accelerator.device)
    dataset, column, captions = load_captions(args)
    drawn = captions.first_column() if args.caption_prior else captions
    if accelerator.is_main_process:
        clear_output(output, everything=args.overwrite_output_dir and resume_from is None)
    accelerator.wait_for_everyone()
    cache = Path(args.latent_cache) if args.latent_cache else output / "latents"
    latents = cached_latents(vae, dataset, column, picture_processor(vae, args.image_size), cache, accelerator)
    latents = scaled(vae, latents)
    tokenizer, text_encoder = load_text_encoder(args, base, captions, latents, output, accelerator, resume_from)
    scheduler, unet = make_scheduler(args, base), load_unet(args, base, latents, text_encoder, accelerator.device)
    jointly = args.text_encoder is None and base is None
    frozen_prior = make_prior(captions, text_encoder, tokenizer) if args.caption_prior and not jointly else None
    model = LatentDiffusion(unet, scheduler, text_encoder if jointly else None, args.snr_gamma, args.timestep_shift)
    data = {"pictures": len(captions), "captions": len(drawn.texts), "caption_dropout": args.caption_dropout}
    batches = num_batches(len(captions), args.train_batch_size, accelerator.num_processes)
    run = begin(args, accelerator, model.to(accelerator.device), batches, data, resume_from)

    def pipeline():
        bare = run.bare_model
        reader = bare.text_encoder or text_encoder
        prior = make_prior(captions, reader, tokenizer) if args.caption_prior and jointly else frozen_prior
        return make_pipeline(args, vae=vae, text_encoder=reader, tokenizer=tokenizer, unet=bare.unet, scheduler=scheduler, prior=prior)

    loop(args, run, latents, drawn, tokenizer, text_encoder, lambda: validate(args, run, drawn, pipeline(), output), output)
    finish(args, run, pipeline, output)


def check_request(args, output: Path) -> Path | None:
    """Raise ValueError for what cannot work, before anything is loaded; returns the checkpoint to go on from."""
    if args.dataset_name is None:
        raise ValueError("Which dataset? Write --dataset_name with a Hub id or a folder.")
    if args.vae is None and args.pretrained_pipeline is None:
        raise ValueError("Which autoencoder? Write --vae with a folder or Hub id, or --pretrained_pipeline to go on from a pipeline.")
    if args.push_to_hub:
        check_login()
    check_output_dir(output, args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    return find_checkpoint(args.resume_from_checkpoint, output)


def load_vae(name: str):
    """An autoencoder with a spatial Gaussian code, in eval mode: one of ours, or diffusers' AutoencoderKL."""
    from diffusers import AutoencoderKL

    logging.disable_progress_bar()
    if name.count("/") != 1 and not Path(name).is_dir():
        raise ValueError(f"The vae {name} is neither a folder nor a Hub id (owner/name).")
    try:
        config = AutoencoderKL.load_config(name)
        ours = str(config.get("model_type")).startswith("hf_ae_")
        vae = AutoModel.from_pretrained(name, dtype=torch.float32) if ours else AutoencoderKL.from_pretrained(name)
    except Exception as error:  # not there, damaged, offline: each library has its own exceptions
        raise ValueError(f"The vae {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if ours and (vae.config.latent_channels is None or not hasattr(vae.config, "kl_weight")):
        raise ValueError(f"The vae {name} ({vae.config.model_type}) has no spatial Gaussian code: train one of {', '.join(VAES)} with "
                         "latent_channels.")  # fmt: skip
    return vae.eval().requires_grad_(False)


VAES = [name for name, model in hf_ae.MODELS.items() if issubclass(model, hf_ae.VAEModel)]


def load_captions(args):
    """(dataset, its image column, the captions)."""
    dataset = pick_split(open_dataset(args.dataset_name, args.dataset_config_name), args.train_split)
    if args.max_train_samples is not None:
        dataset = dataset.select(range(min(args.max_train_samples, len(dataset))))
    column, wanted = image_column(dataset, args.image_column), [name.strip() for name in args.caption_columns.split(",")]
    return dataset, column, Captions(dataset, wanted)


def scaled(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents × scaling_factor; one of our autoencoders that has none yet gets 1 / their standard deviation."""
    if hasattr(vae.config, "image_hw") and vae.config.scaling_factor == 1.0:
        vae.config.scaling_factor = round(1 / latents.std().clamp(min=1e-6).item(), 6)
    return latents * vae.config.scaling_factor


def load_text_encoder(args, base, captions: Captions, latents: torch.Tensor, output: Path, accelerator, resume_from: Path | None):
    """(tokenizer, text encoder): given and frozen, fine-tuned first where asked, or new."""
    folder, name = (resume_from.parent if resume_from else output) / "text_encoder", args.text_encoder
    if name is None and base is not None:
        return base.tokenizer, base.text_encoder.to(accelerator.device).eval().requires_grad_(False)
    if name is None:
        return text_encoder_from_scratch(captions.texts, parse_overrides(args.text_overrides), args.max_text_length, args.seed)
    if name.count("/") != 1 and not Path(name).is_dir():
        raise ValueError(f"The text encoder {name} is neither a folder nor a Hub id (owner/name).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        text_encoder = open_text_model(folder if resume_from and args.align_text_epochs else name)
    except Exception as error:
        raise ValueError(f"The text encoder {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    tokenizer.model_max_length = min(args.max_text_length, tokenizer.model_max_length)
    text_encoder.to(accelerator.device).eval().requires_grad_(False)
    if args.align_text_epochs and not resume_from:
        if accelerator.is_main_process:
            align_text_encoder(text_encoder, tokenizer, captions, latents, args.align_text_epochs, args.seed, accelerator.print)
            if args.round_text_encoder:
                round_matrices(text_encoder)
            text_encoder.save_pretrained(folder)
        accelerator.wait_for_everyone()
        text_encoder = open_text_model(folder).to(accelerator.device).eval().requires_grad_(False)
    return tokenizer, text_encoder


def open_text_model(name):
    """The encoder of a transformers text model."""
    from transformers import AutoModelForTextEncoding, CLIPTextModel

    config = AutoConfig.from_pretrained(name)
    cls = CLIPTextModel if config.model_type in ("clip", "clip_text_model") else AutoModelForTextEncoding
    text_encoder = cls.from_pretrained(name, dtype=torch.float32)
    if cls is not CLIPTextModel:
        text_encoder.config.use_attention_mask = True  # so that pipelines hide the padding from it, too
    return text_encoder


def load_unet(args, base, latents: torch.Tensor, text_encoder, device):
    """The denoiser: that of the pipeline to fine-tune, or a new one."""
    from diffusers.models.attention_processor import AttnProcessor

    if base is not None and args.unet_overrides is None:
        unet = base.unet.float().requires_grad_(True)
        if unet.config.in_channels != latents.shape[1]:
            raise ValueError(
                f"The unet of {args.pretrained_pipeline} takes {unet.config.in_channels} channels, the vae gives {latents.shape[1]}."
            )
    else:
        set_seed(args.seed)
        overrides = parse_overrides(args.unet_overrides)
        unet = make_unet(latents.shape[1], (latents.shape[2], latents.shape[3]), text_encoder.config.hidden_size, overrides)
    if torch.device(device).type == "cpu":  # torch's fused attention has a slow backward pass in bf16 there
        unet.set_attn_processor(AttnProcessor())
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def make_scheduler(args, base=None):
    """The noise that the denoiser is trained with: that of the pipeline to fine-tune, or as the flags say."""
    from diffusers import DDIMScheduler

    if base is not None:
        return DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)
    return DDIMScheduler(
        beta_schedule=args.beta_schedule,
        beta_start=0.00085 if args.beta_schedule == "scaled_linear" else 0.0001,
        beta_end=0.012 if args.beta_schedule == "scaled_linear" else 0.02,
        prediction_type=args.prediction_type,
        rescale_betas_zero_snr=args.zero_terminal_snr,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def loop(args, run: Run, latents, captions: Captions, tokenizer, text_encoder, measure, output: Path):
    """Epochs of latents with a caption each through the denoiser."""
    device = run.accelerator.device
    tokens = tokenize(tokenizer, captions.texts, device)
    states = all_text_states(text_encoder, tokens) if run.bare_model.text_encoder is None else None

    def forward(rows):
        dice = random.Random(int(torch.randint(2**62, ())))  # from the random state that checkpoints hold
        numbers = captions.draw(rows, args.caption_dropout, dice).to(device)
        clean = latents[rows].to(device)
        if states is not None:
            return run.model(clean, text=states[numbers].to(clean.dtype))
        chosen = {name: values[numbers] for name, values in tokens.items()}
        if run.bare_model.text_encoder is not None:
            return run.model(clean, tokens=chosen)
        with torch.no_grad():
            text = text_states(text_encoder, **chosen)
        return run.model(clean, text=text)

    optimize(args, run, captions.batches, forward, measure, output)


def make_pipeline(args, scheduler, **components):
    """The pipeline of these components, with a sampler that needs few steps (Lu et al. 2022)."""
    from diffusers import DPMSolverMultistepScheduler

    from hf_ae.pipelines import TextToImagePipeline

    return TextToImagePipeline(
        **components,
        scheduler=DPMSolverMultistepScheduler.from_config(scheduler.config),
        default_num_inference_steps=args.num_inference_steps,
        default_guidance_scale=args.guidance_scale,
    )


@torch.no_grad()
def validate(args, run: Run, captions: Captions, pipe, output: Path):
    """Draw sample pictures, with the averaged weights if there are any."""
    accelerator = run.accelerator
    if not accelerator.is_main_process:
        return
    spread = torch.linspace(1, len(captions.texts) - 1, 32).long().unique()
    prompts = args.validation_prompts.split("|") if args.validation_prompts else [captions.texts[i] for i in spread]
    bare = run.bare_model.eval()
    pipe.set_progress_bar_config(disable=True)
    state = torch.get_rng_state()
    with averaged(bare, run.ema), accelerator.autocast():
        pixels = torch.cat([pipe(prompts[i : i + 16], seed=0, output_type="pt").images.float() for i in range(0, len(prompts), 16)])
    torch.set_rng_state(state)
    bare.train()
    show_samples(args, run, lambda path: image_grid(pixels, 8, path, cell=64), output)


def finish(args, run: Run, pipeline, output: Path):
    """Save the pipeline folder, complete with code, recipe and card, and push it where that is asked."""
    accelerator = run.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if run.ema is not None:
            run.ema.copy_to(run.bare_model.parameters())
        save_pipeline(pipeline(), output, args.save_dtype)
        write_recipe(args, output / "recipe.yaml")
        write_card(output)
        (output / ".hf_ae_run").unlink(missing_ok=True)
        accelerator.print(f'The pipeline is in {output}: try  hf-ae generate "a prompt" --model {output} -o picture.png')
        if args.push_to_hub:
            accelerator.print(f"Pushed to {push_folder(output, args.hub_model_id or output.resolve().name, args.hub_private)}")
    end(run)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
