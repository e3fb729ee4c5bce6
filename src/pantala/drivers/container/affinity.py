"""On which of the host's CPUs a machine runs: the kernel's affinity of each of its threads, which new ones inherit.

A control group of CPUs would say the same in one write, but not every host delegates one, and with version 1 such a
write stops the scheduler of the whole host for milliseconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

PASSES_MAX = 4
"""Threads begun while others were moved are found by looking again."""


def cpus_of(pid: int) -> frozenset[int] | None:
    """None where there is no such process."""
    try:
        return frozenset(os.sched_getaffinity(pid))
    except ProcessLookupError:
        return None


def move(threads: Callable[[], Iterable[int]], old: frozenset[int], new: frozenset[int]) -> int:
    """Those that run on `old`; how many. A thread that chose fewer CPUs for itself keeps its choice."""
    moved: set[int] = set()
    for _ in range(PASSES_MAX):
        found = {tid for tid in threads() if tid not in moved and cpus_of(tid) == old}
        if not found:
            break
        for tid in found:
            with contextlib.suppress(OSError):  # it ended, or the host lost a CPU
                os.sched_setaffinity(tid, new)
        moved |= found
    return len(moved)
