"""Every port of public addresses, and Flycast, through the firewall of a host that leads both to its proxy.

[client] 198.51.100.1 ── 198.51.100.2 [host: HostNetwork, Entrances, pantala-proxy] ── machines a (network 7), b (8)
routes to the host: 203.0.113.7 (an app's), 203.0.113.1 (shared), 198.51.100.2 (the host's own)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from host_rig import Host, Machine, where_prefix
from proxy_rig import machine_row, row

from pantala.domain.policies import Allowed
from pantala.kit import binaries
from pantala.testing.authority import Authority
from pantala.testing.poll import until_sync
from pantala.testing.scratch import scratch
from pantala.wire.feed import (
    AddressRow,
    AgentHello,
    AppRow,
    DNSSettings,
    FeedRow,
    HostRow,
    ProxySettings,
    ServiceRow,
    Snapshot,
)
from pantala.wire.machine import Concurrency, Port

pytestmark = [pytest.mark.root]

OWN, SHARED, DEDICATED = "198.51.100.2", "203.0.113.1", "203.0.113.7"
DEDICATED6 = "2001:db8:1::7"
FLYCAST = "fdaa:0:7::f"
APP_PORT, RAW, TAKEN, RANGE = 8080, 5432, 6000, (7000, 7100)

# The agent's end of the feed: says what it was given to whoever connects.
AGENT = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
text = open(sys.argv[2], "rb").read()
while True:
    connection = listener.accept()[0]
    connection.sendall(text)
    kept = connection
"""
# An app that answers every connection with who called and whom, and HTTP with a body.
APP = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
while True:
    connection = listener.accept()[0]
    said = connection.recv(4096)
    if said.startswith(b"GET"):
        head = dict(line.split(b": ", 1) for line in said.split(b"\\r\\n")[1:] if b": " in line)
        body = head.get(b"fly-client-ip", b"") + b" " + head.get(b"fly-forwarded-port", b"")
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    else:
        connection.sendall(said)
    connection.close()
"""
SAY = """
import socket, sys
try:
    tcp = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)
except OSError as error:
    sys.exit(print(f"error {error}"))
answer = b""
try:
    tcp.settimeout(15)
    said = sys.stdin.buffer.read()
    tcp.sendall(said)
    if not said.startswith(b"GET"):
        tcp.shutdown(socket.SHUT_WR)
    while part := tcp.recv(4096):
        answer += part
except OSError:
    pass  # closed by the other side
sys.stdout.write("said " + answer.decode())
"""


def rows() -> list[FeedRow]:
    service = ServiceRow(
        app="web",
        protocol="tcp",
        internal_port=APP_PORT,
        ports=[
            Port(port=80, handlers=["http"], force_https=True),
            Port(port=443, handlers=["tls", "http"]),
            Port(port=RAW, handlers=["proxy_proto"]),
            Port(port=TAKEN),
            Port(start_port=RANGE[0], end_port=RANGE[1]),
        ],
        concurrency=Concurrency(),
    )
    return [
        row("routes", "app/web", AppRow(app="web", org="o", network=7)),
        row("routes", "host/web.test", HostRow(app="web")),
        row("routes", "svc/web/d1", service),
        row("routes", f"addr/{DEDICATED}", AddressRow(kind="dedicated", app="web")),
        row("routes", f"addr/{DEDICATED6}", AddressRow(kind="dedicated", app="web")),
        row("routes", f"addr/{FLYCAST}", AddressRow(kind="private", app="web")),
        row("certs", "cert/web", Authority().issue("web.test")),
    ]


class Edge:
    """A host with machines, its firewall and its proxy."""

    def __init__(self, base: Path) -> None:
        self.host = Host(base)
        self._base = base
        base.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        host = self.host
        for address in (SHARED,):
            host.host.run("ip", "addr", "add", f"{address}/32", "dev", "lo")
        for route in ("203.0.113.0/24", "2001:db8:1::/64"):
            via = OWN if "." in route else "2001:db8::2"
            host.outside.run("ip", "route", "add", route, "via", via)
        host.call("setup")
        self.a, self.b = host.add(7, 0), host.add(8, 1)
        self.run(self.a, APP, self.a.plan.ip4, str(APP_PORT))
        machine = machine_row("web", "m1", self.a.plan.ip4)
        frames = [
            AgentHello(protocol=1, node="n1", region="iad"),
            Snapshot(revision=1, rows=[*rows(), machine], last=True),
        ]
        feed = self._base / "feed.json"
        feed.write_bytes(b"".join(msgspec.json.encode(frame) + b"\n" for frame in frames))
        self.run(None, AGENT, str(self._base / "agent.sock"), str(feed))
        settings = ProxySettings(
            node="n1",
            region="iad",
            state_dir=str(self._base / "state"),
            agent_socket=str(self._base / "agent.sock"),
            listeners=[],
            entry_listen=["127.0.0.1:4480", "[::1]:4480"],
            dns=DNSSettings(listen=["fdaa::3"], public_listen=[], public_names={}, forward=[]),
            admin_listen="127.0.0.1:9180",
        )
        (self._base / "proxy.json").write_bytes(msgspec.json.encode(settings))
        command = [str(binaries.find("pantala-proxy")), "--settings", str(self._base / "proxy.json")]
        with (self._base / "proxy.log").open("wb") as log:
            self._processes.append(subprocess.Popen([*where_prefix(host.host), *command], stdout=log, stderr=log))

        def apps() -> int:
            done = self.ask(None, "127.0.0.1", 9180, b"GET /snapshot HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            return json.loads(done.rsplit("\r\n\r\n", 1)[1])["apps"] if "200 OK" in done else 0

        until_sync(apps, lambda found: found == 1, within_s=15, every_s=0.05)

    def run(self, where: Machine | None, program: str, *arguments: str) -> None:
        prefix = where_prefix(where if where is not None else self.host.host)
        process = subprocess.Popen([*prefix, sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

    def ask(self, where: Any, ip: str, port: int, text: bytes = b"x") -> str:
        prefix = where_prefix(where if where is not None else self.host.host)
        command = [*prefix, sys.executable, "-c", SAY, ip, str(port)]
        return subprocess.run(command, input=text, capture_output=True, timeout=30, check=True).stdout.decode()

    def lead(self, edge: list[str]) -> dict[str, Any]:
        """Entrances as an agent would keep them, in the host's namespace; the elements by set."""
        program = (
            "import anyio, json, msgspec, sys\n"
            "from pantala.agent.doors import Doors\n"
            "from pantala.kit.clock import SystemClock\n"
            "from pantala.net import Entrances\n"
            "from pantala.wire.feed import FeedRow\n"
            "edge, own, rows = json.load(sys.stdin)\n"
            "async def main():\n"
            "    firewall = Entrances()\n"
            "    doors = Doors(firewall, SystemClock(), edge=edge, own=own)\n"
            "    doors.take(msgspec.convert(rows, list[FeedRow]))\n"
            "    plan = await doors.plan()\n"
            "    await firewall.apply(plan)\n"
            "    print(json.dumps(plan.elements))\n"
            "anyio.run(main)\n"
        )
        given = json.dumps([edge, [OWN], msgspec.to_builtins(rows())])
        return json.loads(self.host.host.run(sys.executable, "-c", program, stdin=given))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self.host.close()


@pytest.fixture
def edge() -> Iterator[Edge]:
    # A short path of its own: namespaces are bound to by name.
    made = Edge(scratch("net"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_every_port_of_public_addresses_and_flycast(edge: Edge) -> None:
    client = edge.host.outside
    edge.lead([SHARED])
    # An app's own address, which no interface has: any port that it serves, and the app learns who called whom.
    assert edge.ask(client, DEDICATED, RAW).startswith(f"said PROXY TCP4 198.51.100.1 {DEDICATED} ")
    assert edge.ask(client, DEDICATED6, RAW).startswith(f"said PROXY TCP6 2001:db8::1 {DEDICATED6} ")
    assert edge.ask(client, DEDICATED, RANGE[0] + 50, b"range") == "said range"
    get = b"GET / HTTP/1.1\r\nHost: any.test\r\nConnection: close\r\n\r\n"
    assert edge.ask(client, DEDICATED, 80, get).startswith("said HTTP/1.1 301 ")
    # A port that it does not serve opens and closes.
    assert edge.ask(client, DEDICATED, 81) == "said "
    # At the shared address names decide, on any port; its own sockets are left alone.
    assert edge.ask(client, SHARED, 8081, get).startswith("said HTTP/1.1 404 ")
    assert "refused" in edge.ask(client, SHARED, 443)
    # Flycast: plain HTTP without a redirect and raw TCP, for machines of the network only.
    private = edge.ask(edge.a, FLYCAST, 80, get)
    assert private.startswith("said HTTP/1.1 200 ")
    assert private.endswith(f"{edge.a.plan.ip6} 80")
    assert edge.ask(edge.a, FLYCAST, RAW).startswith(f"said PROXY TCP6 {edge.a.plan.ip6} {FLYCAST} ")
    assert edge.ask(edge.a, FLYCAST, 443) == "said "
    assert edge.ask(edge.b, FLYCAST, 80, get).startswith("error ")
    assert edge.ask(client, FLYCAST, 80, get).startswith("error ")
    # Machines reach nothing else of the host for that.
    assert edge.ask(edge.a, DEDICATED, RAW).startswith("error ")
    # Away with the entrances: nobody listens any more.
    edge.host.call("teardown")
    assert edge.ask(client, DEDICATED, RAW).startswith("error ")


def test_network_policies_leave_the_way_through_the_proxy_alone(edge: Edge) -> None:
    """Machines reference, section 14: a machine that may exchange nothing directly is served by the proxy, and reaches
    Flycast by it."""
    edge.lead([SHARED])
    edge.host.serve(edge.host.outside, "198.51.100.1", RAW)
    edge.host.police(Allowed(ingress=(), egress=()), edge.a)
    assert edge.ask(edge.host.outside, DEDICATED, RANGE[0], b"in") == "said in"
    assert edge.ask(edge.a, FLYCAST, RANGE[0], b"around") == "said around"
    assert edge.ask(edge.a, "198.51.100.1", RAW).startswith("error ")


def test_of_its_own_address_a_host_gives_what_nobody_uses(edge: Edge) -> None:
    client = edge.host.outside
    edge.run(None, APP, OWN, str(TAKEN))
    elements = edge.lead([OWN])
    first, last = RANGE
    assert elements["own4"] == [f"{OWN} . {RAW}", f"{OWN} . {first}-{last}"]
    assert edge.ask(client, OWN, TAKEN, b"mine") == "said mine"
    assert "refused" in edge.ask(client, OWN, 81)
    # What the app declares is the proxy's; a shared address tells the app by name only.
    assert edge.ask(client, OWN, first, b"GET / HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n").startswith(
        "said HTTP/1.1 404 "
    )
