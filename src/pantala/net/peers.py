"""6PN between hosts: which /80 is behind which host, and the routes, tunnels and firewall elements that follow.

`plan_peers` is pure: a network that this host has, on another host that has it too, is one /80 (network, host).
`PeerLinks` makes the kernel agree, over plain links (hosts that share a router which sends each /80 to its host: a
box) or over WireGuard (kernel, else `wireguard-go`, which somebody else keeps running). Called by
`pantala.agent.peers`.

The number of a host follows from its id (`sixpn.host_id`), never from what it says, so that no host can speak for
another one's addresses.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv6Network
from pathlib import Path
from typing import Literal

import msgspec

from pantala.errors import DriverError, InvalidRequest
from pantala.net import commands, rules, sixpn

LinkKind = Literal["plain", "wireguard"]
ROUTE_PROTOCOL = "201"
"""Marks our routes in the kernel's table, so that those that are not wanted any more are found."""
ROUTES = Path("/proc/net/ipv6_route")
"""Of this process's network namespace."""
MTU = 1420
KEEPALIVE_S = 25


class PeerNode(msgspec.Struct, frozen=True, kw_only=True):
    """Another host as its row tells. `key` and `endpoint` (`ip:port`) are empty where it has no tunnel."""

    id: str
    key: str = ""
    endpoint: str = ""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One other host and the /80s that are behind it, none where it has nothing in common with this one. `calls`: this
    host opens the tunnel between the two."""

    node: PeerNode
    prefixes: tuple[str, ...] = ()
    calls: bool = False


def plan_peers(own: str, nodes: Iterable[PeerNode], networks: Mapping[str, Iterable[int]]) -> tuple[Peer, ...]:
    """`networks`: node id to the networks that its machines are in. Of two hosts with the same number (one in four
    thousand million) the one with the lower id has it, and this one first.

    Hosts with nothing in common are peers too, with no addresses: both sides then know each other's keys before the
    first packet. One side calls, for two that call at once cross on the way and try again only after 5 s.
    """
    nodes = list(nodes)
    reachable = any(node.endpoint for node in nodes if node.id == own)
    mine = set(networks.get(own, ()))
    numbers = {sixpn.host_id(own): own}
    peers: list[Peer] = []
    for node in sorted(nodes, key=lambda node: node.id):
        number = sixpn.host_id(node.id)
        if numbers.setdefault(number, node.id) != node.id or node.id == own:
            continue
        shared = sorted(mine & set(networks.get(node.id, ())))
        prefixes = tuple(str(sixpn.host_prefix(network, number)) for network in shared)
        calls = bool(prefixes and node.endpoint) and (own < node.id or not reachable)
        peers.append(Peer(node=node, prefixes=prefixes, calls=calls))
    return tuple(peers)


def wireguard_configuration(private_key: str, port: int, peers: Sequence[Peer]) -> str:
    """For `wg syncconf`. A peer without a key is left out, and reached by nobody. One without an endpoint is behind
    NAT and calls us; who calls keeps the way open."""
    parts = [f"[Interface]\nPrivateKey = {private_key}\nListenPort = {port}\n"]
    for peer in peers:
        if peer.node.key:
            endpoint = f"Endpoint = {peer.node.endpoint}\n" if peer.node.endpoint else ""
            keepalive = f"PersistentKeepalive = {KEEPALIVE_S}\n" if peer.calls else ""
            allowed = f"AllowedIPs = {', '.join(peer.prefixes)}\n" if peer.prefixes else ""
            parts.append(f"[Peer]\nPublicKey = {peer.node.key}\n{allowed}{endpoint}{keepalive}")
    return "\n".join(parts)


def route_lines(device: str, via: str, wanted: set[str], there: set[str]) -> list[str]:
    """`ip -6 -batch` lines that lead from the routes there are to those that are wanted."""
    hop = f"via {via} dev {device}" if via else f"dev {device}"
    gone = [f"route del {prefix} proto {ROUTE_PROTOCOL}" for prefix in sorted(there - wanted)]
    return gone + [f"route replace {prefix} {hop} proto {ROUTE_PROTOCOL}" for prefix in sorted(wanted)]


def routes_by(device: str, table: str) -> set[str]:
    """Prefixes that lead to a device, from the text of /proc/net/ipv6_route."""
    found: set[str] = set()
    for line in table.splitlines():
        target, length, *_, name = line.split()
        if name == device:
            found.add(str(IPv6Network((bytes.fromhex(target), int(length, 16)))))
    return found


def device_number(device: str) -> int:
    """The kernel's, never used twice; 0 for one that is not there."""
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return 0


class _Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What was made last. `tunnels`: configuration of WireGuard, empty for plain links. `device`: its number then."""

    wanted: set[str]
    tunnels: str
    device: int


class PeerLinks:
    """The ways to the other hosts. `via`: the next hop of plain links, empty when hosts are on the link themselves.
    `private_key` (base64) and `port` are WireGuard's."""

    def __init__(self, *, kind: LinkKind, device: str, via: str = "", private_key: str = "", port: int = 0) -> None:
        if kind == "wireguard" and not (private_key and port):
            raise InvalidRequest("WireGuard needs a private key and a port", field="links")
        self._kind = kind
        self._device = device
        self._via = via if kind == "plain" else ""
        self._private_key = private_key
        self._port = port
        self._applied: _Applied | None = None

    async def apply(self, peers: Sequence[Peer], *, anew: bool = False) -> None:
        """Repeats safely, and for next to nothing when these ways stand as they were made, unless `anew`. Raises
        DriverError; what is open then is at most what was open before and is wanted now.

        The firewall closes first and opens last, so that a way is never open without its check.
        """
        wanted = {prefix for peer in peers for prefix in peer.prefixes}
        tunnels = self._configuration(peers)
        if not anew and self._stands(wanted, tunnels):
            return
        known, self._applied = self._applied is not None, None
        there = await self._routes()
        if there - wanted or not known:
            await self._firewall(wanted & there)
        if tunnels:
            await self._ensure_device()
            await self._configure(tunnels)
        lines = route_lines(self._device, self._via, wanted, there)
        if lines:
            await commands.run(["ip", "-6", "-batch", "-"], stdin="\n".join(lines) + "\n")
        await self._firewall(wanted)
        self._applied = _Applied(wanted=wanted, tunnels=tunnels, device=device_number(self._device))

    async def remove(self) -> None:
        """No route and no element is left; a tunnel of the kernel goes too. Repeats safely, also before `apply`."""
        lines = route_lines(self._device, self._via, set(), await self._routes())
        await commands.attempt(["nft", "-f", "-"], stdin=rules.set_peers(self._device, []))  # or there is no table
        if lines:
            await commands.attempt(["ip", "-6", "-batch", "-"], stdin="\n".join(lines) + "\n")
        if self._kind == "wireguard":
            await commands.attempt(["ip", "link", "delete", "dev", self._device])

    def _configuration(self, peers: Sequence[Peer]) -> str:
        """Empty for plain links, which do not care who is behind a prefix."""
        return wireguard_configuration(self._private_key, self._port, peers) if self._kind == "wireguard" else ""

    def _stands(self, wanted: set[str], tunnels: str) -> bool:
        """Seen without a program: a device that was made anew has another number and lost its routes."""
        now = _Applied(wanted=wanted, tunnels=tunnels, device=device_number(self._device))
        return now == self._applied and (not wanted or wanted <= routes_by(self._device, ROUTES.read_text()))

    async def _routes(self) -> set[str]:
        listed = json.loads(await commands.run(["ip", "-6", "-json", "route", "show", "proto", ROUTE_PROTOCOL]) or "[]")
        return {str(route["dst"]) for route in listed}

    async def _firewall(self, prefixes: set[str]) -> None:
        await commands.run(["nft", "-f", "-"], stdin=rules.set_peers(self._device, sorted(prefixes)))

    async def _ensure_device(self) -> None:
        code, _, _ = await commands.attempt(["ip", "link", "show", "dev", self._device])
        if code == 0:
            return
        code, _, _ = await commands.attempt(["ip", "link", "add", "dev", self._device, "type", "wireguard"])
        if code != 0:
            raise DriverError(
                f"there is no tunnel {self._device}: the kernel has no WireGuard and wireguard-go does not run",
                retry=True,
            )

    async def _configure(self, text: str) -> None:
        await commands.run(["wg", "syncconf", self._device, "/dev/stdin"], stdin=text)
        await commands.run(["ip", "link", "set", "dev", self._device, "mtu", str(MTU), "up"])
