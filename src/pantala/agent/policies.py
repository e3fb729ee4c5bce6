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
            records = [machine.record for machine in machines()]
            wanted = {record.id: self.of(record) for record in records if record.app.name in apps}
            retry_s = None
            try:
                await network.police({name: allowed for name, allowed in wanted.items() if allowed is not None})
            except PantalaError as error:
                log.warning("network policies not applied; tried again", apps=sorted(apps), error=str(error))
                self._touched |= apps
                retry_s = self._retry_s
            with anyio.move_on_after(retry_s):
                await self._changed.wait()
            await clock.sleep(GATHER_S)
