"""A README.md in which hf_ae writes one marked section, and a person everything else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import EvalResult, model_index_to_eval_results

from ..errors import UserError, first_line, require
from .eval_results import METRIC_NAMES

BEGIN = "<!-- hf_ae: from here to the end mark this text is written anew by hf-ae evaluate, train and push -->"
END = "<!-- hf_ae: end -->"
OWN_TITLES = (
    "Use", "Against other formats", "Results", "Training", "Training of the prior", "Components",
)  # fmt: skip
"""Sections of the cards that versions before the marks wrote; what a person added had other titles."""
FRONT = re.compile(r"\A---\n(.*?)\n?---\n", re.S)


def read_card(path: Path) -> str:
    """The text of a card, "" where there is none. Raises ValueError where writing it anew could lose what a person
    wrote."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"The card {path} is no text in UTF-8: save it as such.") from error
    try:
        theirs(front_matter(text))
    except UserError as error:
        raise UserError(f"The card {path} cannot be kept up: {error}") from error
    whole = text.count(BEGIN) == text.count(END) <= 1 and text.find(BEGIN) <= text.find(END)
    lost = "has lost one of the marks around hf_ae's section"
    require(whole, f"The card {path} {lost}: remove what is left of that section, or put the mark back: {BEGIN} {END}")
    return text


def front_matter(card: str) -> dict[str, Any]:
    """The fields at the top of a card, {} where there are none. Raises ValueError where they are no YAML."""
    found = FRONT.match(card)
    try:
        fields = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError as error:
        raise UserError(f"its front matter is no valid YAML ({first_line(error)}).") from error
    require(isinstance(fields, dict | None), "its front matter must hold fields, such as license: mit.")
    return fields or {}


def theirs(front: dict[str, Any]) -> list[EvalResult]:
    """What the model-index holds beside our own metrics. Raises ValueError where it cannot be read."""
    try:
        results = model_index_to_eval_results(front["model-index"])[1] if front.get("model-index") else []
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"its model-index is not as huggingface_hub reads it ({first_line(error)}).") from error
    return [result for result in results if result.metric_type not in METRIC_NAMES]


def body_of(card: str) -> str:
    """A card without its front matter."""
    return FRONT.sub("", card).strip()


def with_section(old: str, title: str, section: str, sign: str) -> str:
    """The text of a card, without front matter, with its marked section replaced.

    A text without marks that holds `sign` and a section of ours is a card of an earlier version: of it the sections
    stay that it did not write. Any other text is a person's: the section goes to its end.
    """
    marked = f"{BEGIN}\n\n{section}\n\n{END}"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{marked}{after}".strip()
    parts = re.split(r"^(?=## )", old, flags=re.M)[1:]
    kept = [part.strip() for part in parts if part.split("\n", 1)[0].removeprefix("## ").strip() not in OWN_TITLES]
    if not old or (sign in old and len(kept) < len(parts)):
        return "\n\n".join([f"# {title}", marked, *kept])
    return f"{old}\n\n{marked}"


def merged_front(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Front matter: `new`, with the fields that only the `old` one has, its licence, and its tags and datasets beside
    ours."""
    merged = {key: value for key, value in old.items() if key not in ("model-index", "model_name")} | new
    if others := theirs(old):
        merged |= {
            "model_name": new.get("model_name", "model"),
            "eval_results": [*new.get("eval_results", []), *others],
        }
    for key in ("license", "license_name", "license_link", "pipeline_tag"):
        merged |= {key: old[key]} if old.get(key) else {}
    for key in ("tags", "datasets"):
        own = old.get(key) or []
        values = list(dict.fromkeys([*new.get(key, []), *map(str, own if isinstance(own, list) else [own])]))
        merged |= {key: values} if values else {}
    return merged
