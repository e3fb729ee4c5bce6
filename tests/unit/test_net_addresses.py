"""Addresses, names and texts of the network, without a network."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.domain.runtime import NetworkPlan
from pantala.net import links, rules, sixpn, slots, sockets
from pantala.net.rules import EgressPolicy

IDS = st.integers(1, 2**32 - 1)
PLAN = NetworkPlan(
    machine_id="148e127ad43d89",
    slot=2,
    network=0x18,
    ip4="172.19.0.10",
    gateway4="172.19.0.9",
    ip6="fdaa:0:18:0:7:0:5:2",
    uid_base=1_000_000,
)


def test_the_layout_of_the_reference() -> None:
    address = sixpn.machine_address(0x18, 0x0A7B007D, 0xF066B83B)
    assert str(address) == "fdaa:0:18:a7b:7d:f066:b83b:2"
    assert str(sixpn.network_prefix(0x18)) == "fdaa:0:18::/48"
    assert str(sixpn.host_prefix(0x18, 0x0A7B007D)) == "fdaa:0:18:a7b:7d::/80"


@given(IDS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_an_address_lies_in_its_networks_and_names_its_network(network: int, host: int, machine: int) -> None:
    address = sixpn.machine_address(network, host, machine)
    assert address in sixpn.network_prefix(network)
    assert address in sixpn.host_prefix(network, host)
    assert sixpn.network_of(address) == network
    assert sixpn.DNS not in sixpn.network_prefix(network)


@pytest.mark.parametrize("ids", [(0, 1, 1), (2**32, 1, 1), (1, -1, 1), (1, 1, 2**32)])
def test_ids_that_do_not_fit_are_refused(ids: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="id is"):
        sixpn.machine_address(*ids)


def test_a_public_address_has_no_network() -> None:
    with pytest.raises(ValueError, match="6PN"):
        sixpn.network_of(IPv6Address("2001:db8::1"))


def test_slots_are_disjoint_subnets_of_the_range() -> None:
    seen = set[str]()
    for slot in (*range(300), slots.SLOTS - 1):
        given_out = slots.addresses(slot)
        subnet = IPv4Network(f"{given_out.gateway}/30", strict=False)
        assert given_out.machine in subnet
        assert subnet.subnet_of(slots.RANGE)
        seen.add(str(subnet))
    assert len(seen) == 301
    assert slots.SLOTS == 16384
    with pytest.raises(ValueError, match="16383"):
        slots.addresses(slots.SLOTS)


def test_the_lowest_free_slot() -> None:
    assert slots.free_slot(set()) == 0
    assert slots.free_slot({0, 1, 3}) == 2
    assert slots.free_slot(set(range(slots.SLOTS))) is None


@given(st.text("0123456789abcdef", min_size=14, max_size=14))
def test_link_names_fit_and_differ(machine_id: str) -> None:
    name = links.link_name(machine_id)
    assert len(name) == 15
    assert name.startswith("pnt")
    assert name != links.link_name(machine_id + "0")


def test_a_machine_is_three_elements_and_no_rule() -> None:
    found = {element.pop("set"): element for element in rules.machine_elements(PLAN)}
    same = {"table": "pantala", "interface": links.link_name(PLAN.machine_id), "comment": "148e127ad43d89"}
    last = "fdaa:0:18:ffff:ffff:ffff:ffff:ffff"
    assert found == {
        "source4": same | {"first": "172.19.0.10", "last": None},
        "source6": same | {"first": "fdaa:0:18:0:7:0:5:2", "last": None},
        "network6": same | {"first": "fdaa:0:18::", "last": last},
    }


def test_private_ranges_are_the_operators_choice() -> None:
    assert "10.0.0.0/8" in rules.ruleset(EgressPolicy())
    allowed = rules.ruleset(EgressPolicy(allow_private_ranges=True))
    assert "10.0.0.0/8" not in allowed
    for closed in rules.CLOSED4 + rules.CLOSED6:
        assert closed in allowed


def test_further_closed_addresses_join_the_set_of_their_family() -> None:
    text = rules.ruleset(EgressPolicy(closed=("198.51.100.7", "2001:db8::/32")))
    closed4 = next(line for line in text.splitlines() if line.startswith("add element inet pantala closed4"))
    closed6 = next(line for line in text.splitlines() if line.startswith("add element inet pantala closed6"))
    assert "198.51.100.7/32" in closed4
    assert "2001:db8::/32" in closed6


def test_closed_ranges_hold_what_must_never_be_reached() -> None:
    def is_closed(address: str) -> bool:
        networks = [ip_network(text) for text in rules.CLOSED4 + rules.CLOSED6]
        return any(
            ip_address(address) in network for network in networks if network.version == ip_address(address).version
        )

    for address in ("169.254.169.254", "127.0.0.1", "172.19.3.4", "224.0.0.1", "255.255.255.255", "fe80::1", "fdaa::3"):
        assert is_closed(address), address
    for address in ("::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "fdaa:0:19::2"):
        assert is_closed(address), address
    for address in ("1.1.1.1", "2606:4700::1"):
        assert not is_closed(address), address


def test_both_ends_of_a_link() -> None:
    assert links.host_side(PLAN) == {
        "addresses": [("172.19.0.9", 30), ("fe80::1", 64)],
        "routes": [{"to": "fdaa:0:18:0:7:0:5:2", "length": 128, "via": None}],
    }
    machine = links.machine_side(PLAN)
    assert machine["addresses"] == [("172.19.0.10", 30), ("fdaa:0:18:0:7:0:5:2", 128)]
    assert [route["via"] for route in machine["routes"]] == ["172.19.0.9", "fe80::1"]


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5001 1 0 100 0 0 10 0
   1: 0A0013AC:0050 090013AC:D431 01 00000000:00000000 00:00000000 00000000     0        0 5002 1 0 20 4 30 10 -1
broken line
"""
TCP6 = """\
   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0     0        0 5003 1
   1: 0000AAFD000000001800000002000000:0051 00000000000000000000000000000000:0000 0A 0:0 00:0 0     0        0 5004 1
"""


def test_listening_sockets_are_read_from_the_kernels_tables() -> None:
    found = [(s.address, s.port, s.inode) for s in sockets.parse("tcp", TCP + TCP6)]
    assert found == [
        ("127.0.0.1", 8080, 5001),
        ("::", 80, 5003),
        ("fdaa::18:0:2", 81, 5004),
    ]
