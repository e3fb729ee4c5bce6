"""Another size for the machines of a group, as a value: `scale vm` and `scale memory` print it, ask, and give its waves
to `deploys/executor.py`. Pure.

CPUs and memory are changed apart: other CPUs keep the memory as far as they may have it, other memory keeps the CPUs (a
stock flyctl goes back to the preset's least memory with `scale vm`, which a user of ours can say with `--memory`).
Machines that run are updated one after the other, each well before the next; sleeping ones sleep on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pantala.domain import guests
from pantala.errors import InvalidRequest
from pantala.planner.deploy import COLD_AT_ONCE, WARM_STATES, Plan, Update, Wave, group_of
from pantala.planner.scale import GONE
from pantala.wire.machine import Guest, Machine, MachineConfig


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One machine to another size; equal sizes need nothing."""

    machine_id: str
    warm: bool
    config: MachineConfig
    before: guests.Size
    after: guests.Size


class ResizePlan(msgspec.Struct, frozen=True, kw_only=True):
    """`unreachable`: machines whose config nobody can read now; they stay as they are."""

    group: str
    changes: list[Change]
    settled: int
    unreachable: list[str]

    def lines(self) -> list[str]:
        lines = [f"{self.group}: {_count(self.settled)} already of that size"] if self.settled else []
        for change in self.changes:
            how = "restarts" if change.warm else "stays asleep"
            lines.append(f"{self.group}: {change.machine_id} {told(change.before)} -> {told(change.after)} ({how})")
        lines += [f"{self.group}: {name} is not in reach and stays as it is" for name in self.unreachable]
        return lines

    def plan(self, metadata: Mapping[str, str]) -> Plan:
        """Steps of a release; `metadata` names it on each machine."""
        waves: list[Wave] = []
        for change in (c for c in self.changes if c.warm):
            title = f"{self.group}: {change.machine_id} becomes {told(change.after)}"
            waves.append(Wave(title=title, actions=[_update(self.group, change, metadata)]))
        cold = [c for c in self.changes if not c.warm]
        for start in range(0, len(cold), COLD_AT_ONCE):
            part = cold[start : start + COLD_AT_ONCE]
            title = f"{self.group}: {_count(len(part))} asleep, without starting"
            waves.append(Wave(title=title, actions=[_update(self.group, c, metadata) for c in part], check=False))
        return Plan(waves=waves, strategy="rolling")


def plan_resize(
    *, machines: Sequence[Machine], group: str | None, size: str | None = None, memory_mb: int | None = None
) -> ResizePlan:
    """Raises InvalidRequest for sizes that do not exist, before anything is changed."""
    wanted = guests.preset(size, field="SIZE") if size is not None else None
    present = [machine for machine in machines if machine.state not in GONE]
    name = group or _only_group(present)
    members = [machine for machine in present if group_of(machine) == name]
    if not members:
        raise InvalidRequest(
            f"No active machines in process group '{name}', check `pantala status` output", field="group"
        )
    changes: list[Change] = []
    unreachable: list[str] = []
    settled = 0
    for machine in sorted(members, key=lambda member: member.id):
        if machine.config is None:
            unreachable.append(machine.id)
            continue
        before = guests.resolve(machine.config)
        after = resized(before, wanted, memory_mb)
        if after == before:
            settled += 1
            continue
        guest = msgspec.structs.replace(
            machine.config.guest or Guest(),
            cpu_kind=after.cpu_kind,
            cpus=after.cpus,
            memory_mb=after.memory_mb,
            max_memory_mb=None,
        )
        config = msgspec.structs.replace(machine.config, size=None, guest=guest)
        warm = machine.state in WARM_STATES
        changes.append(Change(machine_id=machine.id, warm=warm, config=config, before=before, after=after))
    return ResizePlan(group=name, changes=changes, settled=settled, unreachable=unreachable)


def resized(before: guests.Size, wanted: guests.Size | None, memory_mb: int | None) -> guests.Size:
    """The size of one machine afterwards. Raises InvalidRequest when its CPUs may not have that memory."""
    kind, cpus = (wanted.cpu_kind, wanted.cpus) if wanted else (before.cpu_kind, before.cpus)
    low, high = guests.memory_bounds(kind, cpus)
    memory = memory_mb if memory_mb is not None else min(high, max(low, before.memory_mb))
    after = msgspec.structs.replace(before, cpu_kind=kind, cpus=cpus, memory_mb=memory)
    guests.check_memory(after, field="memory")
    return after


def told(size: guests.Size) -> str:
    return f"{size.name} {size.memory_mb} MB"


# -- footnotes -------------------------------------------------------------------------------------------------------


def _only_group(present: Sequence[Machine]) -> str:
    """The group of an app that has one. Raises InvalidRequest."""
    groups = sorted({group_of(machine) for machine in present})
    if len(groups) > 1:
        raise InvalidRequest(
            "scaling an app with multiple process groups requires specifying a group with '--group <name>'",
            field="group",
            hint=f"this app has the following process groups: {', '.join(groups)}",
        )
    return groups[0] if groups else "app"


def _update(group: str, change: Change, metadata: Mapping[str, str]) -> Update:
    config = msgspec.structs.replace(change.config, metadata=(change.config.metadata or {}) | dict(metadata))
    return Update(machine_id=change.machine_id, group=group, config=config, warm=change.warm)


def _count(number: int) -> str:
    return "1 machine" if number == 1 else f"{number} machines"
