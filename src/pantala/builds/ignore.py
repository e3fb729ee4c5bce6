"""`.dockerignore`: patterns as Docker reads them (Go's filepath.Match, `**`, `!` exceptions; the last match wins)."""

from __future__ import annotations

import re
from collections.abc import Iterable


class IgnoreRules:
    def __init__(self, lines: Iterable[str]) -> None:
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        for line in lines:
            pattern = line.strip()
            if not pattern or pattern.startswith("#"):
                continue
            keeps = pattern.startswith("!")
            cleaned = "/".join(part for part in pattern.lstrip("!").strip().split("/") if part not in ("", "."))
            if cleaned:
                self._rules.append((re.compile(_regex(cleaned)), keeps))
        self.has_exceptions = any(keeps for _, keeps in self._rules)

    def ignores(self, path: str) -> bool:
        """Whether a path (relative, with slashes) is left out; a matched directory takes all below it along."""
        ignored = False
        for pattern, keeps in self._rules:
            if ignored == keeps and pattern.fullmatch(path):
                ignored = not keeps
        return ignored


def _regex(pattern: str) -> str:
    """The pattern as a regular expression that also matches everything below what it names."""
    out, index = "", 0
    while index < len(pattern):
        char = pattern[index]
        if pattern.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif pattern.startswith("**", index):
            out, index = out + ".*", index + 2
        elif char == "*":
            out, index = out + "[^/]*", index + 1
        elif char == "?":
            out, index = out + "[^/]", index + 1
        elif char == "[" and (end := pattern.find("]", index + 1)) > 0:
            out, index = out + pattern[index : end + 1].replace("[!", "[^"), end + 1
        elif char == "\\" and index + 1 < len(pattern):
            out, index = out + re.escape(pattern[index + 1]), index + 2
        else:
            out, index = out + re.escape(char), index + 1
    return f"{out}(?:/.*)?"
