"""What the terminal shows: data on stdout, the rest on stderr; colour never carries meaning alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from pantala.errors import PantalaError


def say(text: str = "") -> None:
    """Progress and remarks, for people."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def emit(text: str) -> None:
    """Data, for people and pipes."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def emit_json(value: Any) -> None:
    emit(json.dumps(msgspec.to_builtins(value), indent=2))


def emit_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """Columns as wide as they need; `empty` (on stderr) when there is no row."""
    if not rows:
        say(empty)
        return
    texts = [[("-" if cell in (None, "") else str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(headers), *texts]) for column in range(len(headers))]
    emit(_bold("  ".join(header.ljust(width) for header, width in zip(headers, widths, strict=True)).rstrip()))
    for row in texts:
        emit("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_error(error: PantalaError) -> None:
    say(f"{_red('Error:')} {error.message}")
    if error.hint:
        say(f"  {error.hint}")


def ago(timestamp_s: float) -> str:
    seconds = max(0, int(time.time() - timestamp_s))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if _coloured(sys.stdout) else text


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if _coloured(sys.stderr) else text


def _coloured(stream: Any) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")
