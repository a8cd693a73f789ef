"""Train a text-to-image pipeline: `accelerate launch -m hf_ae.train_latent_diffusion [RECIPE.yaml] [--flag value …]`.

text encoder -> denoiser in the latent space of an autoencoder -> image. The result is a complete pipeline folder.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

import hf_ae
from hf_ae.data import image_column, num_batches, open_dataset, pick_split, row_batches
from hf_ae.diffusion.captions import Captions, cached_latents, split_list
from hf_ae.diffusion.denoiser import BETA_SCHEDULES, PREDICTIONS, LatentDiffusion, make_scheduler, make_unet
from hf_ae.diffusion.distillation import Distillation
from hf_ae.diffusion.lora import add_lora, save_lora
from hf_ae.diffusion.text_encoders import (
    TextStates,
    load_text_encoder,
    make_prior,
    new_text_encoder,
    text_states,
    tokenize,
)
from hf_ae.errors import one_line_errors, require
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.hub.push import check_publishing, publish
from hf_ae.loading import image_processor_for, load_autoencoder, load_pipeline
from hf_ae.plots import image_grid
from hf_ae.training.arguments import TrainingArguments, flag, parse_arguments, parse_overrides
from hf_ae.training.checkpoints import keep, load_checkpoint
from hf_ae.training.optimizers import averaged
from hf_ae.training.output_folder import begin_run, check_request
from hf_ae.training.processes import on_main
from hf_ae.training.run import Run
from hf_ae.training.start import training
from hf_ae.training.tracking import log_step, show_samples


@dataclass
class LatentDiffusionArguments(TrainingArguments):
    """Train a text-to-image pipeline: a denoiser, conditioned on text, in the latent space of an autoencoder."""

    pretrained_pipeline: str | None = flag(None, "Folder or Hub id of a pipeline to fine-tune.")
    vae: str | None = flag(None, "Folder or Hub id of the autoencoder: a VAE with spatial latents, or AutoencoderKL.")
    text_encoder: str | None = flag(
        None,
        "Folder or Hub id of a transformers text model, kept frozen; or fields of a small BERT, trained too: "
        '"hidden_size=64,num_hidden_layers=1". Default: such a small one.',
    )
    max_text_length: int = flag(32, "Tokens of a prompt; more are cut off.", least=3)
    image_column: str | None = flag(None, "Column of the images; default: the only one that holds images.")
    caption_columns: str = flag(
        "text",
        "Columns of captions (text, lists of it, or classes): each step draws one, then a caption of it. Named "
        "twice counts twice.",
    )
    caption_prior: bool = flag(
        False, "For few images: draw each prompt as the nearest caption of the first column; other columns lead to it."
    )
    caption_dropout: float = flag(0.1, "Fraction of empty captions, which classifier-free guidance needs.", least=0)
    image_size: int | None = flag(None, "Height and width of the images; default: the autoencoder's.", least=1)
    lora_rank: int | None = flag(
        None, "Train low-rank adapters of pretrained_pipeline's denoiser alone, for load_lora_weights.", least=1
    )
    distill: int | None = flag(
        None, "Steps in which pretrained_pipeline's denoiser learns to draw what it draws in twice as many with "
        "guidance_scale: then without guidance.", least=1,
    )  # fmt: skip
    unet_overrides: str | None = flag(None, 'Fields of the UNet2DConditionModel: "block_out_channels=[128,256]".')
    prediction_type: str = flag("v_prediction", "v_prediction or epsilon.", choices=PREDICTIONS)
    beta_schedule: str = flag("squaredcos_cap_v2", f"Noise: {', '.join(BETA_SCHEDULES)}.", choices=BETA_SCHEDULES)
    zero_terminal_snr: bool = flag(
        False, "Let the last time step be pure noise (Lin et al. 2024); needs v_prediction."
    )
    snr_gamma: float | None = flag(None, "Min-SNR weighting of the loss (Hang et al. 2023), usually 5.", above=0)
    timestep_shift: float = flag(1.0, "More than 1: draw noisy time steps, where the text matters most, more often.")
    validation_prompts: str | None = flag(
        None, "Prompts of the samples, separated by |; default: captions of the dataset."
    )
    num_inference_steps: int = flag(20, "Default number of steps of the finished pipeline.", least=1)
    guidance_scale: float = flag(3.0, "Default guidance of the finished pipeline.")
    latent_cache: str | None = flag(None, "Folder for the encoded images; default: output_dir/latents.")

    def __post_init__(self) -> None:
        super().__post_init__()
        good = not self.zero_terminal_snr or self.prediction_type == "v_prediction"
        require(good, "zero_terminal_snr needs prediction_type v_prediction: from pure noise, the noise says nothing.")
        require(self.timestep_shift > 0, f"timestep_shift={self.timestep_shift} must be positive.")
        for name in ("lora_rank", "distill"):
            asked = f"{name}={getattr(self, name)} takes a denoiser that is trained already"
            good = getattr(self, name) is None or self.pretrained_pipeline is not None
            require(good, f"{asked}: write --pretrained_pipeline, too.")
            for other in ("unet_overrides", "text_encoder", "vae", "caption_prior"):
                good = getattr(self, name) is None or not getattr(self, other)
                require(good, f"{name} takes all parts of pretrained_pipeline as they are: leave out {other}.")
        require(None in (self.lora_rank, self.distill), "lora_rank and distill are two trainings: write one of them.")
        require(self.caption_dropout < 1, f"caption_dropout={self.caption_dropout} must be less than 1.")


@dataclass
class Text:
    """The captions as the denoiser gets them: their text encoder and tokenizer, and whether that is trained too."""

    captions: Captions
    tokenizer: Any
    encoder: Any
    is_trained: bool


def main(argv: list[str] | None = None) -> None:
    """Train as the recipe and the flags say. Ends with exit code 2 and one line on bad input."""
    with one_line_errors():
        train(parse_arguments(LatentDiffusionArguments, sys.argv[1:] if argv is None else argv))


def train(args: LatentDiffusionArguments) -> None:
    """Everything from the flags to a finished pipeline folder."""
    check_publishing(args)
    question = (
        "Which autoencoder? Write --vae with a folder or Hub id, or --pretrained_pipeline to go on from a pipeline."
    )
    resume_from = check_request(args, {} if args.pretrained_pipeline else {"vae": question})
    with training(args) as accelerator:
        train_pipeline(args, accelerator, resume_from)


def train_pipeline(args: LatentDiffusionArguments, accelerator: Accelerator, resume_from: Path | None) -> None:
    """The same where the output folder is this training's own."""
    folder = Path(args.output_dir)
    name = args.pretrained_pipeline
    base: Any = load_pipeline(name, device=accelerator.device) if name else None
    vae = load_vae(args.vae) if args.vae else base.vae.eval().requires_grad_(False)
    vae.to(accelerator.device)
    rows = pick_split(open_dataset(str(args.dataset_name), args.dataset_config_name), args.train_split)
    if args.max_train_samples is not None:
        rows = rows.select(range(min(args.max_train_samples, len(rows))))
    column, all_captions = image_column(rows, args.image_column), Captions(rows, split_list(args.caption_columns))
    if accelerator.is_main_process:
        begin_run(folder, replace=args.overwrite_output_dir and resume_from is None)
    accelerator.wait_for_everyone()
    cache = Path(args.latent_cache) if args.latent_cache else folder / "latents"
    latents = cached_latents(vae, rows, column, image_processor_for(vae, args.image_size), cache, accelerator)
    latents = scaled(vae, latents)
    all_captions.tell_of_bare()
    text = load_text(args, base, all_captions, accelerator.device)
    unet = load_unet(args, base, latents, text.encoder, accelerator.device)
    scheduler = base_scheduler(base) or make_scheduler(
        args.prediction_type, args.beta_schedule, args.zero_terminal_snr
    )
    model = make_model(args, unet, scheduler, text)
    count, texts = len(text.captions), len(text.captions.texts)
    # the names that checkpoints of version 0.1 hold
    data: dict[str, Any] = {"pictures": count, "captions": texts, "caption_dropout": args.caption_dropout}
    data |= {"lora_rank": args.lora_rank, "distill": args.distill}
    batches = num_batches(count, args.train_batch_size, accelerator.num_processes)
    frozen_prior = None if text.is_trained else caption_prior(args, all_captions, text.encoder, text.tokenizer)
    with Run(args, accelerator, model.to(accelerator.device), batches, data) as run:
        if resume_from is not None:
            load_checkpoint(run, resume_from)

        def pipeline() -> Any:
            trained = run.bare_model.eval()  # no dropout in the vectors of the prior; validate goes back to training
            reader = trained.text_encoder or text.encoder
            prior = caption_prior(args, all_captions, reader, text.tokenizer) if text.is_trained else frozen_prior
            parts = dict(vae=vae, text_encoder=reader, tokenizer=text.tokenizer, unet=trained.unet, prior=prior)
            return make_pipeline(args, scheduler, **parts, **kept_parts(args, base))

        take_steps(args, run, latents, text, pipeline)
        finish(args, run, pipeline)


def kept_parts(args: LatentDiffusionArguments, base: Any) -> dict[str, Any]:
    """Of the pipeline to fine-tune, the components that still fit: a decoder of the same latents, and a discriminator
    that reads the same texts."""
    kept = {} if base is None or args.vae else {"image_decoder": base.image_decoder}
    if base is not None and args.text_encoder is None and not args.caption_prior:
        kept["discriminator"] = base.discriminator
    return kept


def make_model(args: LatentDiffusionArguments, unet: Any, scheduler: Any, text: Text) -> LatentDiffusion:
    """What is trained, with its loss."""
    if args.distill is not None:
        with torch.no_grad():
            device = next(text.encoder.parameters()).device
            empty = text_states(text.encoder, **tokenize(text.tokenizer, [""], device))
        return Distillation(unet, scheduler, empty, args.distill, args.guidance_scale)
    own_encoder = text.encoder if text.is_trained else None
    return LatentDiffusion(unet, scheduler, own_encoder, args.snr_gamma, args.timestep_shift)


def take_steps(
    args: LatentDiffusionArguments, run: Run, latents: Tensor, text: Text, pipeline: Callable[[], Any]
) -> None:
    """Epochs of latents with a caption each through the denoiser, with logs and checkpoints, and samples in
    between."""
    accelerator, device, captions = run.accelerator, run.accelerator.device, text.captions
    tokens = tokenize(text.tokenizer, captions.texts, device)
    states = None if text.is_trained else TextStates(text.encoder, tokens)
    run.open()
    while run.unfinished:
        for rows in row_batches(len(captions), args.train_batch_size, run.progress.epoch, **run.place):
            with accelerator.accumulate(run.model):
                generator = random.Random(int(torch.randint(2**62, ())))  # from the random state that checkpoints hold
                index = captions.draw(rows, args.caption_dropout, generator)
                clean = latents[rows].to(device)
                if states is None:
                    output = run.model(clean, tokens={name: values[index] for name, values in tokens.items()})
                else:
                    with accelerator.autocast():
                        text_input = states(index)
                    output = run.model(clean, text=text_input.to(clean.dtype))
                accelerator.backward(output.loss)
                run.update_weights()
            if run.step_done(output, len(rows)):
                if run.every(args.logging_steps):
                    log_step(run, output)
                keep(run)
            if not run.unfinished:
                break
        else:
            run.next_epoch()
        if run.validation_due and accelerator.is_main_process:
            with run.clock.paused():
                validate(args, run, captions, pipeline())
    run.close()


def load_vae(name: str) -> Any:
    """An autoencoder with spatial Gaussian latents, frozen: one of ours, or diffusers' AutoencoderKL. Raises
    ValueError."""
    vae = load_autoencoder(name).requires_grad_(False)
    kind = getattr(vae.config, "model_type", type(vae).__name__)
    good = kind == "AutoencoderKL" or (getattr(vae, "can_sample", False) and vae.config.latent_channels is not None)
    choice = ", ".join(n for n, model in hf_ae.MODELS.items() if model.can_sample)
    require(
        good, f"The vae {name} ({kind}) has no spatial Gaussian latents: train one of {choice} with latent_channels."
    )
    return vae


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents × scaling_factor; one of our autoencoders that has none yet gets 1 / their standard deviation."""
    if hasattr(vae.config, "latent_shape") and vae.config.scaling_factor == 1.0:
        vae.config.scaling_factor = round(1 / latents.std().clamp(min=1e-6).item(), 6)
    return latents * vae.config.scaling_factor


def load_text(args: LatentDiffusionArguments, base: Any, all_captions: Captions, device: torch.device) -> Text:
    """The captions that the denoiser learns, with a text encoder: given and frozen, the pipeline's, or new."""
    name, captions = args.text_encoder, all_captions.first_column() if args.caption_prior else all_captions
    if name is None and base is not None:
        return Text(captions, base.tokenizer, base.text_encoder.to(device).eval().requires_grad_(False), False)
    if name is None or ("=" in name and not Path(name).is_dir()):
        new = new_text_encoder(all_captions.texts, parse_overrides(name), args.max_text_length, args.seed)
        return Text(captions, *new, True)
    tokenizer, encoder = load_text_encoder(name, args.max_text_length)
    return Text(captions, tokenizer, encoder.to(device), False)


def caption_prior(args: LatentDiffusionArguments, captions: Captions, encoder: Any, tokenizer: Any) -> Any:
    """The prior of the pipeline, where it is asked for."""
    return make_prior(captions, encoder, tokenizer) if args.caption_prior else None


def load_unet(
    args: LatentDiffusionArguments, base: Any, latents: Tensor, text_encoder: Any, device: torch.device
) -> Any:
    """The denoiser: that of the pipeline to fine-tune, or a new one. Raises ValueError."""
    from diffusers.models.attention_processor import AttnProcessor

    channels, height, width = latents.shape[1:]
    if base is not None and args.unet_overrides is None:
        unet = base.unet.float().requires_grad_(True)
        takes, name = unet.config.in_channels, args.pretrained_pipeline
        require(takes == channels, f"The unet of {name} takes {takes} channels, the vae gives {channels}.")
    else:
        set_seed(args.seed)
        overrides = parse_overrides(args.unet_overrides)
        unet = make_unet(channels, (height, width), text_encoder.config.hidden_size, overrides)
    if args.lora_rank is not None:
        add_lora(unet, args.lora_rank)
    if device.type == "cpu":  # torch's fused attention has a slow backward pass in bf16 there
        unet.set_attn_processor(AttnProcessor())
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def base_scheduler(base: Any) -> Any:
    """The noise that the pipeline to fine-tune was trained with, if there is one."""
    from diffusers import DDIMScheduler

    return None if base is None else DDIMScheduler.from_config(base.scheduler.config, clip_sample=False)


def make_pipeline(args: LatentDiffusionArguments, scheduler: Any, **components: Any) -> Any:
    """The pipeline of these components, with a sampler that needs few steps (Lu et al. 2022), or with the one that it
    was distilled for."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    from hf_ae.pipelines.text_to_image import TextToImagePipeline

    if args.distill is None:
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    else:  # the steps that it was trained at
        spacing = dict(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
        scheduler = DDIMScheduler.from_config(scheduler.config, **spacing)
    return TextToImagePipeline(
        **components,
        scheduler=scheduler,
        default_num_inference_steps=args.distill or args.num_inference_steps,
        default_guidance_scale=args.guidance_scale if args.distill is None else 1.0,
    )


@torch.no_grad()
def validate(args: LatentDiffusionArguments, run: Run, captions: Captions, pipe: Any) -> None:
    """Draw sample images, with the averaged weights if there are any."""
    spread = torch.linspace(1, len(captions.texts) - 1, 32).long().unique()
    prompts = args.validation_prompts.split("|") if args.validation_prompts else [captions.texts[i] for i in spread]
    model = run.bare_model.eval()
    pipe.set_progress_bar_config(disable=True)
    state = torch.get_rng_state()
    with averaged(model, run.ema), run.accelerator.autocast():
        parts = [prompts[i : i + 16] for i in range(0, len(prompts), 16)]
        pixels = torch.cat([pipe(part, seed=0, output_type="pt").images.float() for part in parts])
    torch.set_rng_state(state)
    model.train()
    show_samples(run, lambda path: image_grid(pixels, 8, path, cell=64))


def finish(args: LatentDiffusionArguments, run: Run, pipeline: Callable[[], Any]) -> None:
    """Save the pipeline folder, complete with code, recipe and card, and push it where that is asked."""
    folder = Path(args.output_dir)

    def complete() -> None:
        if run.ema is not None:
            run.ema.copy_to(run.bare_model.parameters())
        if args.lora_rank is not None:
            save_lora(run.bare_model.unet, folder, args.save_dtype)
            run.print(f"The adapters are in {folder}: pipe.load_lora_weights({str(folder)!r})")
        else:
            save_pipeline(pipeline(), folder, args.save_dtype)
            advice = f'try  hf-ae generate "a prompt" --model {folder} -o image.png'
            run.print(f"The pipeline is in {folder}: {advice}")
        publish(args, run.print)

    on_main(run.accelerator, complete)
    run.end()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
