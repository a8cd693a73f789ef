"""What a training should be warned about while it runs: terms that say a part of the model has stopped working."""

from __future__ import annotations

import torch

LEAST_USAGE = 0.1
"""Share of a codebook that should be in use."""


def collapse_warnings(model, terms: dict) -> list[str]:
    """What has collapsed, each with the term that shows it and the field to change; `terms` are the losses of a training step.

    Codebook: fewer than a tenth of the codewords were used in the last 200 training passes.
    """
    found = []
    quantizers = getattr(model, "quantizers", [])
    for level, quantizer in enumerate(quantizers, 1):
        if quantizer.recent_usage < LEAST_USAGE:
            name = f"usage_{level}" if len(quantizers) > 1 else "usage"
            advice = "lower codebook_size"
            if hasattr(quantizer, "codebook"):
                advice += ", set revive_after=50, or raise commitment_weight if the term commitment keeps growing"
            used = round(quantizer.recent_usage * quantizer.size)
            found.append(
                f"{name}: only {used} of {quantizer.size} codewords were used in the last 200 steps, so the codebook has collapsed: "
                f"{advice} (--config_overrides)."
            )
    return found


class Watch:
    """Says each kind of warning once in a run."""

    def __init__(self, model, say=print):
        self.model, self.say, self.said = model, say, set()

    def __call__(self, terms: dict, step: int):
        for text in collapse_warnings(self.model, terms):
            term = text.split(":")[0]
            if term not in self.said:
                self.said.add(term)
                self.say(f"warning: at step {step}, {text}")


def generative_collapse(model, losses: dict[str, float], codes: torch.Tensor | None) -> list[str]:
    """Warnings for a model's losses on held-out images and their codes (images, …), means of the posterior."""
    found = [posterior_collapse(model.config, losses, codes), discriminator_wins(model.config, losses)]
    return [warning for warning in found if warning]


def posterior_collapse(config, losses: dict[str, float], codes: torch.Tensor | None, least: float = 0.01) -> str | None:
    """A warning where a VAE's code says nothing: the KL term is near 0, or 9 in 10 units are inactive.

    A unit is inactive where its posterior mean hardly differs between images: variance below `least` (Burda et al. 2016,
    section 5.2). Bowman et al. 2016 describe the collapse.
    """
    if not hasattr(config, "kl_weight") or "kl" not in losses:
        return None
    flag = "beta" if hasattr(config, "beta") else "kl_weight"
    weight = getattr(config, flag)
    if getattr(config, "objective", "beta") != "beta" or weight == 0:
        return None
    kl, advice = losses["kl"] / weight, f"lower {flag} (now {weight:g}) in --config_overrides."
    if kl < 0.05:
        return f"Posterior collapse: the term kl is {kl:.3g} nats, so the code says nothing about the image. {advice.capitalize()}"
    if codes is None or len(codes) < 20:
        return None
    variances = codes.float().flatten(1).var(0)
    active, units = int((variances > least).sum()), len(variances)
    if active > units / 10:
        return None
    return f"Posterior collapse: {units - active} of {units} units of the code are inactive (term kl {kl:.3g} nats). {advice.capitalize()}"


def discriminator_wins(config, losses: dict[str, float]) -> str | None:
    """A warning where the discriminator is never wrong: its loss is near 0 and the generator's saturated.

    `losses` are those of an evaluation, where the adversarial term has the weight `adversarial_weight` alone.
    """
    weight = getattr(config, "adversarial_weight", 0)
    if not weight or "discriminator" not in losses:
        return None
    adversarial, saturated = losses["adversarial"] / weight, 1.0 if config.adversarial_loss == "hinge" else 3.0
    started = losses["discriminator"] != 0 or losses["adversarial"] != 0
    if not started or losses["discriminator"] > 0.02 or adversarial < saturated:
        return None
    return (
        f"The discriminator wins: the term discriminator is {losses['discriminator']:.3g} and adversarial {adversarial:.3g}, so the "
        "generator learns nothing from it. Lower --discriminator_learning_rate, or write fewer discriminator_channels in "
        "--config_overrides."
    )
