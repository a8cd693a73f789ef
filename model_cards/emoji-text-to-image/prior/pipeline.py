"""Prompts -> pictures: latent diffusion (Rombach et al. 2022) out of parts that swap with the ecosystem's.

```
prompt -> tokenizer -> text encoder -> (prior: the nearest known caption -> tokenizer -> text encoder)
                                        |
                                        v
 noise -> latents -> [UNet -> guidance -> scheduler] x steps -> latents -> VAE decoder -> pictures -> (discriminator) -> the best
             ^                              |
 image -> VAE encoder                       '-> (light image decoder) -> previews
```

It imports nothing of the project: a model repo ships this file as `pipeline.py`, and it runs where hf_ae is not installed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

REQUIRED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
EXTRA = ("prior", "image_decoder", "discriminator")
NOT_RUN = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of Stable Diffusion 1.x repos that this pipeline accepts and leaves alone."""
UNCHECKED = "The safety_checker is not run: look at the pictures before you show them to others."
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CACHED_TEXTS = 64
CANDIDATE_STRIDE = 1_000_003
"""Candidate j of seed s is drawn with seed s + j·stride: far from the neighbours s + 1, s + 2, ..."""


@dataclass
class TextToImageOutput(BaseOutput):
    """What a call returns.

    images: a list of PIL images; or an array (batch, height, width, channels) or a tensor (batch, channels, height, width)
    in [0, 1]; or scaled latents. scores: the discriminator's for each image, where it chose among candidates. captions: what
    the prior took each prompt for.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    scores: list[float] | None = None
    captions: list[str] | None = None


@dataclass
class Preview:
    """All candidates after `step` (1 is the first) of `num_steps`, in the form of `TextToImageOutput.images`."""

    step: int
    num_steps: int
    images: list[Image.Image] | np.ndarray | torch.Tensor


class CaptionPrior(ModelMixin, ConfigMixin):
    """The vector of any text -> the nearest of the captions that the denoiser was trained with.

    A denoiser that saw few pictures draws a text it does not know as a blend of them; with this prior it draws a picture it
    does know, as retrieval-augmented diffusion does (Blattmann et al. 2022, Sheynin et al. 2023). Vectors are the means of a
    text encoder's states. The score of a caption is the sum of three cosines: of the text with the caption, with the
    nearest of the texts that lead to it (itself among them), and with their mean.
    """

    @register_to_config
    def __init__(self, captions: list[str], num_texts: int, num_links: int, width: int):
        """`vectors` (num_texts, width): unit vectors of texts, first those of `captions`. `means` (captions, width): unit vectors
        too. `links` (2, num_links): the numbers of a caption and of a text that leads to it."""
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_texts, width))
        self.register_buffer("means", torch.zeros(len(captions), width))
        self.register_buffer("links", torch.zeros(2, num_links, dtype=torch.int32))

    def forward(self, vectors: torch.Tensor) -> list[str]:
        """(texts, width) -> the nearest caption of each."""
        (captions, texts), vectors = self.links.long(), F.normalize(vectors.float(), dim=1)
        cosines = vectors @ self.vectors.float().T
        nearest = cosines.new_full((len(vectors), len(self.means)), -1.0)
        nearest = nearest.scatter_reduce(1, captions.expand(len(vectors), -1), cosines[:, texts], "amax")
        scores = cosines[:, : len(self.means)] + nearest + vectors @ self.means.float().T
        return [self.config["captions"][number] for number in scores.argmax(1).tolist()]


class TextToImagePipeline(DiffusionPipeline):
    """Text encoder -> denoising in the latent space -> image decoder.

    vae: `encode(x).latent_dist`, `decode(z).sample`, `config.scaling_factor`, `config.block_out_channels`; its pixels are in
    [-1, 1] unless `config.pixel_range` says otherwise. text_encoder: any transformers text model (CLIP, BERT, T5 encoder).
    scheduler: any of diffusers'. prior: a `CaptionPrior`, for a denoiser that knows few captions. image_decoder: a light
    `decode(z).sample` for the previews of `stream`. discriminator: pixels in [-1, 1] -> logits of any shape for each image,
    whose mean is its score; higher is more real.
    `default_num_inference_steps`, `default_guidance_scale`: what None means in a call; saved in model_index.json.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = [*EXTRA, *NOT_RUN]
    _callback_tensor_inputs = ["latents"]
    if TYPE_CHECKING:  # register_modules sets the components

        def __getattr__(self, name) -> Any: ...

    def __init__(
        self, vae: AutoencoderKL | PreTrainedModel, text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel, scheduler: SchedulerMixin, prior=None, image_decoder=None, discriminator=None,
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker: bool = False,
        default_num_inference_steps: int = 50, default_guidance_scale: float | int = 7.5,
    ):  # fmt: skip
        given = locals()
        super().__init__()
        self.register_modules(**{name: given[name] for name in (*REQUIRED, *EXTRA, *NOT_RUN)})
        settings = ("requires_safety_checker", "default_num_inference_steps", "default_guidance_scale")
        self.register_to_config(**{name: given[name] for name in settings})
        self._texts: dict[str, SimpleNamespace] = {}
        self._texts_from: tuple | None = None
        self._interrupt = False
        if safety_checker is not None:
            logger.warning(UNCHECKED)

    # Loading and moving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """A folder or a Hub id, as `DiffusionPipeline.from_pretrained`, from safetensors alone.

        A component of another library is loaded by `AutoModel` if transformers knows its `model_type` (importing hf_ae
        registers its own). No code of the repo is downloaded, nor run unless you pass trust_remote_code=True.
        Components passed as keywords replace those of the repo, whatever their class.
        """
        kwargs.setdefault("use_safetensors", True)
        given = {name: kwargs.pop(name) for name in (*REQUIRED, *EXTRA, *NOT_RUN) if name in kwargs}
        parts, folder = {**dict.fromkeys(NOT_RUN), **given}, Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = download(str(pretrained_model_name_or_path), parts, kwargs)
        libraries = {name: value[0] for name, value in cls.load_config(folder).items() if isinstance(value, (list, tuple))}
        if libraries.get("safety_checker") and "safety_checker" not in given:
            logger.warning(UNCHECKED)
        if libraries.get("prior") and "prior" not in parts:
            parts["prior"] = CaptionPrior.from_pretrained(folder / "prior", use_safetensors=True)
        for name in (*REQUIRED, *EXTRA):
            if name not in parts and libraries.get(name) not in (None, "diffusers", "transformers"):
                parts |= load_registered(folder, name, kwargs)
        pipe = super().from_pretrained(folder, **dict.fromkeys(parts), **kwargs)
        pipe.register_modules(**parts)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def load_config(cls, *args, **kwargs):
        """model_index.json; where it names a `pipeline.py` beside it, this class stands in for that file, which is not run."""
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), (list, tuple)):
            config["_class_name"] = cls.__name__
        return loaded

    @property
    def device(self) -> torch.device:
        """The UNet's."""
        return self.unet.device

    def to(self, *args, **kwargs):
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
        self, prompt: str | list[str], negative_prompt: str | list[str] | None = None, *,
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, guidance_rescale: float = 0.0, guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | list[int] | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1, num_candidates: int = 1, latents: torch.Tensor | None = None,
        image=None, strength: float = 0.8, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end=None, callback_on_step_end_tensor_inputs=("latents",),
    ) -> TextToImageOutput | tuple:  # fmt: skip
        """Draw `num_images_per_prompt` pictures of each prompt. Bad arguments raise ValueError.

        negative_prompt: what to move away from; one for all prompts or one for each.
        guidance_scale: weight of classifier-free guidance (Ho and Salimans 2022); at most 1 is none.
        guidance_rescale: share by which guided noise gets back its spread (Lin et al. 2024, section 3.4).
        guidance_interval: between which shares of the steps to guide (Kynkäänniemi et al. 2024); other steps cost half.
        seed: one for each picture, or s for s, s + 1, ...: the same seed draws the same picture in a batch or alone.
        generator: instead of seeds, one for all or one for each picture drawn.
        num_candidates: pictures drawn for each one returned; the discriminator keeps the best.
        latents: the starting noise, N(0, 1), (pictures drawn, channels, height / scale, width / scale).
        image, strength: start from pictures, one for all or one for each prompt (PIL, or arrays (height, width, channels)
            or tensors (channels, height, width) in [0, 1]; resized to height and width if given). Strength 0 is the VAE's
            round trip, 1 (almost) forgets the picture (Meng et al. 2022).
        callback_on_step_end: `callback(pipe, step, timestep, {"latents": ...})` may return other latents;
            `pipe.interrupt = True` stops after this step.
        """
        request = SimpleNamespace(**{name: value for name, value in locals().items() if name != "self"})
        *_, output = self._draw(self._checked(request), previews=False)
        return output if return_dict else (output.images, output.scores)

    def stream(self, *args, **kwargs) -> Iterator[Preview | TextToImageOutput]:
        """A call's arguments -> a `Preview` after each step, and at the end what the call returns."""
        bound = inspect.signature(self.__call__).bind(*args, **kwargs)
        bound.apply_defaults()
        return self._draw(self._checked(SimpleNamespace(**bound.arguments)), previews=True)

    @property
    def interrupt(self) -> bool:
        """Set it to True, in a callback or between two previews, and the picture is decoded as it is."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool):
        self._interrupt = value

    # From arguments to a request that can be met

    def _checked(self, request):
        """Fill in the defaults, add what follows from the arguments, and raise ValueError for what cannot be drawn."""
        for name in REQUIRED:
            require(getattr(self, name) is not None, f"this pipeline has no {name}: load one and pipe.register_modules({name}={name}).")
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(request, name) is None:
                setattr(request, name, self.config[f"default_{name}"])
        self._check_texts(request)
        self._check_numbers(request)
        self._check_size(request)
        self._check_noise(request)
        if self.scheduler.config.get("clip_sample"):
            logger.warning("The scheduler's clip_sample is meant for pixels in [-1, 1], not for latents: it is turned off.")
            self.scheduler.register_to_config(clip_sample=False)
        return request

    def _check_texts(self, request):
        """Set `prompts` and `negatives`, lists of the same length."""
        prompts, negatives = request.prompt, request.negative_prompt or ""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        good = is_texts(prompts) and prompts and all(text.strip() for text in prompts)
        require(good, f"prompt={request.prompt!r} says nothing to draw: write a text, or a list of texts, none of them empty.")
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
        require(is_texts(negatives), f"negative_prompt={negatives!r} must be a text or a list of texts.")
        counts = f"{len(negatives)} negative prompts for {len(prompts)} prompts"
        require(len(negatives) == len(prompts), f"{counts}: write one for all, or one for each.")
        request.prompts, request.negatives = list(prompts), list(negatives)

    def _check_numbers(self, request):
        for name in ("num_inference_steps", "num_images_per_prompt", "num_candidates"):
            value = getattr(request, name)
            require(is_number(value, 1, kind=Integral), f"{name}={value!r} must be a whole number of at least 1.")
        require(is_number(request.guidance_scale), f"guidance_scale={request.guidance_scale!r} must be a number, 1 for no guidance.")
        for name in ("guidance_rescale", "strength"):
            value = getattr(request, name)
            require(is_number(value, 0, 1), f"{name}={value!r} must be a number between 0 and 1.")
        span = request.guidance_interval
        good = isinstance(span, (list, tuple)) and len(span) == 2 and is_number(span[1], 0, 1) and is_number(span[0], 0, span[1])
        require(good, f"guidance_interval={span!r} must be two shares of the steps, as (0.0, 1.0) or (0.2, 0.8).")
        require(request.output_type in OUTPUT_TYPES, f"output_type={request.output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")
        tensors = request.callback_on_step_end_tensor_inputs
        require(list(tensors) == ["latents"], f"callback_on_step_end_tensor_inputs={tensors!r}: a callback gets ('latents',) alone.")
        choice = f"num_candidates={request.num_candidates} needs a discriminator to choose the best, and this pipeline has none"
        good = request.num_candidates == 1 or self.discriminator is not None
        require(good, f"{choice}: pipe.register_modules(discriminator=discriminator), or write num_candidates=1.")

    def _check_size(self, request):
        """Set `pixels`, the image in [0, 1], and `shape`, that of one picture's latents."""
        config, scale = self.vae.config, 2 ** (len(self.vae.config.block_out_channels) - 1)
        sides, request.pixels, of_image = [request.height, request.width], None, False
        for name, side in zip(("height", "width"), sides):
            good = side is None or is_number(side, 1, kind=Integral)
            require(good, f"{name}={side!r} must be a multiple of {scale}: write {scale} or more.")
        if request.image is not None:
            channels = getattr(config, "in_channels", getattr(config, "num_channels", 3))
            of_image, request.pixels = sides == [None, None], read_images(request.image, channels, sides)
            sides = request.pixels.shape[2:]
        elif None in sides:
            size = self.unet.config.sample_size
            require(size is not None, "the UNet's config has no sample_size: write height= and width=.")
            sides = [side or scale * latent for side, latent in zip(sides, (size, size) if isinstance(size, int) else size)]
        for name, side in zip(("height", "width"), sides):
            below, what = max(side // scale, 1) * scale, f"the image's {name} {side}" if of_image else f"{name}={side}"
            near = f"write {name}={below} or {name}={below + scale}"
            require(side % scale == 0, f"{what} does not divide by {scale}, the VAE's scale: {near}.")
        request.shape = (self.unet.config.in_channels, sides[0] // scale, sides[1] // scale)

    def _check_noise(self, request):
        """Make `shape` that of all latents, and `generator` one for all or a list with one for each picture drawn."""
        prompts, wanted = len(request.prompts), len(request.prompts) * request.num_images_per_prompt
        drawn = wanted * request.num_candidates
        request.shape = (drawn, *request.shape)
        given = request.shape if request.latents is None else tuple(getattr(request.latents, "shape", ()))
        require(given == request.shape, f"latents must have shape {request.shape}, but have {given}.")
        images = 1 if request.pixels is None else len(request.pixels)
        require(images in (1, prompts), f"{images} images for {prompts} prompts: pass one for all, or one for each.")
        if request.generator is not None:
            require(request.seed is None, "seed and generator both say what to draw: write one of them.")
            if isinstance(request.generator, (list, tuple)):
                count, request.generator = len(request.generator), list(request.generator)
                require(count == drawn, f"{count} generators for {drawn} pictures to draw: pass one for all, or one for each.")
            return
        seeds: Any = torch.randint(2**31, (wanted,)).tolist() if request.seed is None else request.seed
        seeds = range(seeds, seeds + wanted) if is_number(seeds, 0, kind=Integral) else seeds
        good = isinstance(seeds, (list, tuple, range)) and all(is_number(seed, 0, kind=Integral) for seed in seeds)
        require(good, f"seed={request.seed!r} must be a whole number of at least 0, or a list of them.")
        require(len(seeds) == wanted, f"{len(seeds)} seeds for {wanted} pictures: write one, or one for each picture.")
        own = [int(seed) + CANDIDATE_STRIDE * j for seed in seeds for j in range(request.num_candidates)]
        request.generator = [torch.Generator().manual_seed(seed) for seed in own]

    # From a request to pictures

    @torch.no_grad()
    def _draw(self, request, previews: bool):
        """The one way to a picture: yields a Preview after each step if `previews`, and then the output."""
        with self._inferring():
            device = self._execution_device
            text = self._embed(request, device)
            timesteps = self._timesteps(request, device)
            latents, code = self._start(request, timesteps, device)
            steps = self._denoise(request, latents, timesteps, text, previews)
            for step, latents, output in steps:
                if previews:
                    yield Preview(step, len(timesteps), self._preview(request, output, latents))
            output = self._finish(request, latents, code)
        yield output

    @contextmanager
    def _inferring(self):
        """Every model in eval() meanwhile; afterwards modules that trained train again, and offloaded models are put away."""
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

    def _embed(self, request, device):
        """Embeddings (pictures drawn, tokens, width); under guidance those of the negative prompts come before them.

        Sets `captions`, what the prior takes each prompt for. Each text is encoded alone, and kept: it never depends on the
        others, and trying seeds costs nothing.
        """
        encoder, unet = self.text_encoder, self.unet
        request.guided = request.guidance_scale > 1 and unet.config.time_cond_proj_dim is None and request.guidance_interval[1] > 0
        version = sum(0 if weight.is_inference() else weight._version for weight in encoder.parameters())
        source = (encoder, self.tokenizer, self.prior, encoder.dtype, device, version)
        if source != self._texts_from:  # another component, dtype or device, or weights trained further
            self._texts, self._texts_from = {}, source
        read = [self._read(text, device) for text in request.prompts]
        request.captions = None if self.prior is None else [text.caption for text in read]
        if request.captions:
            read = [self._read(caption, device) for caption in request.captions]
        found = [*([self._read(text, device) for text in request.negatives] if request.guided else []), *read]
        for text in list(self._texts)[:-CACHED_TEXTS]:
            del self._texts[text]
        copies = request.num_images_per_prompt * request.num_candidates
        return torch.cat([text.states for text in found]).to(unet.dtype).repeat_interleave(copies, dim=0)

    def _read(self, text: str, device):
        """A text -> its `states` (1, tokens, width), the `caption` that the prior takes it for; warns of its end that was `cut`."""
        if text not in self._texts:
            self._texts[text] = self._encode_text(text, device)
        read = self._texts[text]
        if read.cut:
            logger.warning(f"The text encoder reads {read.states.shape[1]} tokens; this end of the prompt was cut off: {read.cut!r}")
        return read

    def _encode_text(self, text: str, device):
        tokenizer, config = self.tokenizer, self.text_encoder.config
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512
        length = min(tokenizer.model_max_length, positions)
        words = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        cut = tokenizer.decode(words[length - tokenizer.num_special_tokens_to_add() :]).strip()
        tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(config, "use_attention_mask", not config.model_type.startswith("clip"))
        mask = tokens.attention_mask.to(device)
        states = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask if masked else None)[0]
        caption = None if self.prior is None else self.prior((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))[0]
        return SimpleNamespace(states=states, cut=cut, caption=caption)

    def _timesteps(self, request, device):
        """The timesteps to visit: all, or the last share `strength` of them for an image."""
        scheduler, steps = self.scheduler, request.num_inference_steps
        scheduler.set_timesteps(steps, device=device)
        kept = steps if request.pixels is None else int(steps * request.strength)
        first = (steps - kept) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler.timesteps[first:] if kept else scheduler.timesteps[:0]

    def _start(self, request, timesteps, device):
        """Noisy latents, float32 as all along; and the image's code, unscaled, if no step follows."""
        noise = request.latents
        if noise is None:
            noise = randn_tensor(request.shape, generator=request.generator, device=device, dtype=torch.float32)
        noise = noise.to(device, torch.float32)
        if request.pixels is None:
            return noise * self.scheduler.init_noise_sigma, None
        low, high = getattr(self.vae.config, "pixel_range", (-1.0, 1.0))
        encoded = self.vae.encode((request.pixels * (high - low) + low).to(device, dtype_of(self.vae)))
        posterior = getattr(encoded, "latent_dist", None)
        code = encoded.latents if posterior is None else posterior.mode()
        code = code.repeat_interleave(len(noise) // len(code), dim=0)
        latents = code.float() * self.vae.config.scaling_factor
        if not len(timesteps):
            return latents, code
        return self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(noise))), None

    def _denoise(self, request, latents, timesteps, text, previews: bool):
        """Yields, after each step, its number, the latents and what the scheduler returned (as an object if `previews`)."""
        unet, scheduler, callback, total = self.unet, self.scheduler, request.callback_on_step_end, len(timesteps)
        dtype, (first, last) = unet.dtype, request.guidance_interval
        conditional, scale_input = text[-len(latents) :], self._scale_input(request, latents)
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options = {"return_dict": previews, **({"generator": request.generator} if draws else {})}
        with self.progress_bar(total=total) as progress:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                guided = request.guided and first <= i / total < last
                x = scheduler.scale_model_input(latents, t).to(dtype)
                x, states = (torch.cat([x, x]), text) if guided else (x, conditional)
                noise = unet(x, t, encoder_hidden_states=states, timestep_cond=scale_input, return_dict=False)[0].to(latents.dtype)
                if guided:
                    noise = guide(noise, request.guidance_scale, request.guidance_rescale)
                output = scheduler.step(noise, t, latents, **options)
                latents = output[0]
                if callback is not None:
                    latents = (callback(self, i, t, {"latents": latents}) or {}).get("latents", latents)
                progress.update()
                yield i + 1, latents, output

    def _scale_input(self, request, latents):
        """The guidance scale as an input, for UNets distilled to take it as one (Luo et al. 2023); None for others."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.full((len(latents),), 1000.0 * (request.guidance_scale - 1), device=latents.device)
        return get_timestep_embedding(scale, width, downscale_freq_shift=1).to(self.unet.dtype)

    def _preview(self, request, output, latents):
        """The clean latents as the scheduler estimates them after a step, or else the noisy ones -> what to show."""
        config, history = self.scheduler.config, getattr(self.scheduler, "model_outputs", [None])
        solves_clean = config.get("predict_x0") or str(config.get("algorithm_type")).endswith("dpmsolver++")
        estimates = [
            getattr(output, "pred_original_sample", None),
            getattr(output, "denoised", None),
            history[-1] if solves_clean else None,
        ]
        clean = next((estimate for estimate in estimates if estimate is not None), latents)
        if request.output_type == "latent":
            return clean.to(self.unet.dtype)
        decoder = self.vae if self.image_decoder is None else self.image_decoder
        scale = getattr(getattr(decoder, "config", None), "scaling_factor", self.vae.config.scaling_factor)
        return present(decode(decoder, clean / scale), request.output_type)

    def _finish(self, request, latents, code):
        """The last latents -> the output, with the best candidate of each picture. Instead of the latents `code` is decoded."""
        wants_latents, k, scores = request.output_type == "latent", request.num_candidates, None
        if not wants_latents or k > 1:
            pixels = decode(self.vae, latents / self.vae.config.scaling_factor if code is None else code)
        if k > 1:
            logits = self.discriminator(pixels.mul(2).sub(1).to(dtype_of(self.discriminator)))
            logits = getattr(logits, "logits", logits)
            scores, best = logits.float().reshape(-1, k, logits[0].numel()).mean(dim=2).max(dim=1)
            best = best + k * torch.arange(len(best), device=best.device)
            pixels, latents, scores = pixels[best], latents[best], scores.tolist()
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


def decode(decoder, code: torch.Tensor) -> torch.Tensor:
    """Unscaled latents -> pixels in [0, 1], float32."""
    low, high = getattr(getattr(decoder, "config", None), "pixel_range", (-1.0, 1.0))
    pixels = decoder.decode(code.to(dtype_of(decoder))).sample.float()
    return pixels.sub(low).div(high - low).clamp(0, 1)


def present(pixels: torch.Tensor, output_type: str):
    """Pixels in [0, 1] (batch, channels, height, width) -> the same as tensor, array or PIL images."""
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.permute(0, 2, 3, 1).cpu().numpy()
    arrays = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def read_images(images, channels: int, size) -> torch.Tensor:
    """PIL images, arrays or tensors in [0, 1] -> pixels (batch, channels, height, width), resized to the sides that `size` has."""
    batch = [read_image(image, channels) for image in (images if isinstance(images, (list, tuple)) else [images])]
    require(batch, "image=[] holds no image.")
    for i, pixels in enumerate(batch):
        sides = tuple(side or own for side, own in zip(size, pixels.shape[2:]))
        if sides != pixels.shape[2:]:
            batch[i] = F.interpolate(pixels, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    sizes = sorted({tuple(pixels.shape[2:]) for pixels in batch})
    require(len(sizes) == 1, f"images of several sizes, {sizes}: write height= and width= to resize them all.")
    return torch.cat(batch)


def read_image(image, channels: int) -> torch.Tensor:
    """One image, or a batch as array or tensor -> pixels (batch, channels, height, width). Transparent parts become white."""
    if isinstance(image, Image.Image):
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    if isinstance(image, np.ndarray):
        image = torch.tensor(image[..., None] if image.ndim == 2 else image).movedim(-1, -3)
    require(isinstance(image, torch.Tensor), f"image is a {type(image).__name__}: pass a PIL image, an array, a tensor, or a list.")
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    wanted = f"a tensor ({channels}, height, width) or an array (height, width, {channels})"
    require(pixels.ndim == 4 and pixels.shape[1] == channels, f"image has shape {tuple(image.shape)}: pass {wanted}.")
    low, high = pixels.min().item(), pixels.max().item()
    require(low >= 0 and high <= 1, f"image has values from {low:.3g} to {high:.3g}: pass values in [0, 1].")
    return pixels


def download(repo: str, skipped, options) -> Path:
    """What the pipeline needs of a Hub repo: configurations, vocabularies and safetensors of its components; no code."""
    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    hub = {name: options[name] for name in names if options.get(name) is not None}
    index = json.loads(Path(hf_hub_download(repo, "model_index.json", **hub)).read_text())
    parts = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0] and name not in skipped]
    files = [f"{part}/*.{suffix}" for part in parts for suffix in ("json", "txt", "model", "safetensors")]
    variants = None if options.get("variant") else ["*.*.safetensors"]  # as model.fp16.safetensors
    return Path(snapshot_download(repo, allow_patterns=["model_index.json", *files], ignore_patterns=variants, **hub))


def load_registered(folder: Path, name: str, options) -> dict:
    """{name: model} where transformers knows the component's model type; {} where diffusers may run the repo's code.

    Raises ValueError where transformers does not know it and the user has not allowed that code.
    """
    path = folder / name / "config.json"
    model_type = json.loads(path.read_text()).get("model_type") if path.is_file() else None
    if model_type in CONFIG_MAPPING:
        dtype = options.get("dtype", options.get("torch_dtype"))
        dtype = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        return {name: AutoModel.from_pretrained(folder, subfolder=name, use_safetensors=True, dtype=dtype or "auto")}
    unknown = f"{name} is a {model_type!r} model, which transformers does not know: import the package that defines it"
    allowed = model_type is None or options.get("trust_remote_code")
    require(allowed, f"{unknown} (import hf_ae), or pass trust_remote_code=True to run the repo's code.")
    return {}


def dtype_of(model) -> torch.dtype:
    """The dtype of a model's floating-point weights; float32 where it has none."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


def is_number(value, low=-(2**62), high=2**62, kind=Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def is_texts(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def require(condition, message: str):
    if not condition:
        raise ValueError(message)
