"""A README.md in which hf_ae writes one marked section, and a person everything else."""

from __future__ import annotations

import re
from typing import Any

import yaml

BEGIN = "<!-- hf_ae: from here to the end mark this text is written anew by hf-ae evaluate, train and push -->"
END = "<!-- hf_ae: end -->"
OWN_TITLES = (
    "Use", "Against other formats", "Results", "Training", "Training of the prior", "Components",
)  # fmt: skip
"""Sections of the cards that versions before the marks wrote; what a person added had other titles."""
FRONT = re.compile(r"\A---\n(.*?)\n?---\n", re.S)


def front_matter(card: str) -> dict[str, Any]:
    """The fields at the top of a card, {} where there are none."""
    found = FRONT.match(card)
    try:
        fields = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        fields = None
    return fields if isinstance(fields, dict) else {}


def body_of(card: str) -> str:
    """A card without its front matter."""
    return FRONT.sub("", card).strip()


def with_section(old: str, title: str, section: str, sign: str) -> str:
    """The text of a card, without front matter, with its marked section replaced.

    A text without marks that holds `sign` is a card of an earlier version: of it the sections stay that it did not
    write. Any other text is a person's: the section goes to its end.
    """
    marked = f"{BEGIN}\n\n{section}\n\n{END}"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return f"{before}{marked}{after}".strip()
    if not old or sign in old:
        parts = re.split(r"^(?=## )", old, flags=re.M)[1:]
        kept = [part.strip() for part in parts if part.split("\n", 1)[0].removeprefix("## ").strip() not in OWN_TITLES]
        return "\n\n".join([f"# {title}", marked, *kept])
    return f"{old}\n\n{marked}"


def merged_front(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Front matter: `new`, with the fields that only the `old` one has, its licence, and its tags and datasets beside
    ours."""
    merged = {key: value for key, value in old.items() if key not in ("model-index", "model_name")} | new
    for key in ("license", "license_name", "license_link", "pipeline_tag"):
        merged |= {key: old[key]} if old.get(key) else {}
    for key in ("tags", "datasets"):
        theirs = old.get(key) if isinstance(old.get(key), list) else []
        values = list(dict.fromkeys([*new.get(key, []), *map(str, theirs or [])]))
        merged |= {key: values} if values else {}
    return merged
