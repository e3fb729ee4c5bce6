"""Where an owner of catalogue rows puts them; the catalogue's publisher implements it, fakes record it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Row(NamedTuple):
    """`value` None deletes."""

    stream: str
    key: str
    value: dict[str, Any] | None


class RowSink(Protocol):
    async def put(self, rows: Sequence[Row]) -> int:
        """Make these the owner's newest rows, in one step; the sequence after it. Unchanged rows cost nothing."""
        ...

    async def replace_all(self, rows: Sequence[Row]) -> int:
        """Make these the owner's only rows: what is missing is deleted."""
        ...
