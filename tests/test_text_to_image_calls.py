"""What TextToImagePipeline takes as stock pipelines do: embeddings, clip_skip, timesteps, callbacks. Tiny models."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from tiny_pipelines import PROMPT, SCHEDULERS, bert, components, noise, pipeline, scheduler, stock

from hf_ae.pipelines import TextToImagePipeline
from hf_ae.pipelines.prompt_reading import name_symbols

PROMPTS, NEGATIVES = [PROMPT, "the dog"], ["a hat", "a mat"]
CALL = dict(num_inference_steps=4, guidance_scale=5.0, output_type="np")


@pytest.fixture
def pipe():
    return pipeline()


@pytest.fixture
def parts():
    return components()


# Against stock Stable Diffusion


def test_prompts_are_encoded_as_stock_does(parts):
    ours, theirs = TextToImagePipeline(**parts), stock(**parts)
    for prompt, negative in ((PROMPT, None), (PROMPT, "a hat"), (PROMPTS, NEGATIVES)):
        options = dict(device="cpu", num_images_per_prompt=2, negative_prompt=negative)
        found = ours.encode_prompt(prompt, do_classifier_free_guidance=True, **options)
        expected = theirs.encode_prompt(prompt, do_classifier_free_guidance=True, **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
        assert ours.encode_prompt(prompt, do_classifier_free_guidance=False, **options)[1] is None


def test_embeddings_draw_what_their_texts_draw_without_a_text_encoder(parts):
    full = TextToImagePipeline(**parts)
    positive, negative = full.encode_prompt(PROMPTS, negative_prompt=NEGATIVES)
    expected = full(PROMPTS, NEGATIVES, seed=3, num_images_per_prompt=2, **CALL).images
    bare = TextToImagePipeline(**{**parts, "text_encoder": None, "tokenizer": None})
    given = dict(prompt_embeds=positive, negative_prompt_embeds=negative, seed=3, num_images_per_prompt=2)
    np.testing.assert_array_equal(bare(**given, **CALL).images, expected)
    *_, last = bare.stream(**given, **CALL)
    np.testing.assert_array_equal(last.images, expected)
    mixed = full(PROMPTS, negative_prompt_embeds=negative, seed=3, num_images_per_prompt=2, **CALL).images
    np.testing.assert_array_equal(mixed, expected)
    plain = CALL | {"guidance_scale": 1.0}
    drawn = bare(prompt_embeds=positive, seed=3, **plain).images
    np.testing.assert_array_equal(drawn, full(PROMPTS, seed=3, **plain).images)
    with pytest.raises(ValueError, match="no text_encoder"):
        bare(prompt_embeds=positive, seed=3, **CALL)  # its negative prompt is a text


def test_clip_skip_leaves_out_layers_and_is_no_other_text_in_the_cache(parts):
    """Stock Stable Diffusion looks for `text_encoder.text_model`, which CLIP of transformers 5 has no more."""
    ours, encoder, tokenizer = TextToImagePipeline(**parts), parts["text_encoder"], parts["tokenizer"]
    ids = tokenizer(PROMPT, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        expected = [encoder(ids)[0], *(encoder.final_layer_norm(layers[i]) for i in (-1, -2, -3))]
    found = [ours.encode_prompt(PROMPT, clip_skip=skip)[0] for skip in (None, 0, 1, 2)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (found[0] - found[2]).abs().max() > 1e-3
    drawn = [ours(PROMPT, latents=noise(), clip_skip=skip, **CALL).images for skip in (None, 1, None)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4 and np.array_equal(drawn[0], drawn[2]) and ours.clip_skip is None
    assert np.isfinite(pipeline(text=bert)(PROMPT, clip_skip=1, seed=0, output_type="np").images).all()
    with pytest.raises(ValueError, match="clip_skip=9: the text encoder has 2 layers"):
        ours(PROMPT, clip_skip=9)


def test_timesteps_and_sigmas_draw_what_stock_draws(parts):
    steps, sigmas = [900, 500, 200, 50], [14.0, 3.0, 0.7, 0.1]
    call = dict(latents=noise(), guidance_scale=5.0, output_type="np")
    for name, options in (
        ("ddpm", {"timesteps": steps}),
        ("euler", {"timesteps": steps}),
        ("euler", {"sigmas": sigmas}),
    ):
        parts["scheduler"] = scheduler(name)
        draw = dict(generator=torch.Generator().manual_seed(0))
        expected = stock(**parts)(PROMPT, num_inference_steps=None, **options, **call, **draw).images
        ours, draw = TextToImagePipeline(**parts), dict(generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(ours(PROMPT, **options, **call, **draw).images, expected, atol=2e-6)
        assert ours.num_timesteps == len(parts["scheduler"].timesteps)
        assert np.isfinite(ours(PROMPT, image=expected, strength=0.5, output_type="np", **options).images).all()
        assert ours.num_timesteps == len(parts["scheduler"].timesteps) // 2


@pytest.mark.parametrize("cutoff", [0, 1])
def test_guidance_ends_where_a_callback_says_so_as_in_stock(parts, cutoff):
    def end(pipe, step, timestep, tensors):
        if step == cutoff:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    call = dict(latents=noise(2), callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    expected = stock(**parts)(PROMPTS, **call, **CALL).images
    ours, sizes = TextToImagePipeline(**parts), []
    ours.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    np.testing.assert_allclose(ours(PROMPTS, **call, **CALL).images, expected, atol=2e-6)
    assert sizes == [4] * (cutoff + 1) + [2] * (3 - cutoff) and ours.guidance_scale == 0.0
    assert (
        np.abs(ours(PROMPTS, latents=noise(2), **CALL).images - expected).max() > 1e-4 and ours.guidance_scale == 5.0
    )


def test_diffusers_own_callback_ends_guidance(parts):
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    expected = stock(**parts)(PROMPT, latents=noise(), callback_on_step_end=cut, **CALL).images
    images = TextToImagePipeline(**parts)(PROMPT, latents=noise(), callback_on_step_end=cut, **CALL).images
    np.testing.assert_allclose(images, expected, atol=2e-6)


def test_cross_attention_kwargs_reach_the_attention(parts):
    seen = []

    class Processor(diffusers.models.attention_processor.AttnProcessor):
        def __call__(self, attention, states, *args, mark=None, **kwargs):
            seen.append(mark)
            return super().__call__(attention, states, *args, **kwargs)

    pipe = TextToImagePipeline(**parts)
    pipe.unet.set_attn_processor(Processor())
    pipe(PROMPT, num_inference_steps=1, cross_attention_kwargs={"mark": 3})
    assert set(seen) == {3} and pipe.cross_attention_kwargs == {"mark": 3}


# Beyond stock


def test_a_callback_begins_guidance_and_replaces_embeddings(pipe):
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    def begin(pipe, step, timestep, tensors):
        pipe._guidance_scale = 4.0

    pipe(PROMPTS, guidance_scale=1.0, num_inference_steps=3, callback_on_step_end=begin)
    assert sizes == [2, 4, 4]
    other, (positive, negative) = pipe.encode_prompt("blue hat")[0], pipe.encode_prompt(PROMPT)

    def replace(pipe, step, timestep, tensors):
        assert torch.equal(tensors["negative_prompt_embeds"], negative)
        return {"prompt_embeds": torch.cat([negative, other])} if step == 0 else None

    names = ["prompt_embeds", "negative_prompt_embeds"]
    call = dict(seed=0, guidance_scale=3.0, num_inference_steps=2, output_type="np")
    plain = pipe(PROMPT, **call).images
    changed = pipe(PROMPT, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=names, **call).images
    assert np.abs(changed - plain).max() > 1e-4

    def negate(pipe, step, timestep, tensors):
        return {"negative_prompt_embeds": positive}

    changed = pipe(PROMPT, callback_on_step_end=negate, callback_on_step_end_tensor_inputs=names, **call).images
    assert np.abs(changed - plain).max() > 1e-4

    def spoil(pipe, step, timestep, tensors):
        return {"prompt_embeds": positive.repeat(5, 1, 1)}

    with pytest.raises(ValueError, match="the callback returned 5 prompt_embeds for 1 images"):
        pipe(PROMPT, callback_on_step_end=spoil)


def test_freeu_and_fused_projections(pipe):
    call = dict(seed=0, output_type="np")
    plain = pipe(PROMPT, **call).images
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert np.abs(pipe(PROMPT, **call).images - plain).max() > 1e-5
    pipe.disable_freeu()
    pipe.fuse_qkv_projections()
    np.testing.assert_allclose(pipe(PROMPT, **call).images, plain, atol=1e-5)
    pipe.unfuse_qkv_projections()
    np.testing.assert_array_equal(pipe(PROMPT, **call).images, plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_that_a_scheduler_cannot_do_are_refused(name):
    pipe = pipeline(noise=name)
    for call in (pipe, pipe.stream):
        with pytest.raises(ValueError, match="num_inference_steps=1001: the scheduler was trained with 1000 steps"):
            call(PROMPT, num_inference_steps=1001)
    if name in ("ddim", "ddpm", "pndm", "lcm", "tcd"):
        with pytest.raises(ValueError, match="Scheduler cannot do num_inference_steps=1000: ") as caught:
            pipe(PROMPT, num_inference_steps=1000)
        assert "\n" not in str(caught.value)


def test_drawing_leaves_the_random_state_of_the_process_alone(pipe):
    state = torch.random.get_rng_state()
    pipe(PROMPT, seed=3, output_type="np")
    pipe.encode_prompt(PROMPT)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()


# No pixels of what is no number


@pytest.mark.parametrize("part, blamed", [("unet", "the denoiser gave"), ("vae", "the decoder gave")])
def test_nan_never_becomes_pixels(pipe, part, blamed):
    with torch.no_grad():
        (pipe.unet.conv_out if part == "unet" else pipe.vae.decoder.conv_out).weight.fill_(float("nan"))
    for kind in ("pil", "np", "pt"):
        with pytest.raises(ValueError, match=f"{blamed} NaN or infinite values, which are no image"):
            pipe(PROMPT, output_type=kind)
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(pipe.stream(PROMPT))


# What the tokenizer does not know


@pytest.mark.parametrize("prompt", ["aaab", "xqz qj", "\U0001f1e9\U0001f1ea"])
def test_a_prompt_of_which_the_tokenizer_knows_nothing_gives_a_warning(warnings, prompt):
    pipe = pipeline(text=bert)
    pipe(f"{prompt} cat", num_inference_steps=1)
    pipe("cat", negative_prompt=prompt, num_inference_steps=1)
    assert warnings == []
    for _ in range(2):  # although its embedding is kept
        pipe(prompt, num_inference_steps=1)
    assert len(warnings) == 2 and f"The tokenizer knows no word of {prompt!r}" in warnings[0]


def test_an_emoji_that_the_tokenizer_does_not_know_is_read_by_its_name(warnings):
    pipe = pipeline(text=bert)
    call = dict(seed=0, num_inference_steps=1, output_type="np")
    for emoji, name in (("\U0001f408", "cat"), ("\U0001f415\ufe0f", "dog"), ("\u2764\ufe0f cat", "red heart cat")):
        np.testing.assert_array_equal(pipe(emoji, **call).images, pipe(name, **call).images)
    assert warnings == []


def test_a_skin_tone_is_read_as_captions_write_it():
    _, tokenizer = bert()
    named = name_symbols(tokenizer, "\U0001f44d\U0001f3fd, flat")
    assert " ".join(named.split()) == "thumbs up sign : medium skin tone , flat"
    assert name_symbols(tokenizer, "a^b") == "a^b"
