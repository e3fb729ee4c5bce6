"""What BuildKit says of a build (`--progress=rawjson`), as `BuildEvent`s and as signs of life. Pure."""

from __future__ import annotations

import base64
import re
from datetime import datetime
from typing import Any

import msgspec

from pantala.wire.api import BuildEvent

ERROR_CHARACTERS_MAX = 2_000
STEP_CHARACTERS_MAX = 90
QUIET_S, QUIET_STEP_S = 60.0, 600.0
"""How long a build without a running step, and one of BuildKit's own steps (a copy, a push), may say nothing."""
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}")
_NOISE = re.compile(r"^\[internal\] |^resolve image config|^exporting|^sha256:|^importing cache")
_USERS_STEP = re.compile(r"\] RUN ")


class Progress:
    """Turns BuildKit's raw progress into steps with their time, and remembers what explains a failure."""

    def __init__(self, quiet_s: float = QUIET_S) -> None:
        self._quiet_s = quiet_s
        self._told: set[str] = set()
        self._running: dict[str, str] = {}
        self._error = ""
        self._tail: list[str] = []

    def feed(self, line: bytes) -> list[BuildEvent]:
        try:
            status: dict[str, Any] = msgspec.json.decode(line)
        except msgspec.DecodeError:
            self._remember(line.decode(errors="replace").strip())
            return []
        events: list[BuildEvent] = []
        for vertex in status.get("vertexes") or ():
            events += self._vertex(vertex)
        for entry in status.get("logs") or ():
            text = base64.b64decode(entry.get("data") or "").decode(errors="replace").rstrip()
            for part in text.splitlines():
                self._remember(part)
                events.append(BuildEvent(type="log", text=part))
        return events

    def failure(self) -> str:
        """Why the build failed: the failing step's own words, then the last lines of its output."""
        lines = [*self._tail[-12:], self._error] if self._error else self._tail[-12:]
        return "\n".join(line for line in lines if line)[-ERROR_CHARACTERS_MAX:] or "the build failed without a word"

    def quiet_at_most_s(self) -> float | None:
        """From when on a BuildKit that says nothing hangs; None while a user's own step may be silent."""
        if any(_USERS_STEP.search(name) for name in self._running.values()):
            return None
        return QUIET_STEP_S if self._running else self._quiet_s

    def _vertex(self, vertex: dict[str, Any]) -> list[BuildEvent]:
        digest, name = str(vertex.get("digest")), str(vertex.get("name") or "")
        if vertex.get("started") and not vertex.get("completed"):
            self._running[digest] = name
        else:
            self._running.pop(digest, None)
        if vertex.get("error"):
            self._error = str(vertex["error"])
        if not vertex.get("completed") or digest in self._told or _NOISE.match(name):
            return []
        self._told.add(digest)
        took_ms = 0 if vertex.get("cached") else _between_ms(vertex.get("started"), vertex["completed"])
        suffix = " (cached)" if vertex.get("cached") else ""
        return [BuildEvent(type="step", text=f"{_shortened(name)}{suffix}", took_ms=took_ms)]

    def _remember(self, line: str) -> None:
        self._tail = [*self._tail[-30:], line]


def _shortened(name: str) -> str:
    """A step's name on one line: runs of spaces and full digests say nothing to a reader."""
    text = _DIGEST.sub("", " ".join(name.split()))
    return text if len(text) <= STEP_CHARACTERS_MAX else text[: STEP_CHARACTERS_MAX - 1] + "…"


def _between_ms(started: str | None, completed: str) -> int:
    if not started:
        return 0
    begin, end = datetime.fromisoformat(started), datetime.fromisoformat(completed)
    return max(0, round((end - begin).total_seconds() * 1000))
