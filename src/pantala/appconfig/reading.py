"""Reading a document key by key: each look-up says what it wants, what is wrong or left over becomes a finding.

A `Table` remembers the keys it was asked for, so the unknown ones are those nobody asked for, and the nearest known
name can be offered. A value of the wrong kind is an error with its line; reading goes on to find more.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from pantala.kit.units import parse_go_duration

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]")
_KEY = re.compile(r"""^\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*[=.]""")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`line` is 1-based, 0 when unknown. `unknown`: about a key nobody knows (an error only with `--strict`)."""

    level: Literal["error", "warning"]
    field: str
    message: str
    line: int = 0
    unknown: bool = False

    def text(self, filename: str) -> str:
        where = f"{filename}:{self.line}" if self.line else filename
        return f"{where}: {self.field}: {self.message}" if self.field else f"{where}: {self.message}"


class Lines:
    """Where the keys of a TOML text stand: `services[0].ports[1].port` to a line number."""

    def __init__(self, text: str) -> None:
        self._lines: dict[str, int] = {}
        counts: dict[str, int] = {}
        path = ""
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.match(line):
                path = self._header(header[2], repeated=header[1] == "[[", counts=counts)
                self._lines.setdefault(path, number)
            elif key := _KEY.match(line):
                name = key[1] or key[2] or key[3]
                self._lines.setdefault(f"{path}.{name}" if path else name, number)

    @staticmethod
    def _header(text: str, *, repeated: bool, counts: dict[str, int]) -> str:
        parts = [part.strip().strip("\"'") for part in text.split(".")]
        path = ""
        for index, part in enumerate(parts):
            path = f"{path}.{part}" if path else part
            last = index == len(parts) - 1
            if last and repeated:
                counts[path] = counts.get(path, -1) + 1
                for deeper in [key for key in counts if key.startswith(f"{path}[{counts[path]}]")]:
                    del counts[deeper]
            if path in counts:
                path = f"{path}[{counts[path]}]"
        return path

    def find(self, path: str) -> int:
        """The line of a key or table; of the nearest enclosing table when the key itself is not found; else 0."""
        while path:
            if line := self._lines.get(path) or self._lines.get(re.sub(r"\[0\]$", "", path)):
                return line
            path = path.rpartition(".")[0] if "." in path else ""
        return 0


class Document:
    """One file being read; collects findings."""

    def __init__(self, data: dict[str, Any], text: str) -> None:
        self.lines = Lines(text)
        self.findings: list[Finding] = []
        self.root = Table(self, data, "")

    def error(self, field: str, message: str) -> None:
        self.findings.append(Finding(level="error", field=field, message=message, line=self.lines.find(field)))

    def warn(self, field: str, message: str, *, unknown: bool = False) -> None:
        self.findings.append(
            Finding(level="warning", field=field, message=message, line=self.lines.find(field), unknown=unknown)
        )


class Table:
    """A table of the document. Look-ups return None (or the default) for what is absent or wrong."""

    def __init__(self, document: Document, data: dict[str, Any], path: str) -> None:
        self.document = document
        self.path = path
        self._data = data
        self._asked: dict[str, None] = {}

    def field(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: str, message: str) -> None:
        self.document.error(self.field(key), message)

    def raw(self, *keys: str) -> tuple[str, Any]:
        """The first of several spellings that is there, with its key."""
        for key in keys:
            self._asked[key] = None
        for key in keys:
            if key in self._data:
                return key, self._data[key]
        return keys[0], None

    def string(self, *keys: str) -> str | None:
        key, value = self.raw(*keys)
        if value is None or isinstance(value, str):
            return value
        return self._wrong(key, value, "a string")

    def boolean(self, key: str) -> bool | None:
        _, value = self.raw(key)
        if value is None or isinstance(value, bool):
            return value
        return self._wrong(key, value, "true or false")

    def integer(self, *keys: str, low: int | None = None, high: int | None = None) -> int | None:
        """An integer; a string of digits or a whole float counts as one."""
        key, value = self.raw(*keys)
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            return self._wrong(key, value, "a whole number")
        if (low is not None and value < low) or (high is not None and value > high):
            self.error(key, f"{value} is out of range; it must be {_range(low, high)}")
            return None
        return value

    def number(self, key: str) -> float | None:
        _, value = self.raw(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        return self._wrong(key, value, "a number")

    def port(self, *keys: str) -> int | None:
        return self.integer(*keys, low=1, high=65_535)

    def choice(self, key: str, options: Sequence[str]) -> str | None:
        value = self.string(key)
        if value is not None and value not in options:
            self.error(key, f"{value!r} is not one of {', '.join(options)}")
            return None
        return value

    def seconds(self, key: str, *, bare_unit_s: float) -> float | None:
        """A duration in Go's notation; a bare number counts `bare_unit_s` seconds each."""
        _, value = self.raw(key)
        if value is None or value == "":
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value * bare_unit_s
        if isinstance(value, str):
            try:
                return parse_go_duration(value)
            except ValueError as error:
                self.error(key, str(error))
                return None
        return self._wrong(key, value, "a duration such as 10s")

    def strings(self, key: str) -> list[str] | None:
        """A list of strings; a single string is a list of one."""
        _, value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return list(value)
        return self._wrong(key, value, "a list of strings")

    def string_map(self, key: str) -> dict[str, str]:
        """Names to values; numbers and booleans are written out. A list of tables is merged in order."""
        _, value = self.raw(key)
        if value is None:
            return {}
        parts: list[Any] = value if isinstance(value, list) else [value]
        merged: dict[str, str] = {}
        for part in parts:
            if not isinstance(part, dict):
                self._wrong(key, value, "a table of names and values")
                return {}
            for name, entry in part.items():
                if isinstance(entry, dict | list):
                    self.document.error(f"{self.field(key)}.{name}", "must be a string")
                else:
                    merged[str(name)] = _written(entry)
        return merged

    def mapping(self, key: str) -> dict[str, Any]:
        """A table whose values may be anything."""
        _, value = self.raw(key)
        if value is None:
            return {}
        return dict(value) if isinstance(value, dict) else self._wrong(key, value, "a table") or {}

    def table(self, *keys: str) -> Table | None:
        key, value = self.raw(*keys)
        if value is None:
            return None
        if isinstance(value, dict):
            return Table(self.document, value, self.field(key))
        return self._wrong(key, value, "a table")

    def tables(self, *keys: str) -> list[Table]:
        """A list of tables; a single one is a list of one."""
        key, value = self.raw(*keys)
        if value is None:
            return []
        if isinstance(value, dict):
            return [Table(self.document, value, self.field(key))]
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return [Table(self.document, item, f"{self.field(key)}[{index}]") for index, item in enumerate(value)]
        self._wrong(key, value, "a table or a list of tables")
        return []

    def named_tables(self, key: str) -> list[tuple[str, Table]]:
        """Sub-tables by name, such as `[checks.alive]`."""
        _, value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            self._wrong(key, value, "a table of tables")
            return []
        return [(name, Table(self.document, item, f"{self.field(key)}.{name}")) for name, item in value.items()]

    def done(self) -> None:
        """Everything known was asked for: warn about the rest, with its line and the nearest known name."""
        for key in self._data:
            if key not in self._asked:
                near = difflib.get_close_matches(key, list(self._asked), n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.document.warn(self.field(key), f"unknown key, kept but not used{hint}", unknown=True)

    def _wrong(self, key: str, value: Any, wanted: str) -> Any:
        self.error(key, f"must be {wanted}, not {_kind(value)}")
        return None


def _written(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


def _range(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f"between {low} and {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


def _kind(value: Any) -> str:
    names = {str: "the string", bool: "", int: "the number", float: "the number"}
    if type(value) in names:
        return f"{names[type(value)]} {_written(value)!s}".strip() if not isinstance(value, str) else f"{value!r}"
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else str(type(value).__name__)
