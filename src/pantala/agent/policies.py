"""Network policies on this host: what each of its machines may exchange, and the task that makes the firewall agree.

Policies come with the view, as rows of an app. A machine meets them when its network is made (`Body.prepare`, the same
transaction of the firewall as the rest); those that are there already get what changed at once, without a restart:
after a change of the rows, or of a machine's metadata. What failed is tried again after a while.

Of an app that the view does not show (it was deleted and its machines are on their way out, or this host has heard
nothing yet) nothing is known, and its machines keep what they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
import msgspec
import structlog

from pantala.agent.ports import Network
from pantala.domain import policies
from pantala.domain.policies import Allowed
from pantala.errors import PantalaError
from pantala.journal import MachineRecord
from pantala.kit.clock import Clock
from pantala.wire.catalogue import PolicyRow
from pantala.wire.feed import FeedRow

log = structlog.get_logger()

GATHER_S = 0.02
RETRY_S = 1.0


class Machine(Protocol):
    @property
    def record(self) -> MachineRecord: ...


class Policies:
    def __init__(self, *, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._apps: set[str] = set()
        self._rows: dict[str, dict[str, PolicyRow]] = {}
        self._touched: set[str] = set()
        self._changed = anyio.Event()

    def take(self, rows: Iterable[FeedRow]) -> None:
        """Rows of the view that changed; called as they do."""
        for row in rows:
            kind, _, name = row.key.partition("/")
            if (row.stream, kind) == ("routes", "app"):
                (self._apps.discard if row.value is None else self._apps.add)(name)
            elif (row.stream, kind) == ("routes", "policy"):
                app = name.partition("/")[0]
                known = self._rows.setdefault(app, {})
                known.pop(row.key, None)
                if row.value is not None:
                    known[row.key] = msgspec.convert(row.value, PolicyRow)
                elif not known:
                    del self._rows[app]
            else:
                continue
            self.touch(name.partition("/")[0])

    def touch(self, app: str) -> None:
        """Machines of the app are looked at again: a policy, or what policies select by, has changed."""
        self._touched.add(app)
        self._changed.set()

    def of(self, record: MachineRecord) -> Allowed | None:
        """None: nothing is known of its app."""
        app = record.app.name
        if app not in self._apps:
            return None
        return policies.allowed(self._rows.get(app, {}).values(), record.id, record.version.config.metadata or {})

    async def run(self, network: Network, clock: Clock, machines: Callable[[], Iterable[Machine]]) -> None:
        """`machines`: of this host. Looks at all of them at first."""
        self._touched |= self._apps
        while True:
            self._changed = anyio.Event()
            apps, self._touched = self._touched, set()
            failed = await self._apply(network, [one for one in machines() if one.record.app.name in apps])
            self._touched |= failed
            with anyio.move_on_after(self._retry_s if failed else None):
                await self._changed.wait()
            await clock.sleep(GATHER_S)

    async def _apply(self, network: Network, machines: list[Machine]) -> set[str]:
        """Apps that have to be looked at again."""
        failed: set[str] = set()
        for machine in machines:
            record = machine.record  # as it is now: it may have met another version since
            allowed = self.of(record)
            if allowed is None:
                continue
            try:
                await network.police(record.id, allowed)
            except PantalaError as error:
                failed.add(record.app.name)
                log.warning("network policies not applied; tried again", machine=record.id, error=str(error))
        return failed
