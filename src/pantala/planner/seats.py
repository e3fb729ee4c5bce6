"""On which CPUs of its host a machine runs, when it has fewer than the host: pure choices of `agent/seating.py`.

A machine that is to see one CPU has to stay on one, which takes from the kernel the choice that it makes best. So the
choice is made again where it matters: a new start goes where least is promised, and one of two machines that fight over
a CPU moves when another CPU is idle.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

BUSY = 0.9
"""Of a CPU's time, from here on its machines may be waiting for each other."""
WORTH = 0.15
"""Of a CPU's time; what would be won by less is not worth a cold cache."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """The CPUs of one machine; `weight` is what it is promised of each, nothing while it sleeps."""

    cpus: frozenset[int]
    weight: float


class Move(msgspec.Struct, frozen=True, kw_only=True):
    machine_id: str
    old: frozenset[int]
    new: frozenset[int]


def choose(host: frozenset[int], seats: Mapping[str, Seat], count: int) -> frozenset[int]:
    """The `count` CPUs of which least is promised, and of those the ones with the fewest machines, asleep or not. All
    where the host has no more."""
    if count >= len(host):
        return host
    promised = dict.fromkeys(host, 0.0)
    taken = dict.fromkeys(host, 0)
    for seat in seats.values():
        for cpu in seat.cpus & host:
            promised[cpu] += seat.weight
            taken[cpu] += 1
    return frozenset(sorted(host, key=lambda cpu: (promised[cpu], taken[cpu], cpu))[:count])


def hottest(busy: Mapping[int, float], host: frozenset[int]) -> int | None:
    """The CPU whose machines may be waiting for each other; None where there is none, or nowhere to go."""
    known = {cpu: part for cpu, part in busy.items() if cpu in host}
    if not known:
        return None
    hot = max(known, key=lambda cpu: (known[cpu], cpu))
    return hot if known[hot] >= BUSY and min(known.values()) <= known[hot] - WORTH else None


def relieve(
    hot: int, busy: Mapping[int, float], host: frozenset[int], seats: Mapping[str, Seat], used: Mapping[str, float]
) -> Move | None:
    """The machine to take away from `hot`, and where to: the busiest that leaves its new CPU less busy than `hot` was.
    `used`: CPUs that each machine used. None when nothing is better than it is: such as one machine that has a CPU for
    itself and uses all of it."""
    best: tuple[float, str, int] | None = None
    for machine_id, part in used.items():
        seat = seats.get(machine_id)
        if seat is None or hot not in seat.cpus:
            continue
        free = [cpu for cpu in host - seat.cpus if cpu in busy]
        if not free:
            continue
        cold = min(free, key=lambda cpu: (busy[cpu], cpu))
        takes = part / len(seat.cpus)
        if busy[cold] + takes <= busy[hot] - WORTH and (best is None or takes > best[0]):
            best = (takes, machine_id, cold)
    if best is None:
        return None
    _, machine_id, cold = best
    old = seats[machine_id].cpus
    return Move(machine_id=machine_id, old=old, new=old - {hot} | {cold})
