"""Keeps public addresses and Flycast open: which connections the host's firewall leads to the proxy. One task.

What is wanted follows from the view: addresses of apps, ports of their services, networks of apps. Changes are gathered
for a moment and applied at once; what failed is tried again after a while, and then it is also seen what has begun to
listen on the host's own address, so that no app ever takes a port from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import anyio
import structlog

from pantala.errors import PantalaError
from pantala.kit.clock import Clock
from pantala.net import Address, EntrancePlan, plan_entrances
from pantala.wire.feed import FeedRow

log = structlog.get_logger()

GATHER_S = 0.05
AGAIN_S = 10.0
RETRY_S = 1.0

Range = tuple[int, int]
T = TypeVar("T")


class Firewall(Protocol):
    """`pantala.net.Entrances`, or a test's."""

    async def apply(self, plan: EntrancePlan) -> None: ...

    async def listening(self, *addresses: str) -> set[int]: ...


class Doors:
    """`edge`: addresses at which this host takes public traffic; `own`: those that it lives at."""

    def __init__(self, firewall: Firewall, clock: Clock, *, edge: Sequence[str], own: Sequence[str]) -> None:
        self._firewall = firewall
        self._clock = clock
        self._edge = list(edge)
        self._own = list(own)
        self._shares_own = bool(set(edge) & set(own))
        self._addresses: dict[str, dict[str, Any]] = {}
        self._networks: dict[str, int] = {}
        self._ports: dict[str, list[Range]] = {}
        self._changed = anyio.Event()

    def take(self, rows: Iterable[FeedRow]) -> None:
        """Rows of the view that changed; called as they do."""
        touched = False
        for row in rows:
            kind, _, name = row.key.partition("/")
            if row.stream != "routes":
                continue
            if kind == "addr":
                touched |= _keep(self._addresses, name, row.value)
            elif kind == "app":
                touched |= _keep(self._networks, name, row.value["network"] if row.value else None)
            elif kind == "svc" and self._shares_own:
                touched |= _keep(self._ports, name, _declared(row.value) if row.value else None)
        if touched:
            self._changed.set()

    async def run(self) -> None:
        shown: EntrancePlan | None = None
        while True:
            self._changed = anyio.Event()
            pause_s = AGAIN_S
            try:
                plan = await self.plan()
                if plan != shown:
                    await self._firewall.apply(plan)
                    shown = plan
                    log.info("entrances", elements={name: len(found) for name, found in plan.elements.items()})
            except PantalaError as error:
                log.warning("entrances not made; tried again", error=str(error))
                pause_s, shown = RETRY_S, None
            with anyio.move_on_after(pause_s):
                await self._changed.wait()
            await self._clock.sleep(GATHER_S)

    async def plan(self) -> EntrancePlan:
        used = await self._firewall.listening(*self._own) if self._shares_own else set[int]()
        return plan_entrances(
            self._shown(),
            edge=self._edge,
            own=self._own,
            declared=[part for ports in self._ports.values() for part in ports],
            used=used,
        )

    def _shown(self) -> list[Address]:
        found: list[Address] = []
        for ip, value in self._addresses.items():
            private = value["kind"] == "private"
            network = value.get("network") or self._networks.get(value.get("app") or "", 0)
            found.append(Address(ip=ip, private=private, network=network))
        return found


def _keep(known: dict[str, T], name: str, value: T | None) -> bool:
    """Whether it is another value than before."""
    before = known.pop(name, None)
    if value is not None:
        known[name] = value
    return before != value


def _declared(value: dict[str, Any]) -> list[Range]:
    if value["protocol"] != "tcp":
        return []
    found: list[Range] = []
    for port in value["ports"]:
        first = port.get("port") or port.get("start_port")
        if first:
            found.append((first, first if port.get("port") else port.get("end_port") or first))
    return found
