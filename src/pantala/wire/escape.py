"""What became of attempts to get out of a machine: the escape suite of a host (`agent/escape.py` makes it).

`pantala-init escape` makes the attempts (`crates/pantala-init/src/escape/mod.rs`); the names are its own.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class EscapeAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """`held`: the kernel refused it, by the errno in `detail`. `not_applicable`: this host has nothing that it aims at,
    so a refusal would prove nothing. `unclear`: it ended in a way that says nothing."""

    name: str
    outcome: Literal["held", "through", "unclear", "not_applicable"]
    detail: str


class EscapeSuite(msgspec.Struct, frozen=True, kw_only=True):
    """The last suite of a host. `version`: of the platform whose attempts they were. `through` and `unclear` are
    names. `outdated`: what of the isolation has changed since, so that it may not hold any more."""

    ran_at: str
    version: str
    attempts: int
    held: int
    not_applicable: int
    through: list[str]
    unclear: list[str]
    outdated: list[str]


class EscapeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it, attempt by attempt; `suite` is null when none was ever run on this host."""

    host: str
    suite: EscapeSuite | None
    attempts: list[EscapeAttempt]
