"""Golden answers of the API: what varies is replaced by its shape, the rest is compared exactly.

`PANTALA_WRITE_GOLDEN=1 pytest tests/contract` writes them anew; review the diff.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"
SHAPES = (
    (re.compile(r"^[0-9a-f]{14}$"), "<machine id>"),
    (re.compile(r"^[0-9A-HJKMNP-TV-Z]{26}$"), "<ulid>"),
    (re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"), "<time>"),
    (re.compile(r"^nonce_.+$"), "<nonce>"),
    (re.compile(r"^pantala_.+$"), "<token>"),
    (re.compile(r"^[a-z]+-[a-z]+-\d{4}$"), "<generated name>"),
    (re.compile(r"^[0-9a-f]{16}$"), "<digest>"),
)
NUMBERS = {"timestamp": "<ms>", "expires_at": "<s>"}


def shape(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: shape(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    if isinstance(value, str):
        for pattern, name in SHAPES:
            if pattern.match(value):
                return name
        return re.sub(r"\b[0-9a-f]{16}\b", "<digest>", re.sub(r"\b[0-9a-f]{14}\b", "<machine id>", value))
    return NUMBERS[key] if key in NUMBERS and isinstance(value, int) else value


def check(name: str, answer: Any) -> None:
    """`answer` is a response of the HTTP client."""
    seen = {"status": answer.status_code, "body": shape(answer.json())}
    path = FOLDER / f"{name}.json"
    text = json.dumps(seen, indent=2) + "\n"
    if os.environ.get("PANTALA_WRITE_GOLDEN"):
        path.write_text(text)
    assert json.loads(path.read_text()) == seen
