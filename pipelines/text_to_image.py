"""Prompts -> images: latent diffusion (Rombach et al. 2022) out of parts that swap with the ecosystem's.

```
prompt -> tokenizer -> text encoder -> (prior: the nearest known caption -> tokenizer -> text encoder)
                                        |
                                        v
 noise -> latents -> [UNet -> guidance -> scheduler] x steps -> latents -> VAE decoder -> images -> (discriminator)
             ^                              |
 image -> VAE encoder                       '-> (light image decoder) -> previews
```

It imports nothing of the project but its siblings: a model repo ships them as one `pipeline.py`, which runs where
hf_ae is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .drawing_request import DrawingRequest, Images, Preview, TextToImageOutput
from .image_io import decode, dtype_of, pixel_range, present, require
from .repo_parts import EXTRA, NOT_RUN, REQUIRED, UNCHECKED, RepoLoading, logger

CACHED_TEXTS = 64


@dataclass
class EncodedText:
    """A text's states (1, tokens, width), the end of it that was cut off, and the caption that the prior takes it
    for."""

    states: torch.Tensor
    cut: str
    caption: str | None


class TextToImagePipeline(RepoLoading, DiffusionPipeline):
    """Text encoder -> denoising in the latent space -> image decoder.

    vae: `encode(x).latent_dist`, `decode(z).sample`, `config.scaling_factor`, `config.block_out_channels`; its pixels
    are in [-1, 1] unless `config.pixel_range` says otherwise. text_encoder: any transformers text model (CLIP, BERT,
    T5 encoder). scheduler: any of diffusers'. prior: a `CaptionPrior`, for a denoiser that knows few captions.
    image_decoder: a light `decode(z).sample` for the previews of `stream`. discriminator: pixels in [-1, 1] -> logits
    of any shape for each image, whose mean is its score; higher is more real. `default_num_inference_steps`,
    `default_guidance_scale`: what None means in a call; saved in model_index.json.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = [*EXTRA, *NOT_RUN]
    _callback_tensor_inputs = ["latents"]
    if TYPE_CHECKING:  # register_modules sets the components

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self, vae: AutoencoderKL | PreTrainedModel, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel, scheduler: SchedulerMixin, prior: Any = None,
        image_decoder: Any = None, discriminator: Any = None, safety_checker: Any = None,
        feature_extractor: Any = None, image_encoder: Any = None, requires_safety_checker: bool = False,
        default_num_inference_steps: int = 50, default_guidance_scale: float | int = 7.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(prior=prior, image_decoder=image_decoder, discriminator=discriminator)
        self.register_modules(
            safety_checker=safety_checker, feature_extractor=feature_extractor, image_encoder=image_encoder
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
        )
        self._texts: dict[str, EncodedText] = {}
        self._texts_from: tuple[Any, ...] | None = None
        self._interrupt = False
        if safety_checker is not None:
            logger.warning(UNCHECKED)

    # Moving

    @property
    def device(self) -> torch.device:
        """The UNet's."""
        return self.unet.device

    def to(self, *args: Any, **kwargs: Any) -> TextToImagePipeline:
        """As in diffusers; extra components that are plain torch modules, which it cannot move, come along."""
        plain = {name: vars(self)[name] for name in EXTRA if not hasattr(vars(self)[name], "dtype")}
        vars(self).update(dict.fromkeys(plain))
        try:
            super().to(*args, **kwargs)  # type: ignore[misc]
        finally:
            vars(self).update(plain)
        for module in filter(None, plain.values()):
            module.to(self.unet.device, self.unet.dtype)
        return self

    # What users call

    def __call__(
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None, *, height: int | None = None,
        width: int | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        guidance_rescale: float = 0.0, guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | list[int] | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1, num_candidates: int = 1, latents: torch.Tensor | None = None,
        image: Any = None, strength: float = 0.8, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> TextToImageOutput | tuple[Images, list[float] | None]:  # fmt: skip
        """Draw `num_images_per_prompt` images of each prompt. Bad arguments raise ValueError.

        negative_prompt: what to move away from; one for all prompts or one for each. guidance_scale: weight of
        classifier-free guidance (Ho and Salimans 2022); at most 1 is none. guidance_rescale: fraction by which guided
        noise gets back its spread (Lin et al. 2024, section 3.4). guidance_interval: between which fractions of the
        steps to guide (Kynkäänniemi et al. 2024); others cost half. seed: one for each image, or s for s, s + 1, ...:
        the same seed draws the same image in a batch or alone. generator: instead of seeds, one for all or one for
        each image drawn. num_candidates: images drawn for each one returned; the discriminator keeps the best.
        latents: the starting noise, N(0, 1), (images drawn, channels, height / scale, width / scale). image, strength:
        start from images, one for all or one for each prompt (PIL, or arrays (height, width, channels)
            or tensors (channels, height, width) in [0, 1]; resized to height and width if given). Strength 0 is the
            VAE's round trip, 1 (almost) forgets the image (Meng et al. 2022).
        callback_on_step_end: `callback(pipe, step, timestep, {"latents": ...})` may return other latents;
            `pipe.interrupt = True` stops after this step.
        """
        request = DrawingRequest(
            prompt, negative_prompt, height=height, width=width, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, guidance_interval=guidance_interval,
            seed=seed, generator=generator, num_images_per_prompt=num_images_per_prompt,
            num_candidates=num_candidates, latents=latents, image=image, strength=strength, output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        *_, output = self._draw(self._checked(request), previews=False)
        return output if return_dict else (output.images, output.scores)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Preview | TextToImageOutput]:
        """A call's arguments -> a `Preview` after each step, and at the end what the call returns."""
        return self._draw(self._checked(DrawingRequest(*args, **kwargs)), previews=True)

    @property
    def interrupt(self) -> bool:
        """Set it to True, in a callback or between two previews, and the image is decoded as it is."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # From a request to images

    def _checked(self, request: DrawingRequest) -> DrawingRequest:
        """Raise ValueError for what cannot be drawn."""
        for name in REQUIRED:
            advice = f"load one and pipe.register_modules({name}={name})"
            require(getattr(self, name) is not None, f"this pipeline has no {name}: {advice}.")
        request.check(self)
        if self.scheduler.config.get("clip_sample"):
            logger.warning("The scheduler's clip_sample is for pixels in [-1, 1], not for latents: it is turned off.")
            self.scheduler.register_to_config(clip_sample=False)
        return request

    @torch.no_grad()
    def _draw(self, request: DrawingRequest, previews: bool) -> Iterator[Any]:
        """The one way to an image: yields a Preview after each step if `previews`, and then the output."""
        with self._inferring():
            device = self._execution_device
            text = self._embed(request, device)
            timesteps = self._timesteps(request, device)
            start, encoded = self._start(request, timesteps, device)
            latents = start
            for step, latents, output in self._denoise(request, start, timesteps, text, previews):
                if previews:
                    yield Preview(step, len(timesteps), self._preview(request, output, latents))
            result = self._finish(request, latents, encoded)
        yield result

    @contextmanager
    def _inferring(self) -> Iterator[None]:
        """Every model in eval() meanwhile; afterwards modules that trained train again, and offloaded models are put
        away."""
        self._interrupt = False
        models = [getattr(self, name) for name in (*REQUIRED, *EXTRA)]
        models = [model for model in models if isinstance(model, torch.nn.Module) and model.training]
        training = [module for model in models for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            self.maybe_free_model_hooks()

    def _guided(self, request: DrawingRequest) -> bool:
        """Whether any step is guided: UNets that take the guidance scale as an input guide themselves."""
        guides_itself = self.unet.config.time_cond_proj_dim is not None
        return request.guidance_scale > 1 and not guides_itself and request.guidance_interval[1] > 0

    def _embed(self, request: DrawingRequest, device: torch.device) -> torch.Tensor:
        """Embeddings (images drawn, tokens, width); under guidance those of the negative prompts come before them.

        Sets the request's `captions`. Each text is encoded alone, and kept: it never depends on the others, and trying
        seeds costs nothing.
        """
        encoder = self.text_encoder
        version = sum(0 if weight.is_inference() else weight._version for weight in encoder.parameters())
        source = (encoder, self.tokenizer, self.prior, encoder.dtype, device, version)
        if source != self._texts_from:  # another component, dtype or device, or weights trained further
            self._texts, self._texts_from = {}, source
        read = [self._read(text, device) for text in request.prompts]
        if self.prior is not None:
            request.captions = [str(text.caption) for text in read]
            read = [self._read(caption, device) for caption in request.captions]
        negatives = [self._read(text, device) for text in request.negatives] if self._guided(request) else []
        for text in list(self._texts)[:-CACHED_TEXTS]:
            del self._texts[text]
        states = torch.cat([text.states for text in (*negatives, *read)]).to(self.unet.dtype)
        return states.repeat_interleave(request.candidates_per_prompt, dim=0)

    def _read(self, text: str, device: torch.device) -> EncodedText:
        """A text, encoded once; warns of its end that was cut off."""
        if text not in self._texts:
            self._texts[text] = self._encode_text(text, device)
        read = self._texts[text]
        if read.cut:
            tokens = read.states.shape[1]
            logger.warning(f"The text encoder reads {tokens} tokens; this end of the prompt was cut off: {read.cut!r}")
        return read

    def _encode_text(self, text: str, device: torch.device) -> EncodedText:
        tokenizer, config = self.tokenizer, self.text_encoder.config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
        length = min(tokenizer.model_max_length, positions)
        words = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        cut = tokenizer.decode(words[length - tokenizer.num_special_tokens_to_add() :]).strip()
        tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(config, "use_attention_mask", not config.model_type.startswith("clip"))
        mask = tokens.attention_mask.to(device)
        states = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask if masked else None)[0]
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return EncodedText(states, cut, None if self.prior is None else self.prior(mean)[0])

    def _timesteps(self, request: DrawingRequest, device: torch.device) -> torch.Tensor:
        """The timesteps to visit: all, or the last fraction `strength` of them for an image."""
        scheduler, steps = self.scheduler, request.num_inference_steps
        scheduler.set_timesteps(steps, device=device)
        kept = steps if request.pixels is None else int(steps * request.strength)
        first = (steps - kept) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler.timesteps[first:] if kept else scheduler.timesteps[:0]

    def _start(
        self, request: DrawingRequest, timesteps: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noisy latents, float32 as all along; and the image's latents, unscaled, if no step follows."""
        noise = request.latents
        if noise is None:
            noise = randn_tensor(request.shape, generator=request.generator, device=device, dtype=torch.float32)
        noise = noise.to(device, torch.float32)
        if request.pixels is None:
            return noise * self.scheduler.init_noise_sigma, None
        low, high = pixel_range(self.vae)
        output = self.vae.encode((request.pixels * (high - low) + low).to(device, dtype_of(self.vae)))
        posterior = getattr(output, "latent_dist", None)
        encoded = output.latents if posterior is None else posterior.mode()
        encoded = encoded.repeat_interleave(len(noise) // len(encoded), dim=0)
        latents = encoded.float() * self.vae.config.scaling_factor
        if not len(timesteps):
            return latents, encoded
        return self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(noise))), None

    def _denoise(
        self, request: DrawingRequest, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor,
        previews: bool,
    ) -> Iterator[tuple[int, torch.Tensor, Any]]:  # fmt: skip
        """Yields, after each step, its count, the latents and what the scheduler returned (as an object if
        `previews`)."""
        unet, scheduler, callback, total = self.unet, self.scheduler, request.callback_on_step_end, len(timesteps)
        guides, (first, last) = self._guided(request), request.guidance_interval
        conditional, scale_input = text[-len(latents) :], self._scale_input(request, latents)
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"return_dict": previews, **({"generator": request.generator} if draws else {})}
        with self.progress_bar(total=total) as progress:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                guided = guides and first <= i / total < last
                x = scheduler.scale_model_input(latents, t).to(unet.dtype)
                x, states = (torch.cat([x, x]), text) if guided else (x, conditional)
                noise = unet(x, t, encoder_hidden_states=states, timestep_cond=scale_input, return_dict=False)[0]
                noise = noise.to(latents.dtype)
                if guided:
                    noise = guide(noise, request.guidance_scale, request.guidance_rescale)
                output = scheduler.step(noise, t, latents, **options)
                latents = output[0]
                if callback is not None:
                    latents = (callback(self, i, t, {"latents": latents}) or {}).get("latents", latents)
                progress.update()
                yield i + 1, latents, output

    def _scale_input(self, request: DrawingRequest, latents: torch.Tensor) -> torch.Tensor | None:
        """The guidance scale as an input, for UNets distilled to take it as one (Luo et al. 2023); None for others."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.full((len(latents),), 1000.0 * (request.guidance_scale - 1), device=latents.device)
        return get_timestep_embedding(scale, width, downscale_freq_shift=1).to(self.unet.dtype)

    def _preview(self, request: DrawingRequest, output: Any, latents: torch.Tensor) -> Images:
        """The clean latents as the scheduler estimates them after a step, or else the noisy ones -> what to show."""
        config, history = self.scheduler.config, getattr(self.scheduler, "model_outputs", [None])
        solves_clean = config.get("predict_x0") or str(config.get("algorithm_type")).endswith("dpmsolver++")
        named = [getattr(output, name, None) for name in ("pred_original_sample", "denoised")]
        estimates = [*named, history[-1] if solves_clean else None]
        clean = next((estimate for estimate in estimates if estimate is not None), latents)
        if request.output_type == "latent":
            return clean.to(self.unet.dtype)
        decoder = self.vae if self.image_decoder is None else self.image_decoder
        scale = getattr(getattr(decoder, "config", None), "scaling_factor", self.vae.config.scaling_factor)
        return present(decode(decoder, clean / scale), request.output_type)

    def _finish(
        self, request: DrawingRequest, latents: torch.Tensor, encoded: torch.Tensor | None
    ) -> TextToImageOutput:
        """The last latents -> the output, with the best candidate of each image. Instead of the latents `encoded` is
        decoded."""
        wants_latents, k, scores = request.output_type == "latent", request.num_candidates, None
        if not wants_latents or k > 1:
            pixels = decode(self.vae, latents / self.vae.config.scaling_factor if encoded is None else encoded)
        if k > 1:
            logits = self.discriminator(pixels.mul(2).sub(1).to(dtype_of(self.discriminator)))
            logits = getattr(logits, "logits", logits)
            best_scores, best = logits.float().reshape(-1, k, logits[0].numel()).mean(dim=2).max(dim=1)
            best = best + k * torch.arange(len(best), device=best.device)
            pixels, latents, scores = pixels[best], latents[best], best_scores.tolist()
        images = latents.to(self.unet.dtype) if wants_latents else present(pixels, request.output_type)
        return TextToImageOutput(images=images, scores=scores, captions=request.captions)


def guide(noise: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Noise predicted without and with the prompt, (2 · batch, ...) -> what guidance makes of them, (batch, ...)."""
    without, prompted = noise.chunk(2)
    guided = without + scale * (prompted - without)
    if rescale:
        dims = tuple(range(1, noise.ndim))
        guided = guided * (rescale * prompted.std(dims, keepdim=True) / guided.std(dims, keepdim=True) + 1 - rescale)
    return guided
