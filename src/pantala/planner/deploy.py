"""A deploy as a value: from what is and what should be to steps, in the order in which they are taken.

Rolling is the default: groups one after the other; sleeping machines are updated without being started, but for one
spearhead per group, which is started, checked and put back; of the running ones the first goes alone, then as many at
once as `max_unavailable` allows, as flyctl's `internal/command/deploy` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from pantala.domain.process import process_group
from pantala.errors import InvalidRequest
from pantala.wire.machine import Machine, MachineConfig

COLD_AT_ONCE = 30
IMMEDIATE_AT_ONCE = 8
WARM_STATES = frozenset({"started", "starting", "restarting", "replacing", "updating"})


class Create(msgspec.Struct, frozen=True, kw_only=True, tag="create"):
    """One new machine of a group; `standby` machines do not exist yet in this version."""

    group: str
    region: str
    config: MachineConfig


class Update(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    """One machine to a new config. `spearhead`: asleep, but started, checked and put back to sleep."""

    machine_id: str
    group: str
    config: MachineConfig
    warm: bool
    spearhead: bool = False


class Destroy(msgspec.Struct, frozen=True, kw_only=True, tag="destroy"):
    machine_id: str
    group: str


class ReleaseCommand(msgspec.Struct, frozen=True, kw_only=True, tag="release_command"):
    config: MachineConfig
    region: str
    timeout_s: float


Action = Create | Update | Destroy | ReleaseCommand


class Wave(msgspec.Struct, frozen=True, kw_only=True):
    """Actions taken together; the next wave begins when all are done and well."""

    title: str
    actions: list[Action]
    check: bool = True


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    waves: list[Wave]
    strategy: Literal["rolling", "immediate"]

    def lines(self) -> list[str]:
        """For `--dry-run` and for asking: one line a wave."""
        return [f"{number}. {wave.title}" for number, wave in enumerate(self.waves, start=1)]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What one group should run from."""

    group: str
    config: MachineConfig


def plan_deploy(
    *,
    machines: Sequence[Machine],
    wanted: Sequence[Wanted],
    primary_region: str,
    strategy: str,
    max_unavailable: float,
    high_availability: bool,
    release_command: ReleaseCommand | None = None,
) -> Plan:
    """Steps from the app's machines to `wanted`. Machines that a deploy does not manage are left alone."""
    if strategy not in ("rolling", "immediate"):
        raise InvalidRequest(
            f"the strategy {strategy} is not supported yet; use rolling or immediate", field="deploy.strategy"
        )
    if not 0 < max_unavailable < math.inf:
        raise InvalidRequest(
            "must be above 0: a number of machines, or a fraction of a group below 1", field="deploy.max_unavailable"
        )
    managed = [m for m in machines if managed_by_deploy(m)]
    waves: list[Wave] = []
    if release_command is not None:
        waves.append(Wave(title="run the release command", actions=[release_command], check=False))
    groups = {want.group for want in wanted}
    if gone := [m for m in managed if group_of(m) not in groups]:
        names = ", ".join(sorted({group_of(m) for m in gone}))
        waves.append(
            Wave(
                title=f"destroy {_count(len(gone))} of removed groups: {names}",
                actions=[Destroy(machine_id=m.id, group=group_of(m)) for m in gone],
                check=False,
            )
        )
    for want in wanted:
        present = sorted((m for m in managed if group_of(m) == want.group), key=lambda m: m.id)
        if not present:
            count = first_count(want.config, high_availability=high_availability)
            create = Create(group=want.group, region=primary_region, config=want.config)
            title = f"{want.group}: create {_count(count)} in {primary_region}"
            waves.append(Wave(title=title, actions=[create] * count))
        elif strategy == "immediate":
            waves += _immediate(want, present)
        else:
            waves += _rolling(want, present, max_unavailable)
    return Plan(waves=waves, strategy="immediate" if strategy == "immediate" else "rolling")


def first_count(config: MachineConfig, *, high_availability: bool) -> int:
    """How many machines a new group gets: two with services, one with a volume or without services."""
    return 2 if high_availability and config.services and not config.mounts else 1


def managed_by_deploy(machine: Machine) -> bool:
    metadata = (machine.config or machine.incomplete_config or MachineConfig()).metadata or {}
    return metadata.get("fly_platform_version") == "v2" and machine.state not in ("destroyed", "destroying")


def group_of(machine: Machine) -> str:
    return process_group((machine.config or machine.incomplete_config or MachineConfig()).metadata)


def at_once(count: int, max_unavailable: float) -> int:
    """Machines of a group that may be away together: a number from 1 up, or a fraction of the group."""
    if max_unavailable >= 1:
        return max(1, min(count, int(max_unavailable)))
    return max(1, math.ceil(count * max_unavailable))


def _rolling(want: Wanted, present: Sequence[Machine], max_unavailable: float) -> list[Wave]:
    warm = [m for m in present if m.state in WARM_STATES]
    cold = [m for m in present if m.state not in WARM_STATES]
    waves: list[Wave] = []
    if cold and not warm:
        first, *cold = cold
        update = _update(want, first, warm=False, spearhead=True)
        waves.append(Wave(title=f"{want.group}: update {first.id} (asleep), start it to check it", actions=[update]))
    if warm:
        first, *rest = warm
        waves.append(Wave(title=f"{want.group}: update {first.id} first", actions=[_update(want, first, warm=True)]))
        size = at_once(len(warm), max_unavailable)
        for part in _chunks(rest, size):
            waves.append(
                Wave(
                    title=f"{want.group}: update {', '.join(m.id for m in part)}",
                    actions=[_update(want, m, warm=True) for m in part],
                )
            )
    for part in _chunks(cold, COLD_AT_ONCE):
        waves.append(
            Wave(
                title=f"{want.group}: update {_count(len(part))} asleep, without starting",
                actions=[_update(want, m, warm=False) for m in part],
                check=False,
            )
        )
    return waves


def _immediate(want: Wanted, present: Sequence[Machine]) -> list[Wave]:
    return [
        Wave(
            title=f"{want.group}: update {_count(len(part))} at once, unchecked",
            actions=[_update(want, m, warm=m.state in WARM_STATES) for m in part],
            check=False,
        )
        for part in _chunks(present, IMMEDIATE_AT_ONCE)
    ]


def _update(want: Wanted, machine: Machine, *, warm: bool, spearhead: bool = False) -> Update:
    """The new config on an existing machine; what only the machine knows (its volume) stays."""
    config = want.config
    if machine.config and machine.config.mounts and config.mounts:
        config = msgspec.structs.replace(config, mounts=machine.config.mounts)
    return Update(machine_id=machine.id, group=want.group, config=config, warm=warm, spearhead=spearhead)


def _chunks(items: Sequence[Machine], size: int) -> list[Sequence[Machine]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _count(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"
