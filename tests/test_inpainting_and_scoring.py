"""What a pipeline does with an image: painting a part of it anew, varying it, and saying whether it fits a prompt."""

import numpy as np
import pytest
import torch
from command_line import fails, runs
from PIL import Image
from tiny_pipelines import PROMPT, SIDE, Brightness, bert, noise, pipeline, scheduler, ship, vae_of_hf_ae

import hf_ae
from hf_ae.pipelines import TextToImagePipeline

PIXELS = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
LEFT = torch.zeros(1, SIDE, SIDE)
LEFT[:, :, : SIDE // 2] = 1


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun"])
def test_a_mask_keeps_pixels_where_it_is_black_and_paints_where_it_is_white(name):
    pipe = pipeline(noise=name)
    options = dict(image=PIXELS[0], seed=3, strength=1.0, output_type="pt")
    painted = pipe(PROMPT, mask_image=LEFT, **options).images[0]
    assert torch.equal(painted[:, :, SIDE // 2 :], PIXELS[0][:, :, SIDE // 2 :])
    assert (painted - PIXELS[0])[:, :, : SIDE // 2].abs().mean() > 0.05
    everything = pipe(PROMPT, mask_image=torch.ones_like(LEFT), **options).images[0]
    torch.testing.assert_close(everything, pipe(PROMPT, **options).images[0])
    nothing = pipe(PROMPT, mask_image=torch.zeros_like(LEFT), **options).images[0]
    assert torch.equal(nothing, PIXELS[0])


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_what_is_kept_is_in_the_latents_as_noisy_as_what_is_painted(name):
    pipe, seen, start = pipeline(noise=name), [], noise()
    clean = pipe.vae.encode(PIXELS[:1] * 2 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    options = dict(image=PIXELS[0], mask_image=LEFT, strength=1.0, latents=start, num_inference_steps=4)
    pipe(PROMPT, **options, callback_on_step_end=look)
    fresh = scheduler(name)
    fresh.set_timesteps(4)
    known = [fresh.add_noise(clean, start, time[None]) for time in fresh.timesteps[1:]] + [clean]
    half = clean.shape[3] // 2
    for latents, right in zip(seen, known, strict=True):
        torch.testing.assert_close(latents[:, :, :, half:], right[:, :, :, half:])
        assert (latents - right)[:, :, :, :half].abs().mean() > 1e-3


def test_a_mask_for_each_image_of_any_kind():
    pipe = pipeline()
    right = Image.fromarray((1 - LEFT[0]).mul(255).byte().numpy()).resize((64, 64), Image.Resampling.NEAREST)
    left = LEFT[0].numpy()
    options = dict(seed=3, num_images_per_prompt=2, output_type="pt")
    painted = pipe([PROMPT] * 2, image=list(PIXELS), mask_image=[left, right], **options).images
    half = SIDE // 2
    for image in painted[:2]:
        assert torch.equal(image[:, :, half:], PIXELS[0][:, :, half:])
    for image in painted[2:]:
        assert torch.equal(image[:, :, : half - 1], PIXELS[1][:, :, : half - 1])  # the edge was resized


def test_variations_of_an_image_need_no_prompt():
    pipe = pipeline(text=bert)
    varied = pipe(image=PIXELS[0], seed=3, num_images_per_prompt=2, output_type="pt").images
    assert len(varied) == 2 and (varied[0] - varied[1]).abs().mean() > 1e-3
    for images in (list(PIXELS), PIXELS, PIXELS.movedim(1, -1).numpy()):
        assert len(pipe(image=images, output_type="pt").images) == 2
    near, far = (pipe(image=PIXELS[0], seed=3, strength=s, output_type="pt").images[0] for s in (0.0, 1.0))
    rebuilt = pipe(PROMPT, image=PIXELS[0], strength=0.0, output_type="pt").images[0]
    torch.testing.assert_close(near, rebuilt)
    assert (far - rebuilt).abs().mean() > (near - rebuilt).abs().mean()
    embeds = pipe.encode_prompt("a")[0]
    same = pipe(prompt_embeds=embeds, image=PIXELS[0], guidance_scale=1, seed=3, strength=1.0, output_type="pt")
    assert (same.images[0] - far).abs().max() > 1e-5


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(mask_image=LEFT), "pass image, too"),
        (dict(image=PIXELS[0], mask_image=torch.cat([LEFT] * 3)), "pass a tensor"),
        (dict(image=PIXELS[0], mask_image=2 * LEFT), "in \\[0, 1\\]"),
        (dict(image=PIXELS[0], mask_image=[LEFT, LEFT]), "2 masks for 1 images"),
        (dict(image=PIXELS[0], mask_image=[]), "mask_image=\\[\\]"),
        (dict(image=PIXELS[0], mask_image="mask"), "mask_image is a str"),
    ],
)
def test_bad_masks(bad, words):
    with pytest.raises(ValueError, match=words):
        pipeline()(PROMPT, **bad)


def discriminator(width=16):
    torch.manual_seed(5)
    fields = dict(image_size=SIDE, text_width=width, hidden_sizes=[8, 16], num_heads=2)
    return hf_ae.PromptDiscriminatorModel(hf_ae.PromptDiscriminatorConfig(**fields)).eval()


def test_every_drawing_is_scored_and_score_says_the_same():
    for judge in (Brightness(), discriminator()):
        pipe = pipeline(text=bert, discriminator=judge)
        drawn = pipe([PROMPT, "the dog"], seed=3, output_type="pt")
        assert drawn.scores == pytest.approx(pipe.score(list(drawn.images), [PROMPT, "the dog"]), abs=1e-6)
        assert all(0 < score < 1 for score in drawn.scores)
    mixed = [Image.new("RGB", (9, 30), "red"), drawn.images[0]]
    assert pipe.score(mixed, [PROMPT] * 2)[1] == pytest.approx(pipe.score(drawn.images[0], PROMPT)[0], abs=1e-6)
    skipped = pipe(PROMPT, clip_skip=1, seed=3, output_type="pt")
    assert skipped.scores == pytest.approx(pipe.score(skipped.images[0], PROMPT), abs=1e-6)
    for bad in (None, [3]):
        with pytest.raises(ValueError, match="must be a text"):
            pipe.score(drawn.images[0], bad)
    assert pipe.score(drawn.images[0], PROMPT) != pytest.approx(pipe.score(drawn.images[0], "the dog"), abs=1e-7)
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        pipe.score(drawn.images[0], [PROMPT, "the dog"])
    with pytest.raises(ValueError, match="no discriminator"):
        pipeline().score(drawn.images[0], PROMPT)


def test_the_best_of_several_by_a_discriminator_that_reads_prompts():
    pipe = pipeline(text=bert, discriminator=discriminator())
    prompts = [PROMPT, "the dog"]
    best = pipe(prompts, seed=3, num_candidates=3, output_type="pt")
    pipe.discriminator = None
    pipe.register_modules(discriminator=discriminator())
    for i, prompt in enumerate(prompts):
        drawn = [pipe(prompt, seed=3 + i + j * 1_000_003, output_type="pt") for j in range(3)]
        scores = [each.scores[0] for each in drawn]
        assert best.scores[i] == pytest.approx(max(scores), abs=1e-6)
        torch.testing.assert_close(best.images[i], drawn[int(np.argmax(scores))].images[0], atol=2e-6, rtol=0)


def test_nothing_is_judged_without_a_prompt():
    pipe = pipeline(text=bert, discriminator=discriminator())
    assert pipe(image=PIXELS[0]).scores is None
    with pytest.raises(ValueError, match="nothing to choose by"):
        pipe(image=PIXELS[0], num_candidates=2)
    assert len(pipeline(discriminator=Brightness())(image=PIXELS[0], num_candidates=2).scores) == 1


def test_half_precision_judges_other_sizes_too():
    pipe = pipeline(text=bert, discriminator=discriminator()).to(torch.bfloat16)
    assert 0 < pipe(PROMPT, height=2 * SIDE, width=SIDE).scores[0] < 1


def test_a_discriminator_travels_with_its_pipeline(tmp_path):
    pipe = pipeline(text=bert, vae=vae_of_hf_ae, discriminator=discriminator())
    folder = ship(pipe, tmp_path / "pipe", remote=False)
    loaded = TextToImagePipeline.from_pretrained(folder)
    assert type(loaded.discriminator) is hf_ae.PromptDiscriminatorModel
    assert (folder / "discriminator" / "modeling_hf_ae_prompt_discriminator.py").is_file()
    images = list(PIXELS)
    assert loaded.score(images, [PROMPT] * 2) == pytest.approx(pipe.score(images, [PROMPT] * 2), abs=1e-6)


def test_a_discriminator_reads_images_of_any_size_and_several_prompts():
    model, states = discriminator(), torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
    pixels = PIXELS * 2 - 1
    logits = model(pixels, states).logits
    for i in range(6):
        torch.testing.assert_close(model(pixels[i % 2][None], states[i : i + 1]).logits[0], logits[i])
    assert model(torch.rand(2, 3, 40, 24), states).logits.shape == (6,)
    labels = torch.tensor([1.0, 1, 0, 0, 0, 0])
    output = model(pixels, states, labels)
    right = torch.nn.functional.binary_cross_entropy_with_logits(logits[:2], labels[:2])
    wrong = torch.nn.functional.binary_cross_entropy_with_logits(logits[2:], labels[2:])
    torch.testing.assert_close(output.loss, (right + wrong) / 2)


@pytest.mark.parametrize(
    "bad", [dict(hidden_sizes=[]), dict(hidden_sizes=[8, 16, 16], image_size=20), dict(num_heads=5)]
)
def test_bad_discriminator_configurations(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        hf_ae.PromptDiscriminatorConfig(**bad)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The folder of a pipeline with a discriminator."""
    pipe = pipeline(text=bert, vae=vae_of_hf_ae, discriminator=discriminator())
    return ship(pipe, tmp_path_factory.mktemp("judged"), remote=False)


def test_the_command_paints_a_part_anew_varies_and_judges(judged, tmp_path, capsys):
    image, mask = np.full((40, 60, 3), 255, np.uint8), np.zeros((40, 60), np.uint8)
    image[:, :30] = (200, 30, 30)
    mask[:, 30:] = 255
    for name, pixels in {"image": image, "mask": mask}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    given = ["--model", str(judged), "--image", str(tmp_path / "image.png")]
    painted = ["--mask", str(tmp_path / "mask.png"), "--strength", "1", "-o", str(tmp_path / "painted.png")]
    runs("generate", "a red cat", *given, *painted, "--candidates", "2")
    said = capsys.readouterr().out
    assert "The discriminator says" in said and ("yes" in said or "no" in said)
    drawn = np.asarray(Image.open(tmp_path / "painted.png"))
    assert drawn.shape == (SIDE, SIDE, 3)
    assert np.abs(drawn[:, : SIDE // 2 - 2].astype(int) - (200, 30, 30)).max() <= 1
    assert np.ptp(drawn[:, SIDE // 2 + 1 :]) > 5
    runs("generate", *given, "-o", str(tmp_path / "varied.png"))
    assert Image.open(tmp_path / "varied.png").size == (SIDE, SIDE)


def test_the_command_says_what_is_missing(judged, tmp_path, capsys):
    out = ["-o", tmp_path / "x.png", "--model", judged]
    fails(capsys, ["generate", *out], "Write what to draw")
    Image.new("L", (9, 9)).save(tmp_path / "mask.png")
    fails(capsys, ["generate", "a cat", "--mask", tmp_path / "mask.png", *out], "pass image")
    Image.new("RGB", (9, 12)).save(tmp_path / "image.png")
    sizes = ["--mask", tmp_path / "mask.png", "--image", tmp_path / "image.png"]
    fails(capsys, ["generate", "a cat", *sizes, *out], "equally large")
    fails(capsys, ["generate", "a cat", "--lora", tmp_path / "nothing", *out], "adapters")
    (tmp_path / "empty").mkdir()
    fails(capsys, ["generate", "a cat", "--lora", tmp_path / "empty", *out], "adapters")
