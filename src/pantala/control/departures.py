"""Hosts are drained, removed and declared lost: what an operator asks, and how far it is.

Removing and losing are one transaction each (`Hosts.withdraw`): after it nothing that the host says counts, and its
machines without volumes look for other hosts. `moves` does the rest.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from sqlalchemy import Connection

from pantala.auth.grants import Principal
from pantala.control.access import Access
from pantala.control.certificates import Certificates
from pantala.control.context import Context
from pantala.control.hosts import Hosts
from pantala.control.moves import VOLUMES, Moves
from pantala.control.nodes import Nodes
from pantala.control.publication import Publication
from pantala.errors import Conflict, NotFound
from pantala.store import apps, hosts, moves
from pantala.store.records import MoveRecord, NodeRecord, PlacementRecord
from pantala.wire.hosts import HostDeparture, LeavingMachine

LOST_VOLUMES = "it had a volume on this host"


class Departures:
    def __init__(
        self,
        context: Context,
        access: Access,
        *,
        hosts: Hosts,
        nodes: Nodes,
        moves: Moves,
        publication: Publication,
        certificates: Certificates,
    ) -> None:
        self._context = context
        self._access = access
        self._hosts = hosts
        self._nodes = nodes
        self._moves = moves
        self._publication = publication
        self._certificates = certificates

    async def drain(self, principal: Principal, host: str, *, undo: bool) -> HostDeparture:
        """No new machines; those that are there move away one by one. With `undo` it takes machines again, and what is
        on its way goes on."""
        await self._access.operator(principal)
        before, after = ("draining", "active") if undo else ("active", "draining")

        def change(connection: Connection) -> None:
            node = _find(connection, host)
            if node.status not in hosts.MEMBERS:
                raise Conflict(f"{host} is {node.status}", hint="a host that left takes no machines any more")
            if node.status == before:
                hosts.update_node(connection, host, status=after)
                self._audit(connection, principal, "host.undrain" if undo else "host.drain", host)

        await self._context.db.write(change)
        self._nodes.changed()
        await self._publication.publish_members()
        self._moves.nudge()
        return await self.progress(principal, host)

    async def lose(self, principal: Principal, host: str) -> HostDeparture:
        """It is gone for good. A host that comes back joins with a new id; its old copies never start again."""
        return await self._withdraw(principal, host, "lost", force=True)

    async def remove(self, principal: Principal, host: str, *, force: bool) -> HostDeparture:
        """Refused while machines are on it; with `force` they are treated as those of a lost host."""
        return await self._withdraw(principal, host, "removed", force=force)

    async def progress(self, principal: Principal, host: str) -> HostDeparture:
        """What is still on the host or on its way from it, and what keeps it."""
        await self._access.operator(principal)

        def load(
            connection: Connection,
        ) -> tuple[NodeRecord, list[PlacementRecord], list[MoveRecord], dict[int, str]]:
            node = _find(connection, host)
            placed = moves.list_placed_on(connection, host)
            leaving = [move for move in moves.list_moves(connection) if move.source == host]
            known = {placement.machine_id for placement in placed}
            placed += [
                moves.get_placement(connection, move.machine_id) for move in leaving if move.machine_id not in known
            ]
            names = {p.app_id: apps.get_app_by_id(connection, p.app_id).name for p in placed}
            return node, placed, leaving, names

        node, placed, leaving, names = await self._context.db.read(load)
        on_their_way = {move.machine_id: move for move in leaving}
        found = [
            self._leaving(node, placement, on_their_way.get(placement.machine_id), names[placement.app_id])
            for placement in placed
        ]
        status = msgspec.convert(node.status, Literal["active", "draining", "lost", "removed"])
        return HostDeparture(host=host, status=status, machines=found)

    def _leaving(
        self, node: NodeRecord, placement: PlacementRecord, move: MoveRecord | None, app: str
    ) -> LeavingMachine:
        reason = self._moves.reasons.get(placement.machine_id, "")
        gone = node.status not in hosts.MEMBERS
        state: Literal["waiting", "moving", "stays"] = "waiting"
        target = ""
        if move is not None and move.target is not None and move.phase != "undo":
            state, target = "moving", move.target
        elif moves.has_volumes(placement):
            state, reason = "stays", LOST_VOLUMES if gone else VOLUMES
        elif reason or node.status == "active":
            state = "stays"
        return LeavingMachine(
            id=placement.machine_id, app=app, region=placement.region, state=state, target=target, reason=reason
        )

    async def _withdraw(
        self, principal: Principal, host: str, status: Literal["lost", "removed"], *, force: bool
    ) -> HostDeparture:
        await self._access.operator(principal)

        def check(connection: Connection) -> None:
            if len(hosts.list_nodes(connection)) == 1:
                raise Conflict(f"{host} is the last host of this cluster")
            there = len(moves.list_placed_on(connection, host))
            leaving = sum(host in (move.source, move.target) for move in moves.list_moves(connection))
            if not force and there + leaving:
                raise Conflict(
                    f"{host} has {there} machine{'s' * (there != 1)}"
                    if there
                    else f"machines are still leaving {host}",
                    hint=f"`pantala host drain {host}` moves them; with --force they are treated as lost",
                )

        await self._hosts.withdraw(host, status, actor=principal.email, check=check)
        await self._certificates.ensure()
        self._moves.nudge()
        return await self.progress(principal, host)

    def _audit(self, connection: Connection, principal: Principal, action: str, target: str) -> None:
        self._context.audit(
            connection,
            actor=principal.email,
            org_id=None,
            action=action,
            target=target,
        )


def _find(connection: Connection, host: str) -> NodeRecord:
    node = hosts.find_node(connection, host)
    if node is None:
        raise NotFound(f"there is no host {host}", hint="`pantala host list` shows them")
    return node
