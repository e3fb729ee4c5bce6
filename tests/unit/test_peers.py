"""Which /80 goes where, as rows of the view come and go."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv6Network
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.agent.peers import AGAIN_S, Peers
from pantala.errors import DriverError
from pantala.kit.clock import SystemClock
from pantala.net import Peer, PeerNode, plan_peers, sixpn
from pantala.net.peers import route_lines, routes_by, wireguard_configuration
from pantala.net.rules import set_peers
from pantala.testing.poll import until
from pantala.wire.feed import FeedRow

NODES = ["iad-1", "lhr-1", "nrt-1", "syd-1"]
PREFIX = "fdaa:0:7:47b0:2c6d::/80"  # network 7 on lhr-1


def node(name: str) -> PeerNode:
    return PeerNode(id=name, key=f"key of {name}", endpoint=f"{name}:51820")


@given(st.dictionaries(st.sampled_from(NODES), st.sets(st.integers(1, 5)), max_size=4))
def test_a_prefix_is_behind_the_host_that_has_it_and_only_networks_of_ours_are(networks: dict[str, set[int]]) -> None:
    peers = plan_peers("iad-1", map(node, NODES), networks)
    for peer in peers:
        assert peer.node.id != "iad-1"
        shared = networks.get("iad-1", set()) & networks.get(peer.node.id, set())
        assert len(peer.prefixes) == len(shared)
        assert peer.calls == bool(shared and peer.node.id > "iad-1")
        for prefix in map(IPv6Network, peer.prefixes):
            assert sixpn.network_of(prefix.network_address) in shared
            assert prefix == sixpn.host_prefix(sixpn.network_of(prefix.network_address), sixpn.host_id(peer.node.id))
    prefixes = [prefix for peer in peers for prefix in peer.prefixes]
    assert len(prefixes) == len(set(prefixes))


def test_a_tunnel_allows_exactly_the_prefixes() -> None:
    far, behind_nat, keyless = (
        Peer(node=node("lhr-1"), prefixes=(PREFIX,), calls=True),
        Peer(node=PeerNode(id="nrt-1", key="other"), prefixes=("fdaa:0:7:1:1::/80", "fdaa:0:8:1:1::/80")),
        Peer(node=PeerNode(id="syd-1"), prefixes=("fdaa:0:7:2:2::/80",)),
    )
    text = wireguard_configuration("secret", 51820, [far, behind_nat, keyless])
    assert text.count("[Peer]") == 2
    assert f"AllowedIPs = {PREFIX}\nEndpoint = lhr-1:51820\nPersistentKeepalive = 25\n" in text
    assert text.endswith("AllowedIPs = fdaa:0:7:1:1::/80, fdaa:0:8:1:1::/80\n")


def test_exactly_one_of_two_hosts_calls_and_one_behind_nat_does() -> None:
    networks = {"iad-1": {7}, "lhr-1": {7}, "nrt-1": {7}}
    nodes = [node("iad-1"), node("lhr-1"), PeerNode(id="nrt-1", key="key")]

    def calls(own: str) -> list[str]:
        return [peer.node.id for peer in plan_peers(own, nodes, networks) if peer.calls]

    assert (calls("iad-1"), calls("lhr-1"), calls("nrt-1")) == (["lhr-1"], [], ["iad-1", "lhr-1"])


def test_routes_and_firewall_are_what_is_wanted() -> None:
    assert route_lines("eth0", "fd96::1", {"a/80"}, {"a/80", "b/80"}) == [
        "route del b/80 proto 201",
        "route replace a/80 via fd96::1 dev eth0 proto 201",
    ]
    assert route_lines("wg0", "", {"a/80"}, set()) == ["route replace a/80 dev wg0 proto 201"]
    assert set_peers("wg0", []) == "flush set inet pantala peers6\n"
    assert set_peers("wg0", ["a/80"]).endswith('add element inet pantala peers6 { "wg0" . a/80 }\n')


def test_routes_are_read_from_the_kernels_table() -> None:
    none = "0" * 32
    table = f"""\
fdaa0000000747b02c6d000000000000 50 {none} 00 fd96000000000001 00000400 00000001 00000000 00000003     eth0
fe800000000000000000000000000000 40 {none} 00 {none} 00000100 00000001 00000000 00000001      wg0
"""
    assert routes_by("eth0", table) == {PREFIX}
    assert routes_by("wg0", table) == {"fe80::/64"}
    assert routes_by("eth1", table) == set()


class Recorded:
    """Keeps what it was told; refuses the first `refusals` times."""

    def __init__(self, refusals: int = 0) -> None:
        self.told: list[tuple[Peer, ...]] = []
        self._refusals = refusals

    async def apply(self, peers: Sequence[Peer], *, anew: bool = False) -> None:
        del anew
        await anyio.lowlevel.checkpoint()
        self.told.append(tuple(peers))
        if len(self.told) <= self._refusals:
            raise DriverError("not yet", retry=True)


def machine(name: str, where: str, network: int) -> FeedRow:
    ip6 = str(sixpn.machine_address(network, sixpn.host_id(where), 5))
    return FeedRow(stream="routes", key=f"m/{name}", value={"node": where, "ip6": ip6})


def peers_of(*rows: FeedRow, links: Recorded | None = None) -> Peers:
    peers = Peers("iad-1", links or Recorded(), SystemClock())
    peers.take([FeedRow(stream="nodes", key=f"node/{name}", value={"id": name}) for name in NODES])
    peers.take(rows)
    return peers


def prefixes(peers: Peers) -> dict[str, tuple[str, ...]]:
    return {peer.node.id: peer.prefixes for peer in peers.plan() if peer.prefixes}


def test_rows_that_come_and_go_move_the_ways() -> None:
    peers = peers_of(machine("a", "iad-1", 7), machine("b", "lhr-1", 7), machine("c", "nrt-1", 8))
    assert prefixes(peers) == {"lhr-1": (PREFIX,)}
    peers.take([machine("b", "nrt-1", 7)])  # moved
    assert list(prefixes(peers)) == ["nrt-1"]
    peers.take([FeedRow(stream="routes", key="m/a", value=None)])  # the network left this host
    assert prefixes(peers) == {}


@pytest.mark.parametrize("address", ["", "10.0.0.1", "2001:db8::1"])
def test_a_row_without_a_private_address_has_no_way(address: str) -> None:
    row: dict[str, Any] = {"node": "lhr-1", "ip6": address}
    peers = peers_of(machine("a", "iad-1", 7), FeedRow(stream="routes", key="m/b", value=row))
    assert prefixes(peers) == {}


@pytest.mark.anyio
async def test_ways_follow_the_view_and_a_failure_is_tried_again() -> None:
    links = Recorded(refusals=1)
    peers = peers_of(machine("a", "iad-1", 7), links=links)

    async def told() -> list[tuple[Peer, ...]]:
        return links.told

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peers.run)
        await until(told, lambda seen: len(seen) >= 2, within_s=15)
        peers.take([machine("b", "lhr-1", 7)])
        await until(told, lambda seen: any(peer.prefixes for peer in seen[-1]), within_s=AGAIN_S / 2)
        tasks.cancel_scope.cancel()
    assert [peer.prefixes for peer in links.told[0]] == [(), (), ()]
    assert links.told[-1][0].prefixes == (PREFIX,)
