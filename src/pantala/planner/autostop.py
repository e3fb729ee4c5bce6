"""Which machines of one app and region may sleep now? Pure; the agent asks about once a second.

Default mode: every machine that has been idle for the window, down to the floor. `one_per_pass` is the documented mode
of the original (`excess` by soft limits, at most one machine a pass), kept for those who rely on it.
A machine with anything in flight is never stopped, nor one that is leased by an API caller or holds itself awake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A started machine of the app in the region. `seq` is the load sequence that the decision is based on; `held`: it
    asked to stay awake. `soft_limit` 0 means none. `idle_ms` counts from its start when it had no request yet."""

    machine: str
    in_flight: int
    seq: int
    idle_ms: int
    autostop: Literal["off", "stop", "suspend"]
    soft_limit: int = 0
    leased: bool = False
    held: bool = False


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """`floor`: machines that keep running; the caller passes 0 outside the primary region."""

    idle_window_ms: int
    floor: int = 0
    mode: Literal["all_idle", "one_per_pass"] = "all_idle"


def plan(candidates: Sequence[Candidate], rules: Rules) -> list[Candidate]:
    """The machines to drain and to stop or suspend, longest idle first."""
    sleepy = [
        candidate
        for candidate in candidates
        if candidate.autostop != "off" and not (candidate.leased or candidate.held) and candidate.in_flight == 0
    ]
    sleepy.sort(key=lambda candidate: (-candidate.idle_ms, candidate.machine))
    spare = max(len(candidates) - rules.floor, 0)
    if rules.mode == "one_per_pass":
        return sleepy[: min(_excess(candidates), spare, 1)]
    idle = [candidate for candidate in sleepy if candidate.idle_ms >= rules.idle_window_ms]
    return idle[:spare]


def why_awake(one: Candidate, candidates: Sequence[Candidate], rules: Rules) -> list[str]:
    """Why `plan` leaves this one of `candidates` alone, for people; what its owner has to look at comes first."""
    if one.autostop == "off":
        return ["auto stop is off"]
    reasons: list[str] = []
    if one.in_flight:
        reasons.append(f"{one.in_flight} request{'s' if one.in_flight > 1 else ''} or connections are open")
    if one.held:
        reasons.append("it holds itself awake")
    if one.leased:
        reasons.append("somebody holds a lease of it")
    if reasons or one in plan(candidates, rules):
        return reasons or ["nothing keeps it awake: it is about to sleep"]
    if rules.mode == "all_idle" and one.idle_ms < rules.idle_window_ms:
        return [f"it was idle for {one.idle_ms / 1000:.0f} s; it sleeps after {rules.idle_window_ms / 1000:g} s"]
    if len(candidates) <= rules.floor or rules.mode == "all_idle":
        return [f"min_machines_running keeps {rules.floor} awake, and {len(candidates)} are"]
    return ["those that run are needed, or another one sleeps first: one at a time"]


def _excess(candidates: Sequence[Candidate]) -> int:
    """Source: proxy reference, section 6. Machines beyond those above their soft limit and one more."""
    running = [candidate for candidate in candidates if candidate.autostop != "off"]
    if len(running) > 1:
        over = sum(candidate.soft_limit > 0 and candidate.in_flight >= candidate.soft_limit for candidate in running)
        return max(len(running) - (over + 1), 0)
    return 1 if running and running[0].in_flight == 0 else 0
