"""What a training should be warned about while it runs: terms that say a part of the model has stopped working."""

from __future__ import annotations

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
