"""The adversarial game: who gets which gradient, and what the discriminator is good for."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import PROMPT, pipeline
from torch.nn import functional as F
from variants import make, pixels

import hf_ae
from hf_ae.hub.pipeline_folder import save_pipeline
from hf_ae.models.discriminators import adaptive_weight, discriminator_loss, frozen, generator_loss
from hf_ae.pipelines import TextToImagePipeline
from hf_ae.train import train
from hf_ae.training.optimizers import make_optimizers


def gradients(part):
    return [p.grad for p in part.parameters() if p.grad is not None and p.grad.abs().max() > 0]


@pytest.mark.parametrize("term", ["adversarial", "feature"])
def test_the_generators_terms_reach_encoder_and_decoder_and_leave_the_discriminator_alone(term):
    model = make("vaegan-mlp")
    model(pixels(model)).losses[term].backward()
    assert len(gradients(model.encoder)) == len(list(model.encoder.parameters()))
    assert len(gradients(model.decoder)) == len(list(model.decoder.parameters()))
    assert not gradients(model.discriminator)


def test_the_discriminators_term_trains_the_discriminator_and_gives_the_generator_nothing():
    model = make("vaegan-mlp")
    model(pixels(model)).losses["discriminator"].backward()
    reached = {id(g) for g in gradients(model.discriminator)}
    named = list(model.discriminator.named_parameters())
    left_out = [name for name, parameter in named if id(parameter.grad) not in reached]
    assert all(name.endswith("to_logits.bias") for name in left_out), "within the hinge's margin its gradient is ½ - ½"
    assert not gradients(model.encoder) and not gradients(model.decoder)


def test_one_backward_pass_gives_both_parts_what_two_separate_passes_give():
    """As in textbooks: the generator's loss through a discriminator that is not stepped, then the other's."""
    model = make("vaegan-mlp").eval()
    x = pixels(model)
    output = model(x)
    output.loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    output = model(x)
    judged = model.discriminator(output.reconstruction * 2 - 1)
    feature = (judged.features - model.discriminator(x * 2 - 1).features.detach()).square().sum() / len(x)
    reference = output.losses["reconstruction"] + 0.01 * feature
    weight = torch.autograd.grad(reference, model.last_layer, retain_graph=True)[0].norm()
    weight = weight / torch.autograd.grad(-judged.logits.mean(), model.last_layer, retain_graph=True)[0].norm()
    (reference + output.losses["kl"] - 0.5 * weight * judged.logits.mean()).backward()
    for name, p in model.named_parameters():
        if not name.startswith("discriminator"):
            torch.testing.assert_close(p.grad, together[name], rtol=1e-3, atol=1e-5)
    model.zero_grad()
    real, fake = (model.discriminator(y * 2 - 1).logits for y in (x, output.reconstruction.detach()))
    (0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()).backward()
    for name, p in model.discriminator.named_parameters():
        torch.testing.assert_close(p.grad, together[f"discriminator.{name}"], rtol=1e-3, atol=1e-5)


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    value = adaptive_weight(
        (weight * torch.tensor([3.0, 4.0])).sum(), (weight * torch.tensor([0.0, 0.5])).sum(), weight
    )
    assert value.item() == pytest.approx(10.0, rel=1e-4) and not value.requires_grad
    assert adaptive_weight(weight.sum(), 0 * weight.sum(), weight).item() == 1e4


def test_losses_at_the_optimum_are_those_of_the_papers():
    certain, unsure = torch.full((8,), 30.0), torch.zeros(8)
    assert discriminator_loss("hinge", certain, -certain) == 0 and discriminator_loss("hinge", unsure, unsure) == 1
    assert discriminator_loss("non_saturating", unsure, unsure).item() == pytest.approx(0.693147, abs=1e-5)
    cross_entropy = F.binary_cross_entropy_with_logits(torch.tensor([1.5]), torch.ones(1))
    torch.testing.assert_close(generator_loss("non_saturating", torch.tensor([1.5])), cross_entropy)
    assert generator_loss("hinge", torch.tensor([1.0, 2.0])).item() == -1.5


def test_a_frozen_module_passes_gradients_to_its_input_alone():
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    frozen(layer, x).sum().backward()
    assert layer.weight.grad is None and torch.allclose(x.grad, layer.weight.sum(0).expand(4, 3))


def test_the_discriminator_waits_for_its_start_and_the_count_is_saved(tmp_path):
    model = make("vaegan-conv")
    x = pixels(model)
    terms = [model(x).losses for _ in range(3)]
    assert [bool(t["discriminator"] > 0) for t in terms] == [False, False, True] and terms[1]["adversarial"] == 0
    model.save_pretrained(tmp_path)
    assert hf_ae.VAEGANModel.from_pretrained(tmp_path).forward_passes == 3


def test_each_part_has_its_own_optimizer(train_args):
    model = make("vaegan-mlp")
    for name, count in (("adamw", 2), ("muon", 3)):
        optimizers = make_optimizers(model, train_args(optimizer=name, discriminator_learning_rate=1e-4))
        held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len(optimizers) == count and sorted(map(id, held)) == sorted(map(id, model.parameters()))
        group = optimizers[-1].param_groups[0]
        assert group["lr"] == 1e-4 and list(map(id, group["params"])) == list(
            map(id, model.discriminator.parameters())
        )


def test_resuming_with_two_optimizers_is_bitwise_and_bf16_trains(train_args, tmp_path):
    options = dict(
        model_type="hf_ae_vaegan", optimizer="muon", use_ema=True, mixed_precision="bf16", checkpointing_steps=3,
        gradient_accumulation_steps=2, max_train_steps=7, discriminator_learning_rate=3e-4, max_grad_norm=50.0,
        config_overrides=dict(hidden_sizes=[16], latent_dim=4, discriminator_channels=[4, 8], feature_weight=0.01,
                              adversarial_start=4),
    )  # fmt: skip
    train(train_args(**options, output_dir=str(tmp_path / "whole")))
    train(train_args(**options, output_dir=str(tmp_path / "cut")))
    (tmp_path / "cut" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    train(train_args(**options, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest"))
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert whole["forward_passes"] == 14
    again = hf_ae.VAEGANModel.from_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    start = hf_ae.VAEGANModel(again.config).discriminator.state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in again.discriminator.state_dict().items())


def test_the_discriminator_chooses_among_a_pipelines_candidates_and_is_saved_with_it(tmp_path):
    judge = hf_ae.DiscriminatorModel(hf_ae.DiscriminatorConfig(num_channels=3, hidden_sizes=[4, 8])).eval()
    pipe = pipeline(discriminator=judge)
    options = dict(num_candidates=3, num_inference_steps=1, seed=1, output_type="pt")
    chosen = pipe(PROMPT, **options)
    with torch.no_grad():
        score = judge(chosen.images * 2 - 1).logits.mean().sigmoid().item()
    assert chosen.scores[0] == pytest.approx(score, abs=1e-3)
    save_pipeline(pipe, tmp_path / "pipe")
    again = TextToImagePipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.discriminator, hf_ae.DiscriminatorModel)
    torch.testing.assert_close(again(PROMPT, **options).images, chosen.images, rtol=1e-3, atol=1e-3)


def test_configurations_that_cannot_be_trained_name_the_field(train_args):
    for fields, word in (
        (dict(reconstruction_weight=0.0), "feature_weight"),
        (dict(adversarial_weight=-1.0), "adversarial_weight"),
        (dict(discriminator_channels=[4] * 6), "discriminator_channels"),
        (dict(adversarial_loss="wasserstein"), "non_saturating"),
    ):
        with pytest.raises(ValueError, match=word):
            hf_ae.VAEGANConfig(**fields)
    with pytest.raises(ValueError, match="discriminator_learning_rate"):
        train_args(discriminator_learning_rate=-1)
