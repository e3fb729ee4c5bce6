"""Finding and reading the file. The only I/O of this package, kept apart from its decisions."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from pantala.appconfig.model import AppConfig
from pantala.appconfig.parse import parse
from pantala.appconfig.reading import Finding
from pantala.errors import InvalidRequest, NotFound

NAMES = ("fly.toml", "fly.json")


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    path: Path
    config: AppConfig
    findings: list[Finding]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]


def find_config(directory: Path, given: str | None) -> Path | None:
    """The file named by `--config` (a directory means its fly.toml), else the first default name in `directory`."""
    if given:
        path = Path(given)
        if path.is_dir():
            path = next((path / name for name in NAMES if (path / name).is_file()), path / NAMES[0])
        if not path.is_file():
            raise NotFound(f"--config: there is no {path}", hint="give the path of a fly.toml, or of its directory")
        return path
    return next((directory / name for name in NAMES if (directory / name).is_file()), None)


def load(path: Path) -> Loaded:
    """Raises InvalidRequest when the file is no TOML or JSON, with row, column and the line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    config, findings = parse(_document(path, text), text)
    return Loaded(path=path, config=config, findings=findings)


def _document(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"{path.name}: row {error.lineno} column {error.colno}: {error.msg}") from error
        if not isinstance(document, dict):
            raise InvalidRequest(f"{path.name}: must be an object")
        return document
    if path.suffix in (".yaml", ".yml"):
        raise InvalidRequest(f"{path.name}: YAML is not supported yet; write TOML or JSON")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(_explained(path, text, str(error))) from error


def _explained(path: Path, text: str, message: str) -> str:
    place = re.search(r"\(at line (\d+), column (\d+)\)", message)
    if not place:
        return f"{path.name}: {message}"
    row, column = int(place[1]), int(place[2])
    line = (text.splitlines() or [""])[min(row, len(text.splitlines())) - 1]
    reason = message[: place.start()].strip()
    return f"{path.name}: row {row} column {column}: {reason}\n    {line}\n    {' ' * (column - 1)}^"
