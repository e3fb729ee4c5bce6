"""The balance of shared CPUs: a machine is promised a sixteenth of each of its CPUs, saves what it does not use, and
runs at full speed on what it saved. Pure arithmetic; `agent/governor.py` counts with it.

Figures are those of the original's CPU scheduler: in each period of 80 ms a shared CPU earns 5 ms. A start begins with
5 s a CPU, at most 500 s are kept, and at 100 % a balance lasts `balance / (1 - 1/16)`. Balance and quota are pooled
over the machine's CPUs, so the burst lasts as long on eight as on one. All times are whole microseconds of CPU.
"""

from __future__ import annotations

PERIOD_US = 80_000
EARNED_US = 5_000
"""In each period, by each shared CPU."""
OPENING_US = 5_000_000
MOST_US = 500_000_000
DEBT_MOST_US = 1_000_000
"""What a machine used too much before anybody looked is paid back, up to this: a host whose agent was away for an hour
does not punish its machines for another."""
RESUME_US = 100_000
"""A machine that was held back goes on at full speed once it has saved so much: one that would be freed at once for the
first saved microsecond would be held back again in the next."""


def opening_us(cpus: int) -> int:
    return OPENING_US * cpus


def earned_us(cpus: int, elapsed_us: int) -> int:
    return elapsed_us * cpus * EARNED_US // PERIOD_US


def settled_us(balance_us: int, *, cpus: int, elapsed_us: int, used_us: int) -> int:
    """The balance after `elapsed_us` in which the machine used `used_us`."""
    return min(MOST_US * cpus, max(-DEBT_MOST_US * cpus, balance_us + earned_us(cpus, elapsed_us) - used_us))


def is_throttled(balance_us: int, *, cpus: int, was: bool) -> bool:
    """Held back from the moment the balance is empty until something has been saved."""
    return balance_us < RESUME_US * cpus if was else balance_us <= 0


def quota_us(cpus: int, *, throttled: bool) -> int:
    """CPU time for each period."""
    return cpus * (EARNED_US if throttled else PERIOD_US)


def unchanged_for_us(balance_us: int, *, cpus: int, throttled: bool) -> int:
    """How long at least the verdict holds, whatever the machine does: nobody has to look before."""
    if throttled:
        return max(0, (RESUME_US * cpus - balance_us) * PERIOD_US // (cpus * EARNED_US))
    return max(0, balance_us * PERIOD_US // (cpus * (PERIOD_US - EARNED_US)))
