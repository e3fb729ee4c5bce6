"""What happens after a machine exited by itself (`reference` words: no, always, on-failure). Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pantala.wire.machine import Restart

WINDOW_S = 300.0
MAX_RETRIES = 10
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 30.0
POLICIES = ("no", "always", "on-failure")


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """Start it after `delay_s`; `count` restarts, this one included, fell into the window."""

    delay_s: float
    count: int


class Stay(msgspec.Struct, frozen=True, kw_only=True):
    """It remains stopped."""

    reason: str


def after_exit(
    restart: Restart | None, *, exit_code: int, requested: bool, restarts_ms: Sequence[int], now_ms: int
) -> Again | Stay:
    """Restart or remain. `restarts_ms`: when the last restarts happened; those outside the window do not count.

    `always` never gives up, only slows down; `on-failure` gives up after `max_retries` within the window.
    """
    policy = (restart.policy if restart else None) or "on-failure"
    if requested:
        return Stay(reason="stopped on request")
    if policy == "no":
        return Stay(reason=f"exited with code {exit_code}; its restart policy is no")
    if policy == "on-failure" and exit_code == 0:
        return Stay(reason="exited with code 0")
    recent = [moment for moment in restarts_ms if now_ms - moment < WINDOW_S * 1000]
    retries = restart.max_retries if restart and restart.max_retries is not None else MAX_RETRIES
    if policy == "on-failure" and len(recent) >= retries:
        return Stay(
            reason=f"exited with code {exit_code} after {len(recent)} restarts within {WINDOW_S / 60:g} minutes"
        )
    delay_s = min(FIRST_DELAY_S * 2 ** min(len(recent), 16), MAX_DELAY_S)
    return Again(delay_s=delay_s, count=len(recent) + 1)
