"""JSON files of a model or pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The file's content, {} where there is none. Raises ValueError where it is broken."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object.")
    return content


def to_json(content: dict[str, Any]) -> str:
    """As transformers and diffusers write it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
