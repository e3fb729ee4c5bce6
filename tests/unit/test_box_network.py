"""The box's network as texts: distances, routes, firewall, BIRD's configuration. Nothing is made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.box import distances, links, places, router, routing
from pantala.box.layout import EDGE_ADDRESS, ROUTER, Box, Host, Link, new_box
from pantala.box.network import batched, link_commands, up_commands
from pantala.box.router import Cuts
from pantala.control.regions import REGIONS
from pantala.errors import InvalidRequest

CODES = st.sampled_from([region.code for region in REGIONS])


def made(regions: tuple[str, ...] = ("iad", "lhr", "nrt"), **options: object) -> Box:
    box = new_box(
        state=Path("/s"), run=Path("/r"), cache=Path("/c"), regions=list(regions), idle_window_s=60, tuning={}
    )
    return msgspec.structs.replace(box, **options)


@pytest.mark.parametrize("number", [1, 3, 12, 35])
def test_control_expects_hosts_as_often_as_they_say_that_they_are_there(number: int) -> None:
    tuning = places.tuning(made(tuple(region.code for region in REGIONS)[:number]))
    assert tuning.server["beat_s"] == tuning.agent["beat_s"]
    faster = places.tuning(made(tuning={"agent.beat_s": "0.5"}))
    assert faster.server["beat_s"] == faster.agent["beat_s"] == 0.5


def test_the_network_is_made_by_few_programs_in_an_order_that_works() -> None:
    box = made(distances=True)
    batches = batched(up_commands(box))
    as_words = [[*command[:-2], *line.split()] for command, text in batches if text for line in text.splitlines()]
    as_words += [command for command, text in batches if text is None]
    assert sorted(as_words) == sorted(up_commands(box))
    assert len(batches) <= 2 + len(box.namespaces()) + 4
    programs = [" ".join(command) for command, _ in batches]
    assert programs[:2] == ["ip -batch -", f"ip -n {ROUTER} -batch -"]


SYDNEY = Host(node="syd-1", region="syd", link=Link(netns="pnt-syd-1", third=4))


# -- distances


@given(CODES, CODES)
def test_a_way_is_as_long_as_the_way_back(a: str, b: str) -> None:
    assert distances.rtt_ms(a, b) == distances.rtt_ms(b, a)
    assert (distances.rtt_ms(a, b) == 0) == (a == b)
    assert distances.rtt_ms(a, b) < 400


def test_distances_are_those_of_the_earth() -> None:
    assert distances.matrix(["iad", "lhr", "nrt"]) == [[0, 75, 160], [75, 0, 220], [160, 220, 0]]
    assert 60 < distances.rtt_ms("ams", "ewr") < 95
    assert distances.rtt_ms("iad", "own") == distances.UNKNOWN_MS
    assert distances.nearest_first("cdg", ["nrt", "iad", "fra"]) == ["fra", "iad", "nrt"]


# -- the router


def elements(rules: str, name: str) -> set[str]:
    line = next(line for line in rules.splitlines() if re.match(rf"\s+(set|map) {name} ", line))
    found = re.search(r"elements = \{ (.*) \}; \}|elements = \{ (.*) \} \}", line)
    return set((found.group(1) or found.group(2)).split(", ")) if found else set()


def test_packets_between_regions_wait_and_those_within_one_do_not() -> None:
    rules = router.router_rules(made(distances=True), Cuts())
    far = elements(rules, "far")
    assert '"to-1" . "to-2"' in far
    assert '"to-101" . "to-3"' in far  # a client to a host abroad
    assert '"to-101" . "to-1"' not in far
    assert len(far) == 6 * 4
    assert elements(router.router_rules(made(), Cuts()), "far") == set()


def test_a_cut_region_is_cut_in_both_directions_from_clients_too() -> None:
    cut = elements(router.router_rules(made(), Cuts(regions=frozenset({"nrt"}))), "cut")
    assert {'"to-3" . "to-1"', '"to-1" . "to-3"', '"to-103" . "to-2"', '"to-101" . "to-3"'} <= cut
    assert '"to-103" . "to-3"' not in cut
    assert '"to-1" . "to-2"' not in cut


def test_a_cut_node_is_alone() -> None:
    rules = router.router_rules(made(), Cuts(nodes=frozenset({"lhr-1"})))
    assert elements(rules, "isolated") == {'"to-2"'}
    assert elements(rules, "cut") == set()


def test_cuts_name_what_there_is() -> None:
    box = made(attached=[SYDNEY])
    cuts = router.add_cut(box, router.add_cut(box, Cuts(loss=0.1), "syd"), "iad-1")
    assert cuts == Cuts(regions=frozenset({"syd"}), nodes=frozenset({"iad-1"}), loss=0.1)
    assert router.heal(cuts, ["syd"]) == Cuts(nodes=frozenset({"iad-1"}), loss=0.1)
    assert router.heal(cuts, []) == Cuts()
    with pytest.raises(InvalidRequest, match="fra is neither a region nor a node"):
        router.add_cut(box, cuts, "fra")
    with pytest.raises(InvalidRequest, match="lhr is not cut off; iad-1, syd is"):
        router.heal(cuts, ["lhr"])


def test_the_relay_knows_every_device_and_every_pair() -> None:
    settings = json.loads(router.relay_settings(made(attached=[SYDNEY]), loss=0.25))
    assert settings["devices"]["to-4"] == "syd"
    assert settings["devices"]["to-102"] == "lhr"
    assert "to-200" not in settings["devices"]  # builds are nowhere
    assert {"a": "iad", "b": "nrt", "rtt_ms": 160.0, "loss": 0.25} in settings["pairs"]
    assert len(settings["pairs"]) == 6


def test_every_link_is_routed_by_its_region_and_unrouted_the_same() -> None:
    box = made(attached=[SYDNEY])
    assert router.region_table(box, "syd") == 1004
    commands = [" ".join(command) for command in router.routing_commands(box, box.clients()[1])]
    rule = f"-n {router.ROUTER} rule add pref 2000 iif to-102 lookup 1002"
    assert commands == [f"ip {rule}", f"ip -6 {rule}"]
    host = [" ".join(command) for command in router.routing_commands(box, SYDNEY.link)]
    assert [line.replace(" add ", " del ") for line in host if "rule" in line] == [
        " ".join(command) for command in router.unrouting_commands(box, SYDNEY.link)
    ]


def test_a_box_of_one_host_needs_no_bird() -> None:
    box = made(("iad",))
    assert routing.plan_routing(box) == []
    route = ["ip", "-n", router.ROUTER, "route", "add", f"{EDGE_ADDRESS}/32", "via", box.control().link.address]
    assert any(command[: len(route)] == route for command in up_commands(box))


def test_only_edges_have_the_edge_address() -> None:
    worker = msgspec.structs.replace(SYDNEY, edge=False)
    for host, has in ((SYDNEY, True), (worker, False)):
        commands = link_commands(made(attached=[host]), host.link)
        assert any(f"{EDGE_ADDRESS}/32" in command for command in commands) == has
    assert worker not in made(attached=[worker]).edges()


# -- BIRD


def preferences(configuration: str, table: str) -> dict[str, int]:
    pipe = configuration[configuration.index(f"protocol pipe pipe_{table} ") :].split("protocol kernel", maxsplit=1)[0]
    found = re.findall(r"from = [\d.]+\.(\d+)\.2 then \{ preference = (\d+)", pipe)
    return {third: int(preference) for third, preference in found}


def test_the_nearest_edge_is_preferred_and_each_region_has_its_table() -> None:
    configuration = routing.router_configuration(made(), Cuts())
    assert preferences(configuration, "near_nrt") == {"3": 200, "1": 199, "2": 198}
    assert preferences(configuration, "near_lhr") == {"2": 200, "1": 199, "3": 198}
    assert preferences(configuration, "near_all") == preferences(configuration, "near_iad")
    tables = re.findall(r"kernel table (\d+)", configuration)
    assert sorted(map(int, tables)) == [254, 254, *[1001] * 2, *[1002] * 2, *[1003] * 2, 2001, 2002, 2003]


def test_edges_that_are_cut_off_do_not_count() -> None:
    configuration = routing.router_configuration(made(), Cuts(regions=frozenset({"nrt"})))
    assert preferences(configuration, "near_nrt") == {"3": 200}
    assert preferences(configuration, "near_iad") == {"1": 200, "2": 199}


def test_greetings_are_rarer_with_many_hosts() -> None:
    codes = tuple(region.code for region in REGIONS)
    few, many = made(), made(codes)
    assert "interval 50 ms; multiplier 3" in routing.router_configuration(few, Cuts())
    assert "interval 300 ms; multiplier 3" in routing.router_configuration(many, Cuts())
    assert "interval 20 ms" in routing.edge_configuration(made(bfd_ms=20), few.control())
    assert few.lame_duck_ms > 3 * few.health_interval_ms


# -- links


def test_what_agents_are_told_of_links() -> None:
    box = made()
    plain = links.agent_links(box, box.hosts()[1])
    assert (plain.links, plain.link_device, plain.link_via) == ("plain", "eth0", box.hosts()[1].link.gateway6)
    tunnel = links.agent_links(made(links_kind="wireguard"), box.hosts()[1])
    assert (tunnel.links, tunnel.link_device, tunnel.link_via) == ("wireguard", box.hosts()[1].wireguard_device, "")
    assert len(tunnel.link_device) <= 15
