"""Network policies in the firewall of a host, for real: packets of two machines, the host and a server outside.

Source: machines reference, section 14. `host_rig.py` draws the network; every call is a new `HostNetwork`, as after the
restart of an agent.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import msgspec
import pytest
from host_rig import CONNECT, HOST, PYTHON, SERVER, Host, Machine, Namespace, where_prefix

from pantala.domain.policies import Allowed
from pantala.net import links
from pantala.testing.scratch import scratch

pytestmark = [pytest.mark.root]

SERVER6 = "2001:db8::1"
OPEN, SHUT = 7000, 7001
TCP = "6"
SETS = ("ruled_in", "ruled_out", "open_in", "open_out")

# Answers each datagram, on two ports.
ECHO_DATAGRAMS = """
import selectors, socket, sys
watched = selectors.DefaultSelector()
for port in sys.argv[2:]:
    heard = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
    heard.bind((sys.argv[1], int(port)))
    watched.register(heard, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in watched.select():
        text, peer = key.fileobj.recvfrom(100)
        key.fileobj.sendto(text, peer)
"""
# Asks until it is answered, or refused, or nobody says a word.
ASK = """
import socket, sys
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM) as asked:
    asked.settimeout(10)
    asked.connect((sys.argv[1], int(sys.argv[2])))
    try:
        asked.send(b"hello")
        print(asked.recv(100).decode())
    except OSError as error:
        print("refused", error)
"""
# Prints the payload of each packet of a protocol that has no ports, and when none comes any more.
HEAR_PROTOCOL = """
import socket, sys
heard = socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
heard.bind((sys.argv[1], 0))
heard.settimeout(20)
print("ready", flush=True)
try:
    while True:
        print("heard", heard.recv(100)[20:].decode(), flush=True)
except TimeoutError:
    print("silence", flush=True)
"""
SEND_PROTOCOL = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_RAW, 253).sendto(sys.argv[2].encode(), (sys.argv[1], 0))
"""
# A connection that says a line for every line that it is told.
KEEP = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2])), family=socket.AF_INET6) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    for line in connection.makefile():
        connection.sendall(line.encode())
"""
TALK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as s:
    answers = s.makefile()
    for line in sys.stdin:
        s.sendall(line.encode())
        print(answers.readline(), end="", flush=True)
"""


@pytest.fixture
def host() -> Iterator[Host]:
    # A short path of its own: it is bound to by name.
    made = Host(scratch("net"))
    try:
        made.call("setup")
        yield made
    finally:
        made.close()


def background(host: Host, where: Namespace | Machine, *command: str) -> subprocess.Popen[str]:
    """A program that runs beside the test; ended with the host."""
    prefix = where_prefix(where)
    process = subprocess.Popen(
        [*prefix, *PYTHON, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    host.others.append(process)
    return process


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def ask(machine: Machine, address: str, port: int) -> str:
    command = [*where_prefix(machine), *PYTHON, ASK, address, str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def is_refused(answer: str) -> bool:
    """At once and in words, so that a program learns why."""
    return answer.startswith("refused") and "timed out" not in answer


def elements(host: Host) -> dict[str, list[list[str]]]:
    """Of policies, by set, as lists of their parts."""
    table = json.loads(host.host.run("nft", "-json", "list", "table", "inet", "pantala"))
    found: dict[str, list[list[str]]] = {name: [] for name in SETS}
    for entry in table["nftables"]:
        one = entry.get("set")
        if one is not None and one["name"] in SETS:
            values = [element["elem"]["val"] for element in one.get("elem", [])]
            found[one["name"]] = [
                [str(part) for part in value["concat"]] if isinstance(value, dict) else [value] for value in values
            ]
    return found


def kept(host: Host) -> int:
    return sum(len(values) for values in elements(host).values())


def test_a_rule_of_egress_closes_all_but_its_ports_for_its_machine_alone(host: Host) -> None:
    a = host.add(7, 0, Allowed(egress=(("tcp", OPEN),)))
    b = host.add(7, 1)
    for address in (SERVER, SERVER6):
        for port in (OPEN, SHUT):
            host.serve(host.outside, address, port)
    for port in (OPEN, SHUT):
        host.serve(b, b.plan.ip6, port)
        host.serve(a, a.plan.ip6, port)
    assert a.reach(SERVER, OPEN) == HOST
    assert a.reach(SERVER6, OPEN) == "2001:db8::2"
    assert a.reach(b.plan.ip6, OPEN) == a.plan.ip6
    for address in (SERVER, SERVER6, b.plan.ip6):
        assert is_refused(a.reach(address, SHUT)), address
    # Nobody else is affected, nor the other direction.
    assert b.reach(SERVER, SHUT) == HOST
    assert b.reach(SERVER6, SHUT) == "2001:db8::2"
    assert b.reach(a.plan.ip6, SHUT) == b.plan.ip6


def test_a_rule_of_ingress_closes_all_but_its_ports_and_not_the_way_of_the_proxy(host: Host) -> None:
    a = host.add(7, 0)
    b = host.add(7, 1, Allowed(ingress=(("tcp", OPEN),)))
    for port in (OPEN, SHUT):
        host.serve(b, b.plan.ip6, port)
        host.serve(b, b.plan.ip4, port)
        host.serve(a, a.plan.ip6, port)
    host.serve(host.outside, SERVER, SHUT)
    assert a.reach(b.plan.ip6, OPEN) == a.plan.ip6
    assert is_refused(a.reach(b.plan.ip6, SHUT))
    # The host's own: proxy, checks, logins.
    for address in (b.plan.ip4, b.plan.ip6):
        assert not host.host.run(*PYTHON, CONNECT, address, str(SHUT), "3").startswith("refused")
    # What it begins itself is another direction.
    assert b.reach(a.plan.ip6, SHUT) == b.plan.ip6
    assert b.reach(SERVER, SHUT) == HOST


def test_a_rule_without_ports_closes_a_direction_and_dns_and_api_go_on(host: Host) -> None:
    a = host.add(7, 0, Allowed(egress=()))
    b = host.add(7, 1)
    host.serve(host.outside, SERVER, OPEN)
    host.serve(b, b.plan.ip6, OPEN)
    for port in (53, 4280):
        host.serve(host.host, "fdaa::3", port)
        assert a.reach("fdaa::3", port) == a.plan.ip6
    ready(background(host, host.host, ECHO_DATAGRAMS, "fdaa::3", "53"))
    assert ask(a, "fdaa::3", 53) == "hello"
    assert is_refused(a.reach(SERVER))
    assert is_refused(a.reach(b.plan.ip6))


def test_datagrams_are_another_protocol_and_their_answers_pass(host: Host) -> None:
    a = host.add(7, 0, Allowed(egress=(("udp", OPEN), ("tcp", SHUT)), ingress=()))
    b = host.add(7, 1, Allowed(egress=(), ingress=(("udp", OPEN),)))
    ready(background(host, host.outside, ECHO_DATAGRAMS, SERVER, str(OPEN), str(SHUT)))
    ready(background(host, b, ECHO_DATAGRAMS, b.plan.ip6, str(OPEN), str(SHUT)))
    for address in (SERVER, b.plan.ip6):
        assert ask(a, address, OPEN) == "hello"
        assert is_refused(ask(a, address, SHUT))
    host.police(Allowed(), a)
    assert is_refused(ask(a, b.plan.ip6, SHUT))


def test_what_has_no_port_is_closed_too(host: Host) -> None:
    """Pings, and a packet of another protocol with nothing in it, where a port might be looked for in vain."""
    a, b = host.add(7, 0, Allowed(egress=(("tcp", OPEN),))), host.add(7, 1)
    hearer = background(host, host.outside, HEAR_PROTOCOL, SERVER)
    ready(hearer)
    for machine, word in ((a, ""), (a, "closed"), (b, ""), (b, "end")):
        subprocess.run([*where_prefix(machine), *PYTHON, SEND_PROTOCOL, SERVER, word], check=True, timeout=30)
    assert hearer.stdout is not None
    assert [hearer.stdout.readline() for _ in range(2)] == ["heard \n", "heard end\n"]
    for machine, answers in ((a, False), (b, True)):
        ping = subprocess.run(
            [*where_prefix(machine), "ping", "-c1", "-W2", SERVER], capture_output=True, timeout=30, check=False
        )
        assert (ping.returncode == 0) == answers


def test_a_change_holds_at_once_for_new_connections_and_lets_established_ones_go_on(host: Host) -> None:
    a, b = host.add(7, 0), host.add(7, 1)
    ready(background(host, b, KEEP, b.plan.ip6, str(OPEN)))
    host.serve(b, b.plan.ip6, SHUT)
    talk = background(host, a, TALK, b.plan.ip6, str(OPEN))
    assert talk.stdin is not None
    assert talk.stdout is not None
    talk.stdin.write("before\n")
    assert talk.stdout.readline() == "before\n"
    host.police(Allowed(egress=()), a)
    assert is_refused(a.reach(b.plan.ip6, SHUT))
    talk.stdin.write("after\n")
    assert talk.stdout.readline() == "after\n"
    host.police(Allowed(egress=(("tcp", SHUT),)), a)
    assert a.reach(b.plan.ip6, SHUT) == a.plan.ip6
    host.police(Allowed(ingress=(("tcp", OPEN),)), a, b)
    assert is_refused(a.reach(b.plan.ip6, SHUT))
    host.police(Allowed(), a, b)
    assert kept(host) == 0


def test_it_outlives_the_agent_and_renewed_rules(host: Host) -> None:
    a = host.add(7, 0, Allowed(egress=(("tcp", OPEN),)))
    host.serve(host.outside, SERVER, OPEN)
    host.serve(host.outside, SERVER, SHUT)
    before = elements(host)
    host.call("setup")
    Machine(host, msgspec.structs.replace(a.plan, allowed=None))  # nothing is known of its app, yet
    assert elements(host) == before
    assert (a.reach(SERVER, OPEN), is_refused(a.reach(SERVER, SHUT))) == (HOST, True)


@pytest.mark.parametrize("died", ["before the firewall was changed", "after"])
def test_an_agent_that_dies_between_file_and_firewall_forgets_no_element(host: Host, died: str) -> None:
    first, second, third = (Allowed(ingress=(("tcp", port),), egress=()) for port in (1, 2, 3))
    a = host.add(7, 0, first)
    name = links.link_name(a.plan.machine_id)
    path = host.base / "net/plans" / f"{a.plan.machine_id}.json"
    plan = json.loads(path.read_text())
    if died == "after":
        host.police(second, a)
    path.write_text(json.dumps(plan | {"allowed": msgspec.to_builtins(second), "former": [plan["allowed"]]}))
    host.police(third, a)
    assert elements(host) == {
        "ruled_in": [[name]],
        "ruled_out": [[name]],
        "open_in": [[name, TCP, "3"]],
        "open_out": [],
    }
    assert json.loads(path.read_text())["former"] == []


def test_removal_takes_policies_along_with_and_without_the_plan(host: Host) -> None:
    policy = Allowed(ingress=(("tcp", 80), ("udp", 53)), egress=())
    a, b = host.add(7, 0, policy), host.add(7, 1, policy)
    assert kept(host) == 2 * 4
    host.call("remove", a.plan.machine_id)
    assert kept(host) == 4
    (host.base / "net/plans" / f"{b.plan.machine_id}.json").unlink()
    host.call("remove", b.plan.machine_id)
    assert kept(host) == 0
    host.police(policy, a)  # one that is gone gets nothing
    assert kept(host) == 0
    assert host.call("list") == []
