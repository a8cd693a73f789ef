"""What TextToImagePipeline promises beyond stock Stable Diffusion. Tiny random models."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import (
    PROMPT,
    SCHEDULERS,
    SIDE,
    TOKENS,
    Brightness,
    LightDecoder,
    bert,
    components,
    noise,
    pipeline,
    scheduler,
    stock,
    unet,
    vae_of_hf_ae,
)
from transformers import T5Config, T5EncoderModel

from hf_ae.pipelines import CaptionPrior, Preview, TextToImagePipeline
from hf_ae.pipelines.drawing_request import CANDIDATE_STRIDE
from hf_ae.pipelines.prompt_reading import CACHED_TEXTS


@pytest.fixture
def pipe():
    return pipeline()


# Seeds, candidates, image to image


@pytest.mark.parametrize("name", ["ddim", "ancestral"])
def test_same_seed_same_image_in_a_batch_or_alone(name):
    pipe = pipeline(noise=name)
    batch = pipe([PROMPT, "the dog"], seed=7, num_images_per_prompt=2, output_type="np").images
    for i, prompt in enumerate([PROMPT, PROMPT, "the dog", "the dog"]):
        np.testing.assert_allclose(pipe(prompt, seed=7 + i, output_type="np").images[0], batch[i], atol=2e-6)
    np.testing.assert_allclose(pipe([PROMPT] * 2, seed=[8, 7], output_type="np").images, batch[[1, 0]], atol=2e-6)
    assert np.abs(batch[0] - batch[1]).max() > 0.01
    torch.manual_seed(0)
    first, second = pipe(PROMPT, output_type="np").images, pipe(PROMPT, output_type="np").images
    assert np.abs(first - second).max() > 0.01


def test_the_best_candidate_is_kept():
    pipe = pipeline(discriminator=Brightness())
    stride = CANDIDATE_STRIDE
    best = pipe([PROMPT, "the dog"], seed=3, num_candidates=3, output_type="pt")
    for i, prompt in enumerate([PROMPT, "the dog"]):
        images = torch.cat([pipe(prompt, seed=3 + i + j * stride, output_type="pt").images for j in range(3)])
        scores = images.mul(2).sub(1).mean(dim=(1, 2, 3)).sigmoid()
        assert best.scores[i] == pytest.approx(scores.max().item(), abs=1e-6)
        torch.testing.assert_close(best.images[i], images[scores.argmax()], atol=2e-6, rtol=0)
    latents = pipe([PROMPT, "the dog"], seed=3, num_candidates=3, output_type="latent").images
    pixels = pipe.vae.decode(latents / 0.5).sample / 2 + 0.5
    torch.testing.assert_close(pixels.clamp(0, 1), best.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "pndm", "heun"])
@pytest.mark.parametrize("span", [(-1.0, 1.0), (0.0, 1.0)])
def test_strength_zero_is_the_round_trip_of_the_vae(name, span):
    pipe = pipeline(vae=lambda: vae_of_hf_ae(span), noise=name)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    low, high = span
    with torch.no_grad():
        code = pipe.vae.encode(pixels * (high - low) + low).latent_dist.mode()
        expected = ((pipe.vae.decode(code).sample - low) / (high - low)).clamp(0, 1)
    images = pipe([PROMPT] * 2, image=pixels, strength=0, output_type="pt").images
    assert torch.equal(images, expected)
    assert images.std() > 0.01


def test_images_of_every_kind_are_read_alike_and_resized():
    pipe, generator = pipeline(), np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (SIDE, SIDE + 2, 3), dtype=np.uint8))
    array = np.asarray(picture, dtype=np.float32) / 255
    call = dict(seed=1, strength=0.5, output_type="np")
    expected = pipe(PROMPT, image=picture, **call).images
    assert expected.shape == (1, SIDE, SIDE + 2, 3)
    for image in (array, np.asarray(picture), torch.tensor(array).permute(2, 0, 1), [picture], array[None]):
        np.testing.assert_allclose(pipe(PROMPT, image=image, **call).images, expected, atol=2e-6)
    assert pipe(PROMPT, image=picture, height=8, width=12, seed=1).images[0].size == (12, 8)
    clear = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    white = Image.new("RGB", (SIDE, SIDE), "white")
    np.testing.assert_array_equal(pipe(PROMPT, image=clear, **call).images, pipe(PROMPT, image=white, **call).images)


# What happens on the way


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_streams_the_image_of_the_call(name):
    pipe, call = pipeline(noise=name, vae=vae_of_hf_ae), dict(seed=2, num_inference_steps=5, output_type="np")
    *previews, last = pipe.stream(PROMPT, **call)
    np.testing.assert_array_equal(last.images, pipe(PROMPT, **call).images)
    assert np.isfinite(last.images).all() and last.images.std() > 0.01
    assert [p.step for p in previews] == list(range(1, len(previews) + 1)) and previews[0].num_steps == len(
        previews
    ) >= 5
    assert all(isinstance(p, Preview) and p.images.shape == (1, SIDE, SIDE, 3) for p in previews)
    if name not in (
        "pndm",
        "tcd",
        "deis",
        "sde-dpm++",
        "heun",
        "kdpm2",
    ):  # at the last step the estimate is the picture
        np.testing.assert_allclose(previews[-1].images, last.images, atol=0.02)
    assert np.isfinite(pipe(PROMPT, image=last.images, strength=0.5, **call).images).all()


def test_previews_come_from_the_light_decoder():
    pipe = pipeline(image_decoder=LightDecoder(), discriminator=Brightness())
    assert (
        pipe.to(torch.float64).image_decoder.layer.weight.dtype == torch.float64
    )  # though it is no model of diffusers
    pipe.to(torch.float32)
    *previews, last = pipe.stream(PROMPT, seed=0, output_type="pt")
    codes = [p.images / 0.5 for p in pipe.stream(PROMPT, seed=0, output_type="latent") if isinstance(p, Preview)]
    for preview, code in zip(previews, codes, strict=True):
        torch.testing.assert_close(preview.images, pipe.image_decoder.decode(code).sample / 2 + 0.5)
    torch.testing.assert_close(last.images, pipe(PROMPT, seed=0, output_type="pt").images)
    assert next(pipe.stream(PROMPT, height=8)).images[0].size == (SIDE, 8)


def test_guidance_interval(pipe):
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    call = dict(seed=0, num_inference_steps=5, output_type="np")
    plain = pipe(PROMPT, guidance_scale=1, **call).images
    np.testing.assert_array_equal(pipe(PROMPT, guidance_interval=(0, 0), **call).images, plain)
    assert sizes == [1] * 10
    sizes.clear()
    some = pipe(PROMPT, guidance_interval=(0.2, 0.8), **call).images
    assert sizes == [1, 2, 2, 2, 1]
    everywhere = pipe(PROMPT, **call).images
    assert not np.allclose(some, plain, atol=1e-3) and not np.allclose(some, everywhere, atol=1e-4)


def test_callbacks_see_and_replace_the_latents_and_stop(pipe):
    seen, call = [], dict(seed=0, num_inference_steps=4, output_type="latent")

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"]))

    def replace(pipe, step, timestep, tensors):
        return {"latents": noise(seed=9) if step == 3 else tensors["latents"]}

    def stop(pipe, step, timestep, tensors):
        pipe.interrupt = step == 1
        return tensors

    plain = pipe(PROMPT, callback_on_step_end=look, **call).images
    assert [s for s, *_ in seen] == [0, 1, 2, 3] and [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], plain)
    assert torch.equal(pipe(PROMPT, callback_on_step_end=replace, **call).images, noise(seed=9))
    assert torch.equal(pipe(PROMPT, callback_on_step_end=stop, **call).images, seen[1][2]) and pipe.interrupt
    assert torch.equal(pipe(PROMPT, **call).images, plain) and not pipe.interrupt
    stream = pipe.stream(PROMPT, **call)
    next(stream)
    pipe.interrupt = True
    assert torch.equal(next(stream).images, seen[0][2])


# Text


def test_texts_are_encoded_once_until_something_changes(pipe):
    calls = []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    first = pipe(PROMPT, seed=0, output_type="np").images
    assert len(calls) == 2  # the prompt, and the empty negative prompt
    assert np.array_equal(first, pipe(PROMPT, seed=0, output_type="np").images) and len(calls) == 2
    pipe(["the dog", PROMPT], negative_prompt="a hat")
    assert len(calls) == 4
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(-1.0)
    changed = pipe(PROMPT, seed=0, output_type="np").images
    assert len(calls) == 6 and np.abs(changed - first).max() > 1e-4
    for i in range(70):
        pipe(
            PROMPT + " " + "abcdefghij"[i // 10] + "abcdefghij"[i % 10],
            guidance_scale=1,
            num_inference_steps=1,
            output_type="latent",
        )
    assert len(pipe._texts) == CACHED_TEXTS


def test_the_prior_adds_the_cosines_with_a_caption_its_nearest_text_and_their_mean():
    vectors = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    leads = {0: [0, 2, 3], 1: [1, 3, 4, 5]}
    prior = CaptionPrior(["cat", "dog"], num_texts=6, num_links=7, width=5)
    links = torch.tensor([[caption, text] for caption, texts in leads.items() for text in texts], dtype=torch.int32).T
    means = torch.nn.functional.normalize(torch.stack([vectors[texts].mean(0) for texts in leads.values()]), dim=1)
    prior.load_state_dict({"vectors": vectors, "means": means, "links": links})
    texts = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))

    def score(text, caption):
        cosines = [torch.cosine_similarity(text, vectors[i], dim=0) for i in leads[caption]]
        mean = torch.stack([vectors[i] for i in leads[caption]]).mean(0)
        return cosines[0] + max(cosines) + torch.cosine_similarity(text, mean, dim=0)

    expected = ["cat" if score(text, 0) > score(text, 1) else "dog" for text in texts]
    assert set(expected) == {"cat", "dog"} and prior(texts) == expected
    assert prior(vectors[:2] * 7) == ["cat", "dog"]


def test_with_a_prior_a_prompt_is_drawn_as_the_nearest_caption(pipe):
    captions = ["a red cat", "the dog on a mat", "blue hat"]
    pipe.register_modules(**dict(zip(("text_encoder", "tokenizer"), bert(use_attention_mask=True))))
    plain = {caption: pipe(caption, seed=1, num_inference_steps=2, output_type="pt").images for caption in captions}
    pipe.prior = CaptionPrior(captions, num_texts=3, num_links=3, width=16)
    states = [pipe.text_encoder(**pipe.tokenizer(caption, return_tensors="pt"))[0].mean(1)[0] for caption in captions]
    vectors = torch.nn.functional.normalize(torch.stack(states), dim=1)
    pipe.prior.load_state_dict(
        {"vectors": vectors, "means": vectors, "links": torch.arange(3, dtype=torch.int32).repeat(2, 1)}
    )
    drawn = pipe(["a red cat cat", *captions], seed=[1] * 4, num_inference_steps=2, output_type="pt")
    assert drawn.captions == ["a red cat", *captions]
    for image, caption in zip(drawn.images, drawn.captions):
        torch.testing.assert_close(image[None], plain[caption], atol=1e-5, rtol=0)
    assert pipe("a red cat cat", seed=1, num_inference_steps=2, negative_prompt="dog").captions == ["a red cat"]


@pytest.mark.parametrize("limit", ["tokenizer", "encoder"])
def test_what_is_cut_off_a_prompt_is_quoted(warnings, limit):
    pipe = pipeline(text=bert)
    if limit == "encoder":
        pipe.tokenizer.model_max_length = int(1e30)
    long = "a red cat on the blue mat with the red hat and tie"
    cut = pipe(long, seed=0, output_type="np").images
    assert len(warnings) == 1 and "12 tokens" in warnings[0] and "'hat and tie'" in warnings[0]
    pipe(long, seed=0)
    assert len(warnings) == 2  # although its embedding is kept
    np.testing.assert_array_equal(pipe(long.removesuffix(" hat and tie"), seed=0, output_type="np").images, cut)
    assert len(warnings) == 2


@pytest.mark.parametrize("fields, masked", [({}, True), ({"use_attention_mask": False}, False)])
def test_padding_is_masked_except_where_the_configuration_says_otherwise(fields, masked):
    encoder, tokenizer = bert(**fields)
    pipe, seen = pipeline(text=lambda: (encoder, tokenizer)), []
    pipe.unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    pipe(PROMPT, guidance_scale=1, num_inference_steps=1)
    tokens = tokenizer(PROMPT, padding="max_length", max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        expected = encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]
    torch.testing.assert_close(seen[0], expected)


def test_t5_encoder_too():
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    pipe = pipeline(text=lambda: (encoder, bert()[1]))
    assert np.isfinite(pipe(PROMPT, output_type="np").images).all()


# Numbers and sizes


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "lcm"])
def test_bfloat16_stays_near_float32(name):
    full, half = pipeline(vae=vae_of_hf_ae, noise=name), pipeline(vae=vae_of_hf_ae, noise=name).to(torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    call = dict(seed=0, num_inference_steps=6, guidance_scale=3.0)
    a, b = full(PROMPT, output_type="np", **call).images, half(PROMPT, output_type="np", **call).images
    assert 0 < np.abs(a - b).mean() < 0.02
    assert half(PROMPT, output_type="latent", **call).images.dtype == torch.bfloat16
    half.vae.to(torch.float32)  # as from_pretrained mixes them without dtype=
    assert half(PROMPT, image=a, **call).images[0].size == (SIDE, SIDE)


def test_dropout_is_off_while_drawing_and_back_on_afterwards():
    pipe = pipeline(text=lambda: bert(hidden_dropout_prob=0.5))
    expected = pipe(PROMPT, seed=0, output_type="np").images
    pipe.text_encoder.train()
    pipe.text_encoder.pooler.eval()
    pipe._texts.clear()
    np.testing.assert_array_equal(pipe(PROMPT, seed=0, output_type="np").images, expected)
    assert pipe.text_encoder.training and pipe.text_encoder.encoder.training and not pipe.text_encoder.pooler.training
    latents = noise().requires_grad_()
    stream = pipe.stream(PROMPT, latents=latents, output_type="pt")
    assert not next(stream).images.requires_grad and torch.is_grad_enabled()


def test_distilled_unets_get_the_guidance_scale_as_an_input():
    parts = components(noise="lcm")
    parts["unet"] = unet(time_cond_proj_dim=8).eval()
    call = dict(num_inference_steps=2, guidance_scale=4.0, latents=noise(), output_type="np")
    expected = stock(**parts)(PROMPT, generator=torch.Generator().manual_seed(0), **call).images
    np.testing.assert_allclose(TextToImagePipeline(**parts)(PROMPT, seed=0, **call).images, expected, atol=2e-6)


def test_output_types_and_defaults(pipe):
    image = pipe(PROMPT, seed=0).images[0]
    assert isinstance(image, Image.Image) and image.size == (SIDE, SIDE) and image.mode == "RGB"
    array, tensor = (pipe(PROMPT, seed=0, output_type=kind).images for kind in ("np", "pt"))
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    assert pipe(PROMPT, seed=0, return_dict=False)[1] is None
    assert pipe(PROMPT, height=8, width=20, num_images_per_prompt=2).images[1].size == (20, 8)
    assert len(list(pipe.stream(PROMPT))) == 4  # default_num_inference_steps=3
    pipe.scheduler = scheduler("dpm++")  # swapped as it is, or from the other's configuration
    assert pipe(PROMPT).images[0].size == (SIDE, SIDE)


def test_clipping_meant_for_pixels_is_turned_off(pipe, warnings):
    expected = pipe(PROMPT, seed=0, output_type="np").images
    pipe.scheduler = diffusers.DDIMScheduler.from_config({**pipe.scheduler.config, "clip_sample": True})
    np.testing.assert_array_equal(pipe(PROMPT, seed=0, output_type="np").images, expected)
    assert len(warnings) == 1 and "clip_sample" in warnings[0]


def test_offloaded_models_draw_the_same():
    pipe = pipeline(vae=vae_of_hf_ae, image_decoder=LightDecoder(), discriminator=torch.nn.Conv2d(3, 1, 4))
    expected = pipe(PROMPT, seed=0, num_candidates=2, output_type="np").images
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        *_, last = pipe.stream(PROMPT, seed=0, num_candidates=2, output_type="np")
        np.testing.assert_array_equal(last.images, expected)
    assert all(hasattr(model, "_hf_hook") for model in (pipe.unet, pipe.vae, pipe.text_encoder))
