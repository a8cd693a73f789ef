"""What a training should be warned about while it runs: signs that a part of the model has stopped working."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

LEAST_USAGE = 0.1
"""Fraction of a codebook that should be in use."""
LEAST_VARIANCE = 0.01
"""Of a unit's posterior mean over images; a unit with less is inactive (Burda et al. 2016, section 5.2)."""


class Watch:
    """Logs each kind of codebook warning once in a run."""

    def __init__(self, model: Any, log: Callable[[str], Any] = print) -> None:
        self.model, self.log = model, log
        self.logged: set[str] = set()

    def __call__(self, step: int) -> None:
        for term, warning in codebook_collapse(self.model).items():
            if term not in self.logged:
                self.logged.add(term)
                self.log(f"warning: at step {step}, {term}: {warning}")


def codebook_collapse(model: Any) -> dict[str, str]:
    """The term that shows it -> the warning, for each level of discrete codes of which fewer than a tenth of the
    codewords were used in the last 200 training passes."""
    found = {}
    quantizers = getattr(model, "quantizers", [])
    for level, quantizer in enumerate(quantizers, 1):
        usage = quantizer.recent_usage
        if usage < LEAST_USAGE:
            advice = "lower codebook_size"
            if hasattr(quantizer, "codebook"):
                advice += ", set revive_after=50, or raise commitment_weight if the term commitment keeps growing"
            found[f"usage_{level}" if len(quantizers) > 1 else "usage"] = (
                f"only {round(usage * quantizer.size)} of {quantizer.size} codewords were used in the last 200 steps, "
                f"so the codebook has collapsed: {advice} (--config_overrides)."
            )
    return found


def generative_collapse(model: Any, losses: dict[str, float], latents: Tensor | None) -> list[str]:
    """Warnings for a model's losses on held-out images and their latents (images, …), means of the posterior."""
    found = [posterior_collapse(model, losses, latents), discriminator_wins(model.config, losses)]
    return [warning for warning in found if warning]


def posterior_collapse(model: Any, losses: dict[str, float], latents: Tensor | None) -> str | None:
    """A warning where a VAE's latents say nothing: the KL term is about 0, or 9 in 10 units are inactive.

    Bowman et al. 2016 describe the collapse.
    """
    weight = getattr(model.config, model.kl_weight_field) if model.kl_weight_field else 0
    if not weight:
        return None
    kl, advice = losses["kl"] / weight, f"Lower {model.kl_weight_field} (now {weight:g}) in --config_overrides."
    if kl < 0.05:
        return (
            f"Posterior collapse: the term kl is {kl:.3g} nats, so the latents say nothing about the image. {advice}"
        )
    if latents is None or len(latents) < 20:
        return None
    variances = latents.float().flatten(1).var(0)
    active, units = int((variances > LEAST_VARIANCE).sum()), len(variances)
    if active > units / 10:
        return None
    inactive = f"{units - active} of {units} units of the latents are inactive"
    return f"Posterior collapse: {inactive} (term kl {kl:.3g} nats). {advice}"


def discriminator_wins(config: Any, losses: dict[str, float]) -> str | None:
    """A warning where the discriminator is never wrong: its loss is about 0 and the generator's saturated.

    `losses` are those of an evaluation, where the adversarial term has the weight `adversarial_weight` alone.
    """
    if "adversarial" not in losses or not config.adversarial_weight:
        return None
    adversarial, discriminator = losses["adversarial"] / config.adversarial_weight, losses["discriminator"]
    saturated = 1.0 if config.adversarial_loss == "hinge" else 3.0
    started = discriminator != 0 or adversarial != 0
    if not started or discriminator > 0.02 or adversarial < saturated:
        return None
    return (
        f"The discriminator wins: the term discriminator is {discriminator:.3g} and adversarial {adversarial:.3g}, so "
        "the generator learns nothing from it. Lower --discriminator_learning_rate, or write fewer "
        "discriminator_channels in --config_overrides."
    )
