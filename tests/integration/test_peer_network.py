"""6PN between two hosts of a box, over plain links and over WireGuard: who reaches whom, and what is seen on the way.

a1 b1                       a2 b2      a: network 7, b: network 8; b1 and b2 belong to another org
[iad-1]── router of a box ──[nrt-1]    HostNetwork and PeerLinks run in the hosts' namespaces
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from network_rig import INSTANCE, NetworkRig, network_rig

from pantala.domain.policies import Allowed
from pantala.domain.runtime import NetworkPlan
from pantala.kit import binaries, ids
from pantala.kit.sealing import Opener, b64
from pantala.net import PeerNode, plan_peers, sixpn, slots
from pantala.testing.poll import until_sync
from pantala.testing.scratch import remove, scratch

pytestmark = [pytest.mark.root]
HOSTS = ("iad-1", "nrt-1")
ORG_A, ORG_B = 7, 8
PORTS = (22, 53, 80, 443, 5432, 8080)
HEARS = 9999
WIREGUARD_PORT = 51820

# Calls of HostNetwork and PeerLinks inside a host's namespace, a line each.
CALLS = """
import anyio, json, msgspec, sys
from pathlib import Path
from pantala.domain.runtime import NetworkPlan
from pantala.net import HostNetwork, Peer, PeerLinks
async def call(method, argument, made):
    network = HostNetwork(run_dir=Path(made["run_dir"]), init=Path(made["init"]))
    links = PeerLinks(**made["links"])
    if method == "ensure":
        return await network.ensure(msgspec.convert(argument, NetworkPlan))
    if method == "apply":
        return await links.apply(msgspec.convert(argument, list[Peer]))
    if method == "unlink":
        return await links.remove()
    return await (network.setup() if method == "setup" else network.teardown())
for line in sys.stdin:
    print(json.dumps(msgspec.to_builtins(anyio.run(call, *json.loads(line)), enc_hook=str)), flush=True)
"""
# Accepts on every port and prints the payload of each datagram.
SERVE = f"""
import selectors, socket
watched = selectors.DefaultSelector()
for port in {PORTS!r}:
    watched.register(socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True), 1)
hears = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
hears.bind(("::", {HEARS}))
watched.register(hears, 1)
print("ready", flush=True)
while True:
    for key, _ in watched.select():
        if key.fileobj is hears:
            print(hears.recv(100).decode(), flush=True)
        else:
            key.fileobj.accept()[0].close()
"""
# Tries what stdin lists, each for so long; prints which of it was answered. A datagram counts where it is heard.
TRY = """
import json, socket, subprocess, sys
answered, within_s = [], sys.argv[1]
for kind, source, target, port in json.load(sys.stdin):
    try:
        if kind == "ping":
            done = subprocess.run(["ping", "-c1", "-W", within_s, target], capture_output=True)
            answered.append(done.returncode == 0)
            continue
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as s:
            s.settimeout(float(within_s))
            if source:
                s.bind((source, 0))
            s.connect((target, port))
            if kind == "udp":
                s.send(f"{kind} {source} {target}".encode())
        answered.append(kind == "tcp")
    except OSError:
        answered.append(False)
print(json.dumps(answered))
"""
# Counts what passes by a device until its stdin ends: protocol and ports, by IP version.
SNIFF = """
import json, select, socket, sys
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.ntohs(3))
packets.bind((sys.argv[1], 3))
seen = {}
print("ready", flush=True)
while True:
    ready = select.select([packets, sys.stdin], [], [])[0]
    if packets in ready:
        data, (_, ethertype, *_) = packets.recvfrom(200)
        if ethertype == 0x0806:
            kind = "ARP"
        elif ethertype == 0x86DD:
            kind = "6PN" if data[8:10] == b"\\xfd\\xaa" else "IPv6"
        elif data[9] == 17:
            start = (data[0] & 15) * 4
            kind = f"UDP {int.from_bytes(data[start + 2 : start + 4])}"
        else:
            kind = f"IPv4 protocol {data[9]}"
        seen[kind] = seen.get(kind, 0) + 1
    elif sys.stdin in ready:
        break
print(json.dumps(seen))
"""
# Applies the same ways again and again: where no program can be found, after the routes went, and all of it anew.
STANDS = """
import anyio, json, msgspec, os, subprocess, sys
from pantala.errors import DriverError
from pantala.net import Peer, PeerLinks
async def apply(path, **how):
    os.environ["PATH"] = path
    try:
        await links.apply(peers, **how)
        return "done"
    except DriverError:
        return "refused"
async def main():
    path, nowhere = os.environ["PATH"], "/nowhere"
    flush = ["ip", "-6", "route", "flush", "proto", "201"]
    said = [await apply(path), await apply(nowhere), await apply(nowhere, anew=True), await apply(path)]
    subprocess.run(flush, check=True)
    said += [await apply(nowhere), await apply(path), await apply(nowhere)]
    print(json.dumps(said))
said, made = json.loads(sys.stdin.readline())
peers, links = msgspec.convert(said, list[Peer]), PeerLinks(**made)
anyio.run(main)
"""
PYTHON = [sys.executable, "-I", "-S", "-c"]
# What is to be answered may take its time; what is not costs the test as much.
ANSWERED_WITHIN_S, SILENT_FOR_S = 10, 0.5
HEARD_WITHIN_S = 15.0


class Machine:
    def __init__(self, node: str, plan: NetworkPlan, netns: str) -> None:
        self.node, self.plan, self.ip6 = node, plan, plan.ip6
        self.inside = ["nsenter", f"--net={netns}", "--"]
        self._server = subprocess.Popen([*self.inside, *PYTHON, SERVE], stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def tries(self, attempts: list[tuple[str, str, str, int]], within_s: float = ANSWERED_WITHIN_S) -> list[bool]:
        done = subprocess.run(
            [*self.inside, *PYTHON, TRY, str(within_s)],
            input=json.dumps(attempts),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return json.loads(done.stdout)

    def take_address(self, address: str) -> None:
        """As root of the host: a machine itself cannot."""
        subprocess.run([*self.inside, "ip", "addr", "add", f"{address}/128", "dev", "eth0", "nodad"], check=True)

    def heard(self) -> list[str]:
        """All, once the first datagram has come: it may be under way still. Ends the server."""
        assert self._server.stdout is not None
        deadline = threading.Timer(HEARD_WITHIN_S, self._server.kill)
        deadline.start()
        first = self._server.stdout.readline()
        deadline.cancel()
        self._server.terminate()
        rest = self._server.stdout.read()
        self.close()
        return (first + rest).splitlines()

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()


class Peers:
    """Two hosts with a machine of each org."""

    def __init__(self, rig: NetworkRig, kind: str) -> None:
        self.rig, self.kind = rig, kind
        self.base = scratch("peers")
        self._callers: dict[str, subprocess.Popen[str]] = {}
        self._tunnels: list[subprocess.Popen[bytes]] = []
        self.links: dict[str, dict[str, Any]] = {}
        self.nodes: list[PeerNode] = []
        self.machines: dict[str, Machine] = {}

    def open(self) -> None:
        for third, node in enumerate(HOSTS, start=1):
            self._open(third, node)
        for name, node, network, slot in (
            ("a1", "iad-1", ORG_A, 0),
            ("b1", "iad-1", ORG_B, 1),
            ("a2", "nrt-1", ORG_A, 0),
            ("b2", "nrt-1", ORG_B, 1),
        ):
            self.machines[name] = self._machine(node, network, slot)
        self.connect({node: {ORG_A, ORG_B} for node in HOSTS})
        first, far = self.machines["a1"], self.machines["a2"]  # the links of the box have just come up
        until_sync(
            lambda: first.tries([("tcp", "", far.ip6, 80)], SILENT_FOR_S),
            lambda answered: answered == [True],
            within_s=20,
        )

    def connect(self, networks: dict[str, set[int]]) -> None:
        for node in HOSTS:
            self.call(node, "apply", msgspec.to_builtins(plan_peers(node, self.nodes, networks)))

    def call(self, node: str, method: str, argument: Any = None) -> Any:
        caller = self._callers[node]
        assert caller.stdin is not None
        assert caller.stdout is not None
        init = str(binaries.find("pantala-init"))
        made = {"run_dir": str(self.base / node), "init": init, "links": self.links[node]}
        caller.stdin.write(json.dumps([method, argument, made]) + "\n")
        caller.stdin.flush()
        answer = caller.stdout.readline()
        assert answer, f"{method} failed, see stderr"
        return json.loads(answer)

    def _open(self, third: int, node: str) -> None:
        netns = ["nsenter", f"--net=/run/netns/pnt{INSTANCE}-{node}", "--"]
        key = secrets.token_bytes(32)
        address = f"100.{96 + int(INSTANCE)}.{third}.2"
        if self.kind == "plain":
            self.links[node] = {"kind": "plain", "device": "eth0", "via": f"fd96:{INSTANCE}:0:{third}::1"}
            self.nodes.append(PeerNode(id=node))
        else:
            device = f"wgp{INSTANCE}-{third}"
            self.links[node] = {
                "kind": "wireguard", "device": device, "private_key": b64(key), "port": WIREGUARD_PORT,
            }  # fmt: skip
            endpoint = f"{address}:{WIREGUARD_PORT}"
            self.nodes.append(PeerNode(id=node, key=Opener(key).public_key, endpoint=endpoint))
            if self.kind == "user space":
                program = str(binaries.find("wireguard-go"))
                self._tunnels.append(subprocess.Popen([*netns, program, "-f", device], stderr=subprocess.DEVNULL))
                until_sync(Path(f"/var/run/wireguard/{device}.sock").exists, bool, within_s=10, every_s=0.01)
        self._callers[node] = subprocess.Popen(
            [*netns, sys.executable, "-c", CALLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.call(node, "setup")

    def _machine(self, node: str, network: int, slot: int) -> Machine:
        given_out = slots.addresses(slot)
        plan = NetworkPlan(
            machine_id=ids.machine_id(),
            slot=slot,
            network=network,
            ip4=str(given_out.machine),
            gateway4=str(given_out.gateway),
            ip6=str(sixpn.machine_address(network, sixpn.host_id(node), slot + 1)),
            uid_base=1_000_000 + 65_536 * slot,
        )
        handle = self.call(node, "ensure", msgspec.to_builtins(plan))
        return Machine(node, plan, handle["netns"])

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        for node, caller in self._callers.items():
            self.call(node, "unlink")
            self.call(node, "teardown")
            self.call(node, "unlink")
            caller.kill()
            caller.communicate()
        for tunnel in self._tunnels:
            tunnel.terminate()
            tunnel.wait()
        remove(self.base)


KINDS = [
    "plain",
    "user space",
    pytest.param("kernel", marks=pytest.mark.needs_kernel_wireguard),
]


@pytest.fixture(params=KINDS)
def peers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Peers]:
    links_kind = "plain" if request.param == "plain" else "wireguard"
    with network_rig(tmp_path, regions=["iad", "nrt"], serving=False, links_kind=links_kind) as rig:
        made = Peers(rig, request.param)
        try:
            made.open()
            yield made
        finally:
            made.close()


def attempts_at(target: Machine, source: str = "") -> list[tuple[str, str, str, int]]:
    """By every port, by ping (where the source is the machine's own) and by datagram."""
    tcp = [("tcp", source, target.ip6, port) for port in PORTS]
    ping = [] if source else [("ping", "", target.ip6, 0)]
    return [*tcp, *ping, ("udp", source, target.ip6, HEARS)]


def test_networks_are_kept_apart_on_one_host_and_between_hosts(peers: Peers) -> None:
    a1, a2, b1, b2 = (peers.machines[name] for name in ("a1", "a2", "b1", "b2"))
    own_attempts: list[bool] = []
    for source, target in ((a1, a2), (a2, a1), (b1, b2), (b2, b1)):
        own_attempts += source.tries(attempts_at(target))[:-1]
    forbidden: list[tuple[str, str, tuple[str, str, str, int]]] = []
    answered: list[bool] = []
    for source in (a1, a2):
        honest = [attempt for target in (b1, b2) for attempt in attempts_at(target)]
        honest += [("tcp", "", target.plan.ip4, port) for target in (b1, b2) for port in (80, 443)]
        forged: list[tuple[str, str, str, int]] = []
        for node in (*HOSTS, "lhr-1"):  # of the other org, as if on this host, on the other one, on a third
            address = str(sixpn.machine_address(ORG_B, sixpn.host_id(node), 99))
            forged += [("udp", address, target.ip6, HEARS) for target in (b1, b2)]
            forged += [("tcp", address, target.ip6, 80) for target in (b1, b2)]
        forged += [("udp", "fdaa::3", target.ip6, HEARS) for target in (b1, b2)]
        answered += source.tries(honest, SILENT_FOR_S)
        for address in {attempt[1] for attempt in forged}:
            source.take_address(address)
        answered += source.tries(forged, SILENT_FOR_S)
        forbidden += [(source.node, source.ip6, attempt) for attempt in (*honest, *forged)]
    assert own_attempts == [True] * 4 * (len(PORTS) + 1)
    assert len(forbidden) >= 40
    assert [attempt for attempt, got in zip(forbidden, answered, strict=True) if got] == []
    assert a1.heard() == [f"udp  {a1.ip6}"]
    assert a2.heard() == [f"udp  {a2.ip6}"]
    assert b1.heard() == [f"udp  {b1.ip6}"]
    assert b2.heard() == [f"udp  {b2.ip6}"]


@pytest.mark.parametrize("peers", ["plain"], indirect=True)
def test_network_policies_hold_between_hosts(peers: Peers) -> None:
    """Ingress is refused by the host of the one that is asked, egress by that of the one that asks."""
    a1, a2 = peers.machines["a1"], peers.machines["a2"]

    def police(machine: Machine, allowed: Allowed) -> None:
        plan = msgspec.structs.replace(machine.plan, allowed=allowed)
        peers.call(machine.node, "ensure", msgspec.to_builtins(plan))

    def only(source: Machine, target: Machine, *wanted: int) -> bool:
        """Those ports are reached, and no other."""
        others = [("tcp", "", target.ip6, port) for port in PORTS if port not in wanted]
        return all(source.tries([("tcp", "", target.ip6, port) for port in wanted])) and not any(
            source.tries(others, SILENT_FOR_S)
        )

    police(a2, Allowed(ingress=(("tcp", 80), ("tcp", 443))))
    assert only(a1, a2, 80, 443)
    assert only(a2, a1, *PORTS)
    police(a1, Allowed(egress=(("tcp", 443), ("tcp", 5432))))
    assert only(a1, a2, 443)
    police(a2, Allowed())
    assert only(a1, a2, 443, 5432)


def test_a_host_speaks_for_its_own_machines_only(peers: Peers) -> None:
    """Root of iad-1 forges: machines of a third host, of nrt-1 itself, and a network that iad-1 does not have."""
    b1, b2 = peers.machines["b1"], peers.machines["b2"]
    forged = [
        str(sixpn.machine_address(ORG_B, sixpn.host_id("lhr-1"), 1)),
        str(sixpn.machine_address(ORG_B, sixpn.host_id("nrt-1"), 77)),
        str(sixpn.machine_address(9, sixpn.host_id("iad-1"), 1)),
    ]
    attempts = [("udp", source, b2.ip6, HEARS) for source in forged] + [
        ("tcp", source, b2.ip6, 80) for source in forged
    ]
    for source in forged:
        peers.rig.run("iad-1", "ip", "addr", "add", f"{source}/128", "dev", "lo", "nodad")
    script = f"import io, sys; sys.stdin = io.StringIO({json.dumps(attempts)!r})\n{TRY}"
    said = peers.rig.run("iad-1", *PYTHON, script, str(SILENT_FOR_S))
    assert json.loads(said) == [False] * 6
    assert b1.tries([("udp", "", b2.ip6, HEARS)]) == [False]
    assert b2.heard() == [f"udp  {b2.ip6}"]


def test_a_network_that_leaves_a_host_is_not_reached_from_there_any_more(peers: Peers) -> None:
    a1, a2, b1, b2 = (peers.machines[name] for name in ("a1", "a2", "b1", "b2"))
    assert a1.tries([("tcp", "", a2.ip6, 80)]) == [True]
    peers.connect({"iad-1": {ORG_B}, "nrt-1": {ORG_A, ORG_B}})
    assert a1.tries([("tcp", "", a2.ip6, 80)], SILENT_FOR_S) == [False]
    assert b1.tries([("tcp", "", b2.ip6, 80)]) == [True]
    shown = peers.rig.run("nrt-1", "ip", "-6", "route", "show", "proto", "201")
    assert str(sixpn.host_prefix(ORG_B, sixpn.host_id("iad-1"))) in shown
    assert str(sixpn.host_prefix(ORG_A, sixpn.host_id("iad-1"))) not in shown
    peers.connect({})
    assert peers.rig.run("nrt-1", "ip", "-6", "route", "show", "proto", "201") == ""
    assert b1.tries([("tcp", "", b2.ip6, 80)], SILENT_FOR_S) == [False]


def test_ways_that_stand_need_no_program_and_those_that_went_are_made_again(peers: Peers) -> None:
    wanted = msgspec.to_builtins(plan_peers("iad-1", peers.nodes, {node: {ORG_A} for node in HOSTS}))
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/pnt{INSTANCE}-iad-1", "--", sys.executable, "-c", STANDS],
        input=json.dumps([wanted, peers.links["iad-1"]]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == ["done", "done", "refused", "done", "refused", "done", "done"]


def test_a_large_packet_finds_its_way(peers: Peers) -> None:
    """Tunnels carry less than the link does; machines are told."""
    a1, a2 = peers.machines["a1"], peers.machines["a2"]
    done = subprocess.run(
        [*a1.inside, "ping", "-c3", "-i0.2", "-W2", "-s1430", a2.ip6], capture_output=True, text=True, check=False
    )
    assert " 0 received" not in done.stdout, done.stdout


def test_only_wireguard_is_seen_between_the_hosts(peers: Peers) -> None:
    a1, a2 = peers.machines["a1"], peers.machines["a2"]
    sniffer = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/pnt{INSTANCE}-router", "--", *PYTHON, SNIFF, "to-1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sniffer.stdout is not None
    assert sniffer.stdout.readline() == "ready\n"
    assert all(a1.tries(attempts_at(a2))[:-1])
    said, _ = sniffer.communicate("", timeout=10)
    seen: dict[str, int] = json.loads(said)
    if peers.kind == "plain":
        assert seen["6PN"] > 20
    else:
        assert seen.pop(f"UDP {WIREGUARD_PORT}") > 20
        assert set(seen) <= {"IPv6", "ARP"}  # neighbour discovery of the link itself
