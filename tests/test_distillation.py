"""Distilling a pipeline's denoiser to few steps: the target by an independent sampler, and a whole training."""

from pathlib import Path

import pytest
import torch
from command_line import fails
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from test_inpainting_and_scoring import discriminator
from tiny_pipelines import CHANNELS, SCALE, SIDE, bert, pipeline, unet, vae_of_hf_ae

from hf_ae.diffusion.denoiser import make_scheduler
from hf_ae.diffusion.distillation import Distillation
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train_latent_diffusion import LatentDiffusionArguments, main, train

EMOJI = Path(__file__).parent / "data" / "noto_emoji_sample"


def latents(count, seed=0):
    shape = (count, CHANNELS, SIDE // SCALE, SIDE // SCALE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_one_step_to_the_target_lands_where_two_guided_steps_of_the_teacher_land(prediction, step):
    """The steps are taken by diffusers' DDIM sampler: 8 of the teacher, 4 of the student."""
    noise, teacher, scale = make_scheduler(prediction, "squaredcos_cap_v2", False), unet().eval(), 2.5
    text, empty = torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(1))
    model = Distillation(teacher, noise, empty, 4, scale)
    start, time = latents(1), step * 250 - 1
    many, few = (DDIMScheduler.from_config(noise.config) for _ in range(2))
    many.set_timesteps(8), few.set_timesteps(4)
    assert time in few.timesteps
    there = start
    with torch.no_grad():
        for t in (time, time - 125):
            without, prompted = teacher(torch.cat([there] * 2), t, torch.cat([empty, text]), return_dict=False)[
                0
            ].chunk(2)
            there = many.step(without + scale * (prompted - without), t, there).prev_sample
        target = model.target(start, torch.tensor([time]), text)
    torch.testing.assert_close(few.step(target, time, start).prev_sample, there, atol=2e-4, rtol=1e-3)


def test_the_teacher_is_no_part_of_what_is_trained_and_saved(tmp_path):
    model = Distillation(
        unet(), make_scheduler("v_prediction", "squaredcos_cap_v2", False), torch.zeros(1, 5, 16), 4, 2.0
    )
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"unet"}
    before = [p.clone() for p in model.__dict__["teacher"].parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        output = model(latents(8), torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1)))
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.__dict__["teacher"].parameters()))


def distillation(steps):
    noise = make_scheduler("v_prediction", "squaredcos_cap_v2", False)
    return Distillation(unet(), noise, torch.zeros(1, 5, 16), steps, 2.0)


def test_the_teacher_goes_where_the_unet_goes():
    model = distillation(4).to(torch.float64)
    assert next(model.__dict__["teacher"].parameters()).dtype == torch.float64
    assert next(model.to("meta").__dict__["teacher"].parameters()).device.type == "meta"


def test_a_small_batch_comes_to_all_steps_as_often():
    model, seen = distillation(8), []
    model.unet.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[1].tolist()))
    torch.manual_seed(0)
    for _ in range(80):
        model(latents(3), torch.zeros(3, 5, 16))
    counts = [seen.count(time) for time in (124, 249, 374, 499, 624, 749, 874, 999)]
    assert sum(counts) == 240 and min(counts) > 15 and max(counts) < 45


def test_more_steps_than_the_teacher_can_halve_are_refused():
    with pytest.raises(ValueError, match="between 1 and 500"):
        distillation(501)


@pytest.fixture
def base(tmp_path):
    save_pipeline(pipeline(text=bert, vae=vae_of_hf_ae), tmp_path / "base")
    return tmp_path / "base"


def test_a_distilled_pipeline_draws_in_its_steps_without_guidance(base, tmp_path):
    fields = dict(dataset_name=str(EMOJI), pretrained_pipeline=str(base), train_batch_size=4, validation_epochs=0)
    fields |= dict(output_dir=str(tmp_path / "run"), distill=4, guidance_scale=2.0, max_train_steps=3)
    train(LatentDiffusionArguments(**fields, checkpointing_steps=2))
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "run")
    assert pipe.config.default_num_inference_steps == 4 and pipe.config.default_guidance_scale == 1.0
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]  # the base samples at others
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe("a cat", seed=1).images[0].size == (SIDE, SIDE)
    checkpoint = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert not any("teacher" in name for name in checkpoint)


def test_a_fine_tuned_pipeline_keeps_its_discriminator(base, tmp_path):
    pipe = TextToImagePipeline.from_pretrained(base)
    pipe.register_modules(discriminator=discriminator())
    save_pipeline(pipe, tmp_path / "judged")
    fields = dict(dataset_name=str(EMOJI), train_batch_size=4, validation_epochs=0, max_train_steps=1)
    fields |= dict(pretrained_pipeline=str(tmp_path / "judged"), output_dir=str(tmp_path / "run"))
    train(LatentDiffusionArguments(**fields))
    assert TextToImagePipeline.from_pretrained(tmp_path / "run").discriminator is not None
    other = dict(text_encoder="hidden_size=8,num_hidden_layers=1,num_attention_heads=2,intermediate_size=8")
    other |= dict(unet_overrides="block_out_channels=[8,16],norm_num_groups=4,attention_head_dim=4")
    train(LatentDiffusionArguments(**fields | other | {"output_dir": str(tmp_path / "other")}))
    assert TextToImagePipeline.from_pretrained(tmp_path / "other").discriminator is None  # it reads other texts


def test_a_checkpoint_of_another_kind_of_training_is_refused(base, tmp_path):
    fields = dict(dataset_name=str(EMOJI), train_batch_size=4, validation_epochs=0, pretrained_pipeline=str(base))
    fields |= dict(max_train_steps=2, checkpointing_steps=2)
    train(LatentDiffusionArguments(**fields, output_dir=str(tmp_path / "tuned")))
    resumed = dict(output_dir=str(tmp_path / "run"), resume_from_checkpoint=str(tmp_path / "tuned" / "checkpoint-2"))
    for kind in ({"distill": 4}, {"lora_rank": 2}):
        with pytest.raises(ValueError, match=next(iter(kind))):
            train(LatentDiffusionArguments(**fields | resumed | kind | {"max_train_steps": 3}))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--distill", "4"], "pretrained_pipeline"),
        (["--distill", "4", "--lora_rank", "2"], "two trainings"),
        (["--distill", "4", "--unet_overrides", "layers_per_block=1"], "leave out unet_overrides"),
        (["--lora_rank", "4", "--text_encoder", "hidden_size=16"], "leave out text_encoder"),
        (["--distill", "501"], "between 1 and 500"),
    ],
)
def test_bad_input_ends_with_one_line(flags, says, base, tmp_path, capsys):
    common = ["--dataset_name", EMOJI, "--output_dir", tmp_path / "run", "--max_train_steps", "1"]
    given = [] if says == "pretrained_pipeline" else ["--pretrained_pipeline", base]
    fails(capsys, [*common, *given, *flags], says, main=main)
