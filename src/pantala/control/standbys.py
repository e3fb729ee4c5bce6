"""Standby machines: stopped ones that are started when the host of a machine they watch is lost.

Who takes over is decided in the transaction that declares the host lost (`Hosts.withdraw`): the lost machine gets a new
generation, so its old copy never serves again, and is placed elsewhere without being started; the standby's takeover is
a row until its host has journaled the start. The standby then runs until somebody stops it.

With `standby_after_s` a silent host is declared lost by itself, but only one that runs a watched machine, and only
while most hosts answer: a control plane that is cut off must not take the cluster apart.
"""

from __future__ import annotations

import structlog

from pantala.control.certificates import Certificates
from pantala.control.context import Context
from pantala.control.hosts import Hosts
from pantala.control.moves import Moves
from pantala.control.nodes import Nodes
from pantala.errors import NotFound, PantalaError
from pantala.store import hosts, moves, standbys
from pantala.store.records import TakeoverRecord
from pantala.wire.node import StartMachine

log = structlog.get_logger()

EVERY_S = 1.0
IDLE_S = 5.0
CALL_TIMEOUT_S = 10.0
ACTOR = "pantala (standby)"


class Standbys:
    def __init__(
        self, context: Context, *, hosts: Hosts, nodes: Nodes, moves: Moves, certificates: Certificates
    ) -> None:
        self._context = context
        self._hosts = hosts
        self._nodes = nodes
        self._moves = moves
        self._certificates = certificates
        self._silent_since: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            try:
                pause_s = EVERY_S if await self.cycle() else IDLE_S
            except PantalaError as error:
                log.warning("standbys not looked after; tried again", error=error.message)
                pause_s = EVERY_S
            await self._context.clock.sleep(pause_s)

    async def cycle(self) -> bool:
        """Whether a takeover is still under way."""
        if self._context.settings.standby_after_s > 0:
            await self._lose_the_silent()
        under_way = await self._context.db.read(standbys.list_takeovers)
        for takeover in under_way:
            await self._start(takeover)
        return bool(under_way)

    async def _start(self, takeover: TakeoverRecord) -> None:
        """One request id for as long as it takes: started once."""
        standby = await self._context.db.read(lambda c: moves.get_placement(c, takeover.standby_id))
        call = StartMachine(
            request_id=f"standby-{takeover.standby_id}-{takeover.since_ms}",
            machine_id=takeover.standby_id,
            stands_for=takeover.watched_id,
        )
        try:
            if not standby.tombstone:
                await self._context.nodes.call(standby.node, call, timeout_s=CALL_TIMEOUT_S)
        except NotFound:
            log.warning("standby is gone from its host", machine=takeover.standby_id, node=standby.node)
        except PantalaError as error:
            log.warning("standby not started yet", machine=takeover.standby_id, node=standby.node, why=error.message)
            return
        await self._context.db.write(lambda c: standbys.end_takeover(c, takeover.standby_id))
        log.info("standby took over", machine=takeover.standby_id, lost=takeover.watched_id, node=standby.node)

    async def _lose_the_silent(self) -> None:
        nodes = await self._context.db.read(hosts.list_nodes)
        now = self._context.clock.monotonic()
        silent = {node.id for node in nodes if self._nodes.answering(node.id) is None}
        self._silent_since = {node_id: self._silent_since.get(node_id, now) for node_id in silent}
        if 2 * len(silent) >= len(nodes):
            return
        for node_id in await self._watched_hosts() & silent:
            if now - self._silent_since[node_id] >= self._context.settings.standby_after_s:
                log.warning("a silent host with watched machines is declared lost", node=node_id)
                await self._hosts.withdraw(node_id, "lost", actor=ACTOR, check=lambda connection: None)
                await self._certificates.ensure()
                self._moves.nudge()

    async def _watched_hosts(self) -> set[str]:
        """Those of machines that somebody stands by for."""
        found: set[str] = set()
        for _, watched in await self._context.db.read(standbys.list_standbys):
            for machine_id in watched:
                row = self._nodes.machine(machine_id)
                if row is not None and row.state == "started":
                    found.add(row.node)
        return found
