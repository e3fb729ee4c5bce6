"""Machines of this host that a loop has to look at. Found anew only after a record has changed, so that hundreds of
sleeping machines cost the loops that run every second (`idle.py`, `schedules.py`, `governor.py`, …) nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from pantala.agent.host import Host
from pantala.agent.machine import MachineTask
from pantala.journal import MachineRecord


class Subset:
    """`wanted` sees nothing but the record: what changes by time alone is its user's to check."""

    def __init__(self, host: Host, wanted: Callable[[MachineRecord], bool]) -> None:
        self._host = host
        self._wanted = wanted
        self._found: list[MachineTask] = []
        self._revision = -1

    def tasks(self) -> list[MachineTask]:
        if self._revision != self._host.revision:
            self._revision = self._host.revision
            self._found = [task for task in self._host.machines.values() if self._wanted(task.record)]
        return self._found
