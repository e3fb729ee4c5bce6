"""The network of a host, for real: namespaces, packets, and nothing left. `host_rig.py` draws it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_rig import (
    CONNECT,
    HOST,
    METADATA,
    PRIVATE,
    PYTHON,
    RECEIVE,
    SEND,
    SERVER,
    Host,
    Machine,
    where_prefix,
)

from pantala.net import links
from pantala.testing.scratch import scratch

pytestmark = [pytest.mark.root]


@pytest.fixture
def host() -> Iterator[Host]:
    # A short path of its own: it is bound to by name.
    made = Host(scratch("net"))
    try:
        made.call("setup")
        yield made
    finally:
        made.close()


def test_machines_of_one_network_reach_each_other_and_others_do_not(host: Host) -> None:
    a, b, c = host.add(7, 0), host.add(7, 1), host.add(8, 2)
    for machine in (b, c):
        host.serve(machine, machine.plan.ip6, 7000)
        host.serve(machine, machine.plan.ip4, 7000)
    assert a.reach(b.plan.ip6) == a.plan.ip6
    assert a.reach(c.plan.ip6).startswith("refused")
    assert a.reach(b.plan.ip4).startswith("refused")
    assert a.reach(c.plan.ip4).startswith("refused")
    assert c.reach(b.plan.ip6).startswith("refused")


def test_the_host_reaches_its_machines(host: Host) -> None:
    a = host.add(7, 0)
    host.serve(a, "0.0.0.0", 80)
    host.serve(a, a.plan.ip6, 7000)
    answer = host.host.run(*PYTHON, CONNECT, a.plan.ip4, "80", "3").strip()
    assert answer == a.plan.gateway4
    assert host.host.run(*PYTHON, CONNECT, a.plan.ip6, "7000", "3").strip() == "fdaa::3"


def test_egress_is_translated(host: Host) -> None:
    a = host.add(7, 0)
    host.serve(host.outside, SERVER, 7000)
    host.serve(host.outside, "2001:db8::1", 7000)
    assert a.reach(SERVER) == HOST
    assert a.reach("2001:db8::1") == "2001:db8::2"


def test_closed_addresses_are_refused_at_once(host: Host) -> None:
    a = host.add(7, 0)
    host.host.run("ip", "route", "add", f"{METADATA}/32", "via", SERVER)
    for where, address in (
        (host.outside, METADATA),
        (host.outside, PRIVATE),
        (host.host, HOST),
        (host.host, "10.50.0.2"),
        (host.host, a.plan.gateway4),
        (host.host, "2001:db8::2"),
    ):
        host.serve(where, address, 7000)
        answer = a.reach(address)
        assert answer.startswith("refused"), (address, answer)
        assert "timed out" not in answer, (address, answer)


def test_private_ranges_open_when_the_operator_says_so(host: Host) -> None:
    a = host.add(7, 0)
    host.options = {"allow_private_ranges": True}
    host.call("setup")
    host.host.run("ip", "route", "add", f"{METADATA}/32", "via", SERVER)
    host.serve(host.outside, PRIVATE, 7000)
    host.serve(host.outside, METADATA, 7000)
    assert a.reach(PRIVATE) == "10.50.0.2"
    assert a.reach(METADATA).startswith("refused")


def test_the_platforms_address_serves_dns_and_api_only(host: Host) -> None:
    a = host.add(7, 0)
    for port in (53, 4280, 7000):
        host.serve(host.host, "fdaa::3", port)
    assert a.reach("fdaa::3", 53) == a.plan.ip6
    assert a.reach("fdaa::3", 4280) == a.plan.ip6
    assert a.reach("fdaa::3", 7000).startswith("refused")


def test_a_forged_source_goes_nowhere(host: Host) -> None:
    """Root of the host plays a machine that could change its addresses, which a machine itself cannot.

    Datagrams, since they need no answer: the resolver would take them for the other machine's.
    """
    a, c = host.add(7, 0), host.add(8, 2)
    resolver = subprocess.Popen(
        [*where_prefix(host.host), *PYTHON, RECEIVE, "fdaa::3", "53"], stdout=subprocess.PIPE, text=True
    )
    host.others.append(resolver)
    assert resolver.stdout is not None
    assert resolver.stdout.readline() == "ready\n"
    inside = ["nsenter", f"--net={c.handle['netns']}", "--"]
    subprocess.run([*inside, "ip", "addr", "add", f"{a.plan.ip6}/128", "dev", "eth0", "nodad"], check=True)
    for source in (a.plan.ip6, c.plan.ip6):
        subprocess.run([*inside, *PYTHON, SEND, source, "fdaa::3", "53"], check=True)
    assert resolver.stdout.readline().strip() == c.plan.ip6


def test_a_machine_owns_its_namespace_with_its_ids(host: Host) -> None:
    a = host.add(7, 0)
    shown = subprocess.run(
        [
            *("nsenter", f"--net={a.handle['netns']}", f"--user={a.handle['userns']}", "--"),
            *("cat", "/proc/self/uid_map", "/proc/sys/net/ipv4/ip_unprivileged_port_start"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown == ["0", str(a.plan.uid_base), "65536", "0"]


def test_listening_sockets_of_a_machine(host: Host) -> None:
    a = host.add(7, 0)
    assert host.call("listening", a.plan.machine_id) == []
    host.serve(a, "127.0.0.1", 8080)
    found = host.call("listening", a.plan.machine_id)
    assert [(s["proto"], s["address"], s["port"]) for s in found] == [("tcp", "127.0.0.1", 8080)]
    assert found[0]["inode"] > 0


def test_nft_and_ip_read_what_was_written(host: Host) -> None:
    """The helper writes it without them; operators, and removal without a plan, read it by them."""
    a = host.add(7, 0)
    plan, name = a.plan, links.link_name(a.plan.machine_id)
    listed = host.host.run("nft", "list", "table", "inet", "pantala")
    for element in (plan.ip4, plan.ip6, "fdaa:0:7::/48"):
        assert f'"{name}" . {element} comment "{plan.machine_id}"' in listed

    (link,) = json.loads(host.host.run("ip", "-json", "addr", "show", "dev", name))
    assert f"alias pantala:{plan.machine_id}" in host.host.run("ip", "link", "show", "dev", name)
    assert "UP" in link["flags"]
    assert {(one["local"], one["prefixlen"]) for one in link["addr_info"]} == {(plan.gateway4, 30), ("fe80::1", 64)}
    assert f"{plan.ip6} dev {name}" in host.host.run("ip", "-6", "route")

    inside = ["nsenter", f"--net={a.handle['netns']}", "--", "ip", "-json"]
    shown = subprocess.run([*inside, "addr", "show", "dev", "eth0"], capture_output=True, check=True).stdout
    (link,) = json.loads(shown)
    given = {(one["local"], one["prefixlen"]) for one in link["addr_info"] if one["scope"] == "global"}
    assert given == {(plan.ip4, 30), (plan.ip6, 128)}
    for family, gateway in (("-4", plan.gateway4), ("-6", "fe80::1")):
        routes = subprocess.run([*inside, family, "route", "show", "default"], capture_output=True, check=True).stdout
        assert [route["gateway"] for route in json.loads(routes)] == [gateway]


@pytest.mark.parametrize("left", ["link", "pins", "elements"])
def test_what_a_dead_helper_left_is_found_and_finished(host: Host, left: str) -> None:
    """Each part alone, as after a kill between any two of its steps; then made whole, then removed."""
    a = host.add(7, 0)
    name = links.link_name(a.plan.machine_id)
    if left != "link":
        host.host.run("ip", "link", "delete", "dev", name)
    if left != "pins":
        for pin in ("netns", "userns"):
            subprocess.run(["umount", a.handle[pin]], check=True)
    if left != "elements":
        for element_set, address in (("source4", a.plan.ip4), ("source6", a.plan.ip6), ("network6", "fdaa:0:7::/48")):
            host.host.run("nft", "delete", "element", "inet", "pantala", element_set, f'{{ "{name}" . {address} }}')
    assert host.call("list") == [a.plan.machine_id]
    again = Machine(host, a.plan)
    b = host.add(7, 1)
    host.serve(again, a.plan.ip6, 7000)
    assert b.reach(a.plan.ip6) == b.plan.ip6
    host.call("remove", a.plan.machine_id)
    assert host.call("list") == [b.plan.machine_id]
    assert name not in host.host.run("nft", "list", "table", "inet", "pantala")


def test_everything_repeats_safely(host: Host) -> None:
    a = host.add(7, 0)
    host.serve(a, a.plan.ip6, 7000)
    again = Machine(host, a.plan)
    assert again.handle == a.handle
    host.call("setup")
    b = host.add(7, 1)
    assert b.reach(a.plan.ip6) == b.plan.ip6
    assert host.call("list") == sorted([a.plan.machine_id, b.plan.machine_id])


def test_removal_leaves_nothing(host: Host) -> None:
    a = host.add(7, 0)
    name = links.link_name(a.plan.machine_id)
    assert name in host.host.run("ip", "link")
    for _ in range(2):
        host.call("remove", a.plan.machine_id)
        assert host.call("list") == []
    assert name not in host.host.run("ip", "link")
    assert a.plan.ip6 not in host.host.run("nft", "list", "table", "inet", "pantala")
    assert name not in host.host.run("nft", "list", "table", "inet", "pantala")
    assert str(host.base) not in Path("/proc/self/mountinfo").read_text()
    assert [path for path in host.base.rglob("*") if path.is_file()] == []


def test_removal_finds_what_has_lost_its_plan(host: Host) -> None:
    a = host.add(7, 0)
    (host.base / "net/plans" / f"{a.plan.machine_id}.json").unlink()
    assert host.call("list") == [a.plan.machine_id]
    host.call("remove", a.plan.machine_id)
    assert host.call("list") == []
    assert a.plan.ip6 not in host.host.run("nft", "list", "table", "inet", "pantala")


def test_a_running_machine_keeps_its_namespace_when_pins_are_lost(host: Host) -> None:
    """As after the death of an agent whose mounts were its own."""
    a, b = host.add(7, 0), host.add(7, 1)
    host.serve(a, a.plan.ip6, 7000)
    for name in ("netns", "userns"):
        subprocess.run(["umount", a.handle[name]], check=True)
    again = Machine(host, a.plan)
    assert b.reach(a.plan.ip6) == b.plan.ip6
    assert [s["port"] for s in host.call("listening", a.plan.machine_id)] == [7000]
    assert again.handle == a.handle


def test_a_namespace_without_pins_and_processes_is_made_anew(host: Host) -> None:
    a, b = host.add(7, 0), host.add(7, 1)
    for name in ("netns", "userns"):
        subprocess.run(["umount", a.handle[name]], check=True)
    again = Machine(host, a.plan)
    host.serve(again, a.plan.ip6, 7000)
    assert b.reach(a.plan.ip6) == b.plan.ip6


def test_teardown_leaves_no_firewall(host: Host) -> None:
    host.add(7, 0)
    host.call("teardown")
    assert host.host.run("nft", "list", "tables") == ""
    assert "fdaa::3" not in host.host.run("ip", "-6", "addr")
    assert host.call("list") == []
    host.call("setup")
    host.call("setup")
    assert "pantala" in host.host.run("nft", "list", "tables")
