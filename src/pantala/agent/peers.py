"""Keeps the ways to the other hosts as the view says: routes, tunnels and firewall of 6PN. One task of the agent.

A network counts as being on a host while one of its machines has a row there, asleep or not, so that a wake finds its
ways made. Changes are gathered for a moment and applied at once; what failed, or was undone by somebody else (a tunnel
program that began anew), is made again after a while. While nothing changes no program runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address
from typing import Any, Protocol

import anyio
import structlog

from pantala.errors import PantalaError
from pantala.kit.clock import Clock
from pantala.net import Peer, PeerNode, plan_peers, sixpn
from pantala.wire.feed import FeedRow

log = structlog.get_logger()

GATHER_S, GATHER_PER_HOST_S, GATHER_S_MAX = 0.05, 0.01, 0.5
"""An app that grows over many hosts changes the ways of each of them as often as there are hosts."""
AGAIN_S = 10.0
ANEW_EVERY = 30
"""Looks after which the ways are made again although they seem to stand: not all of them can be seen for little."""
RETRY_S = 1.0


class Links(Protocol):
    """`pantala.net.PeerLinks`, or a test's."""

    async def apply(self, peers: Sequence[Peer], *, anew: bool = False) -> None: ...


class Peers:
    def __init__(self, node: str, links: Links, clock: Clock) -> None:
        self._node = node
        self._links = links
        self._clock = clock
        self._nodes: dict[str, PeerNode] = {}
        self._machines: dict[str, tuple[str, int]] = {}
        self._changed = anyio.Event()

    def take(self, rows: Iterable[FeedRow]) -> None:
        """Rows of the view that changed; called as they do."""
        touched = False
        for row in rows:
            kind, _, name = row.key.partition("/")
            if (row.stream, kind) == ("routes", "m"):
                touched |= self._take_machine(name, row.value)
            elif (row.stream, kind) == ("nodes", "node"):
                touched |= self._take_node(name, row.value)
        if touched:
            self._changed.set()

    async def run(self) -> None:
        shown: int | None = None
        looks, anew = 0, False
        while True:
            self._changed = anyio.Event()
            peers = self.plan()
            pause_s = AGAIN_S
            try:
                await self._links.apply(peers, anew=anew)
            except PantalaError as error:
                log.warning("ways to other hosts not made; tried again", error=str(error))
                pause_s = RETRY_S
            else:
                ways = sum(len(peer.prefixes) for peer in peers)
                if ways != shown:
                    shown = ways
                    log.info("ways to other hosts", hosts=len(peers), ways=ways)
            with anyio.move_on_after(pause_s) as waited:
                await self._changed.wait()
            looks += waited.cancelled_caught
            anew = waited.cancelled_caught and looks % ANEW_EVERY == 0
            await self._clock.sleep(min(GATHER_S + GATHER_PER_HOST_S * len(self._nodes), GATHER_S_MAX))

    def plan(self) -> tuple[Peer, ...]:
        networks: dict[str, set[int]] = {}
        for node, network in self._machines.values():
            networks.setdefault(node, set()).add(network)
        return plan_peers(self._node, self._nodes.values(), networks)

    def _take_machine(self, name: str, value: dict[str, Any] | None) -> bool:
        """Whether networks may be elsewhere than before."""
        before = self._machines.pop(name, None)
        if value is not None:
            try:
                network = sixpn.network_of(IPv6Address(value["ip6"]))
            except ValueError:
                return before is not None  # no address yet, or none of ours
            self._machines[name] = (value["node"], network)
        return self._machines.get(name) != before

    def _take_node(self, name: str, value: dict[str, Any] | None) -> bool:
        before = self._nodes.pop(name, None)
        if value is not None:
            key, endpoint = value.get("wireguard_key", ""), value.get("wireguard", "")
            self._nodes[name] = PeerNode(id=name, key=key, endpoint=endpoint)
        return self._nodes.get(name) != before
