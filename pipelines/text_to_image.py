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
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .drawing_request import DrawingRequest, DrawingState, Images, Preview, TextToImageOutput
from .image_io import decode, dtype_of, pixel_range, present, require
from .inpainting import Inpainting
from .prompt_reading import PromptReading
from .repo_parts import EXTRA, NOT_RUN, REQUIRED, UNCHECKED, RepoLoading, logger
from .scoring import Scoring


class TextToImagePipeline(  # type: ignore[misc]
    DrawingState, PromptReading, Scoring, RepoLoading, DiffusionPipeline, StableDiffusionMixin,
    StableDiffusionLoraLoaderMixin,
):  # fmt: skip
    """Text encoder -> denoising in the latent space -> image decoder.

    vae: `encode(x).latent_dist`, `decode(z).sample`, `config.scaling_factor`, `config.block_out_channels`; its pixels
    are in [-1, 1] unless `config.pixel_range` says otherwise. text_encoder: any transformers text model (CLIP, BERT,
    T5 encoder). scheduler: any of diffusers'. prior: a `CaptionPrior`, for a denoiser that knows few captions.
    image_decoder: a light `decode(z).sample` for the previews of `stream`. discriminator: pixels in [-1, 1] -> logits
    of any shape for each image, whose mean's sigmoid is its score; one that has `reads_prompts` also gets the prompts'
    states. `default_num_inference_steps`,
    `default_guidance_scale`: what None means in a call; saved in model_index.json.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = [*EXTRA, *NOT_RUN]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
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
        if safety_checker is not None:
            logger.warning(UNCHECKED)

    # Moving

    @property
    def device(self) -> torch.device:
        """The UNet's, or where there is none that of other components."""
        return super().device if self.unet is None else self.unet.device  # type: ignore[misc]

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
        self, prompt: str | list[str] | None = None, negative_prompt: str | list[str] | None = None, *,
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None, guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | list[int] | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1, num_candidates: int = 1, latents: torch.Tensor | None = None,
        image: Any = None, mask_image: Any = None, strength: float = 0.8, prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None, clip_skip: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None, output_type: str = "pil", return_dict: bool = True,
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
            VAE's round trip, 1 (almost) forgets the image (Meng et al. 2022). Without a prompt: variations of it.
        mask_image: white where to paint the image anew, black where to keep its pixels; read and resized as `image`.
        timesteps, sigmas: where to step instead of how often, for schedulers that take them. prompt_embeds,
        negative_prompt_embeds: instead of texts, (prompts, tokens, width), as `encode_prompt` returns them for one
        image a prompt. clip_skip: layers of the text encoder to leave out. cross_attention_kwargs: for the attention
        processors of the UNet.
        callback_on_step_end: `callback(pipe, step, timestep, tensors)` gets those of `latents`, `prompt_embeds` (the
            negative ones first under guidance) and `negative_prompt_embeds` that callback_on_step_end_tensor_inputs
            names, and may return others; `pipe._guidance_scale = 0.0` ends guidance and `pipe.interrupt = True` the
            drawing after this step.
        """
        request = DrawingRequest(
            prompt, negative_prompt, height=height, width=width, num_inference_steps=num_inference_steps,
            timesteps=timesteps, sigmas=sigmas, prompt_embeds=prompt_embeds, clip_skip=clip_skip,
            negative_prompt_embeds=negative_prompt_embeds, cross_attention_kwargs=cross_attention_kwargs,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, guidance_interval=guidance_interval,
            seed=seed, generator=generator, num_images_per_prompt=num_images_per_prompt,
            num_candidates=num_candidates, latents=latents, image=image, mask_image=mask_image, strength=strength,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        *_, output = self._draw(self._checked(request), previews=False)
        return output if return_dict else (output.images, output.scores)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Preview | TextToImageOutput]:
        """A call's arguments -> a `Preview` after each step, and at the end what the call returns."""
        return self._draw(self._checked(DrawingRequest(*args, **kwargs)), previews=True)

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str] | None, device: torch.device | None = None, num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True, negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None, negative_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Texts, or embeddings of them -> (those of the prompts, those of the negative prompts or None), both
        (prompts · num_images_per_prompt, tokens, width), as stock Stable Diffusion gives them. Raises ValueError."""
        request = DrawingRequest(
            prompt, negative_prompt, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip, num_images_per_prompt=num_images_per_prompt,
        )  # fmt: skip
        request.check_texts()
        device = self._execution_device if device is None else torch.device(device)
        prompt_embeds = self._embed(request, device)
        negative_prompt_embeds = self._embed_negatives(request, device) if do_classifier_free_guidance else None
        return prompt_embeds, negative_prompt_embeds

    # From a request to images

    def _checked(self, request: DrawingRequest) -> DrawingRequest:
        """Raise ValueError for what cannot be drawn."""
        self._require("vae", "unet", "scheduler")
        request.check(self)
        if request.prompts is not None or (request.guidance_scale > 1 and request.negative_prompt_embeds is None):
            self._require("text_encoder", "tokenizer")
        if self.scheduler.config.get("clip_sample"):
            logger.warning("The scheduler's clip_sample is for pixels in [-1, 1], not for latents: it is turned off.")
            self.scheduler.register_to_config(clip_sample=False)
        return request

    def _require(self, *names: str) -> None:
        for name in names:
            advice = f"load one and pipe.register_modules({name}={name})"
            require(getattr(self, name) is not None, f"this pipeline has no {name}: {advice}.")

    @torch.no_grad()
    def _draw(self, request: DrawingRequest, previews: bool) -> Iterator[Any]:
        """The one way to an image: yields a Preview after each step if `previews`, and then the output."""
        with self._inferring():
            device = self._execution_device
            self._begin(request)
            text = self._embed(request, device)
            if self.do_classifier_free_guidance and request.guidance_interval[1] > 0:
                text = torch.cat([self._embed_negatives(request, device), text])
            timesteps = self._timesteps(request, device)
            self._num_timesteps = len(timesteps)
            start, encoded = self._start(request, timesteps, device)
            latents = start
            for step, latents, output in self._denoise(request, start, timesteps, text, previews):
                if previews:
                    yield Preview(step, len(timesteps), self._preview(request, output, latents))
            result = self._finish(request, latents, encoded, text[-len(latents) :])
        yield result

    @contextmanager
    def _inferring(self) -> Iterator[None]:
        """Every model in eval() meanwhile; afterwards modules that trained train again, and offloaded models are put
        away."""
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

    def _embed(self, request: DrawingRequest, device: torch.device) -> torch.Tensor:
        """The prompts' embeddings (images drawn, tokens, width). Sets the request's `captions`."""
        states = request.prompt_embeds
        if request.prompts is not None:
            self.warn_of_unknown(request.prompts)
            request.captions = None if request.unprompted else self.captions(request.prompts, device)
            states = self.embeddings(request.captions or request.prompts, device, request.clip_skip)
        return self._for_each_image(request, states, device)

    def _embed_negatives(self, request: DrawingRequest, device: torch.device) -> torch.Tensor:
        """The negative prompts' embeddings (images drawn, tokens, width)."""
        states = request.negative_prompt_embeds
        if states is None:
            states = self.embeddings(request.negatives, device, request.clip_skip)
        return self._for_each_image(request, states, device)

    def _for_each_image(self, request: DrawingRequest, states: Any, device: torch.device) -> torch.Tensor:
        dtype = states.dtype if self.unet is None else self.unet.dtype
        return states.to(device, dtype).repeat_interleave(request.candidates_per_prompt, dim=0)

    def _timesteps(self, request: DrawingRequest, device: torch.device) -> torch.Tensor:
        """The timesteps to visit: all, or the last fraction `strength` of them for an image."""
        scheduler, steps = self.scheduler, request.num_inference_steps
        own = {name: getattr(request, name) for name in ("timesteps", "sigmas") if getattr(request, name) is not None}
        asked = own or {"num_inference_steps": steps}
        name, what = type(scheduler).__name__, " and ".join(f"{name}={value}" for name, value in asked.items())
        try:
            scheduler.set_timesteps(device=device, **asked)
        except (ValueError, IndexError, AssertionError) as error:
            raise ValueError(f"{name} cannot do {what}: {(str(error).splitlines() or ['no reason'])[0]}") from error
        if "Ancestral" in name and len(scheduler.sigmas):
            # √(σ² - σ_up²) loses all digits in float32 after a first σ of 20,000: NaN
            scheduler.sigmas = scheduler.sigmas.double()
        trained, timesteps = scheduler.config.get("num_train_timesteps"), scheduler.timesteps
        good = trained is None or not len(timesteps) or timesteps.max() < trained
        require(good, f"{name} cannot do {what}: its steps begin beyond the last that was trained: write fewer.")
        if own:
            steps = len(timesteps) if scheduler.order == 1 else len(own.get("timesteps", timesteps))
        kept = steps if request.pixels is None else int(steps * request.strength)
        first = (steps - kept) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return timesteps[first:] if kept else timesteps[:0]

    def _start(
        self, request: DrawingRequest, timesteps: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Noisy latents, float32 as all along; and the image's latents, unscaled, if no step follows. Sets what the
        request keeps of the image."""
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
        request.kept = None if request.mask is None else Inpainting.of(request.mask, request.pixels, latents, noise)
        if not len(timesteps):
            return latents, encoded
        return self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(noise))), None

    def _denoise(
        self, request: DrawingRequest, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor,
        previews: bool,
    ) -> Iterator[tuple[int, torch.Tensor, Any]]:  # fmt: skip
        """Yields, after each step, its count, the latents and what the scheduler returned (as an object if
        `previews`)."""
        unet, scheduler, total, (first, last) = self.unet, self.scheduler, len(timesteps), request.guidance_interval
        scale_input = self._scale_input(request, latents)
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"return_dict": previews, **({"generator": request.generator} if draws else {})}
        with self.progress_bar(total=total) as progress:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                guided = self.do_classifier_free_guidance and first <= i / total < last
                if guided and len(text) == len(latents):  # a callback began to guide
                    text = torch.cat([self._embed_negatives(request, latents.device), text])
                x = scheduler.scale_model_input(latents, t).to(unet.dtype)
                x, states = (torch.cat([x, x]), text) if guided else (x, text[-len(latents) :])
                noise = unet(
                    x, t, encoder_hidden_states=states, timestep_cond=scale_input,
                    cross_attention_kwargs=self._cross_attention_kwargs, return_dict=False,
                )[0].to(latents.dtype)  # fmt: skip
                if guided:
                    noise = guide(noise, self._guidance_scale, request.guidance_rescale)
                output = scheduler.step(noise, t, latents, **options)
                latents = output[0]
                if request.kept is not None:
                    latents = request.kept.keep_latents(
                        scheduler, latents, timesteps[i + 1] if i + 1 < total else None
                    )
                if request.callback_on_step_end is not None:
                    latents, text = self._call_back(request, i, t, latents, text)
                progress.update()
                yield i + 1, latents, output

    def _call_back(
        self, request: DrawingRequest, step: int, timestep: torch.Tensor, latents: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents and embeddings that the callback wants. Raises ValueError where their counts do not fit."""
        count = len(latents)
        negative = text[:count] if len(text) == 2 * count else None
        tensors = {"latents": latents, "prompt_embeds": text, "negative_prompt_embeds": negative}
        shown = {name: tensors[name] for name in request.callback_on_step_end_tensor_inputs}
        given = request.callback_on_step_end(self, step, timestep, shown) or {}  # type: ignore[misc]
        latents, text = given.get("latents", latents), given.get("prompt_embeds", text)
        text = text.expand(count, *text.shape[1:]) if len(text) == 1 else text
        counts = f"the callback returned {len(text)} prompt_embeds for {count} images"
        require(len(text) in (count, 2 * count), f"{counts}: return one for each, the negative ones before them.")
        changed = given.get("negative_prompt_embeds", negative)
        if changed is not negative and changed is not None:
            text = torch.cat([changed, text[-count:]])
        return latents, text

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
        self, request: DrawingRequest, latents: torch.Tensor, encoded: torch.Tensor | None, states: torch.Tensor
    ) -> TextToImageOutput:  # fmt: skip
        """The last latents -> the output, with the best candidate of each image. Instead of the latents `encoded` is
        decoded. states: of the prompts, one for each image drawn."""
        wants_latents, k, scores = request.output_type == "latent", request.num_candidates, None
        if not wants_latents or k > 1:
            pixels = decode(self.vae, latents / self.vae.config.scaling_factor if encoded is None else encoded)
            pixels = pixels if request.kept is None else request.kept.keep_pixels(pixels)
        judged = None if wants_latents and k == 1 else self._judged(request, pixels, states)
        if judged is not None:
            best_scores, best = judged.reshape(-1, k).max(dim=1)
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
