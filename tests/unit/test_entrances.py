"""Which connections a host's firewall leads to its proxy, as rows of the view come and go."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.agent.doors import Doors
from pantala.errors import DriverError
from pantala.kit.clock import SystemClock
from pantala.net import Address, EntrancePlan, plan_entrances, rules
from pantala.net.entrances import RESERVED_PORTS, script, without
from pantala.testing.poll import until
from pantala.wire.feed import FeedRow

pytestmark = pytest.mark.anyio

SHARED, OWN, DEDICATED, DEDICATED6, FLYCAST = "203.0.113.1", "198.51.100.2", "203.0.113.7", "2001:db8::7", "fdaa:0:7::f"


def plan(edge: list[str], *, own: list[str] | None = None, used: set[int] | None = None) -> dict[str, tuple[str, ...]]:
    addresses = [
        Address(ip=DEDICATED),
        Address(ip=DEDICATED6),
        Address(ip=FLYCAST, private=True, network=8),
        Address(ip="fdaa:0:7::a", private=True),  # the app's network is not known yet
    ]
    made = plan_entrances(addresses, edge=edge, own=own or [OWN], declared=[(22, 25), (25, 30)], used=used or {28})
    assert set(made.elements) == set(rules.ENTRANCE_SETS)
    return {name: values for name, values in made.elements.items() if values}


def test_an_edge_takes_all_ports_of_public_addresses_but_those_of_its_sockets() -> None:
    assert plan([SHARED]) == {
        "edge4": (SHARED, DEDICATED),
        "edge6": (DEDICATED6,),
        "kept4": tuple(f"{SHARED} . {port}" for port in (443, 53, 80)),
        "flycast6": ("fdaa:0:8::/48 . fdaa:0:7::f",),
    }


def test_of_its_own_address_a_host_gives_what_is_declared_and_free() -> None:
    made = plan([OWN])
    assert made["own4"] == (f"{OWN} . 23-27", f"{OWN} . 29-30")
    assert OWN not in made["edge4"]
    assert "kept4" not in made


def test_a_host_that_is_no_edge_has_flycast_only() -> None:
    assert set(plan([])) == {"flycast6"}


RANGES = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 10)).map(lambda t: (t[0], t[0] + t[1])), max_size=8)


@given(RANGES, st.sets(st.integers(1, 100), max_size=12))
def test_ranges_without_holes_hold_exactly_the_rest(ranges: list[tuple[int, int]], holes: set[int]) -> None:
    made = without(ranges, holes)
    held = [port for first, last in made for port in range(first, last + 1)]
    wanted = {port for first, last in ranges for port in range(first, last + 1)} - holes
    assert len(held) == len(set(held))
    assert set(held) == wanted
    assert all(first <= last for first, last in made)


@given(RANGES)
def test_nobody_takes_a_hosts_own_ports(declared: list[tuple[int, int]]) -> None:
    elements = plan_entrances([], edge=[OWN], own=[OWN], declared=declared, used={5}).elements["own4"]
    for element in elements:
        first, _, last = element.partition(" . ")[2].partition("-")
        assert not (RESERVED_PORTS | {5}) & set(range(int(first), int(last or first) + 1))


def test_the_script_replaces_all_sets_at_once() -> None:
    text = script(EntrancePlan(elements={"edge4": ("203.0.113.1", "203.0.113.7")}))
    assert text.count("flush set") == len(rules.ENTRANCE_SETS)
    assert f"add element {rules.TABLE} edge4 {{ 203.0.113.1, 203.0.113.7 }}\n" in text


# -- as the agent keeps them -------------------------------------------------------------------------------------


class Firewall:
    def __init__(self) -> None:
        self.applied: list[EntrancePlan] = []
        self.fails = 0

    async def apply(self, plan: EntrancePlan) -> None:
        if self.fails:
            self.fails -= 1
            raise DriverError("nft failed", retry=True)
        self.applied.append(plan)

    async def listening(self, *addresses: str) -> set[int]:
        assert addresses == (OWN,)
        return {6000}


def row(key: str, value: dict[str, Any] | None) -> FeedRow:
    return FeedRow(stream="routes", key=key, value=value)


def service(*ports: dict[str, Any], protocol: str = "tcp") -> dict[str, Any]:
    return {"app": "web", "protocol": protocol, "internal_port": 80, "ports": list(ports), "concurrency": {}}


async def test_rows_that_come_and_go_change_what_is_led() -> None:
    doors = Doors(Firewall(), SystemClock(), edge=[OWN, SHARED], own=[OWN])
    doors.take(
        [
            row("app/web", {"app": "web", "org": "o", "network": 7}),
            row(f"addr/{FLYCAST}", {"kind": "private", "app": "web"}),
            row(f"addr/{DEDICATED}", {"kind": "dedicated", "app": "web"}),
            row("svc/web/d1", service({"port": 5432}, {"start_port": 5999, "end_port": 6001}, {"handlers": ["tls"]})),
            row("svc/web/d2", service({"port": 5353}, protocol="udp")),
        ]
    )
    elements = (await doors.plan()).elements
    assert elements["own4"] == (f"{OWN} . 5432", f"{OWN} . 5999", f"{OWN} . 6001")
    assert elements["edge4"] == (SHARED, DEDICATED)
    assert elements["flycast6"] == ("fdaa:0:7::/48 . fdaa:0:7::f",)
    doors.take([row(f"addr/{DEDICATED}", None), row("svc/web/d1", None), row("app/web", None)])
    elements = (await doors.plan()).elements
    assert (elements["own4"], elements["edge4"], elements["flycast6"]) == ((), (SHARED,), ())
    doors.take([row(f"addr/{FLYCAST}", {"kind": "private", "app": "web", "network": 9})])
    assert (await doors.plan()).elements["flycast6"] == (f"fdaa:0:9::/48 . {ip_address(FLYCAST)}",)


async def test_what_failed_is_made_again_and_what_is_there_is_left() -> None:
    firewall = Firewall()
    firewall.fails = 1
    doors = Doors(firewall, SystemClock(), edge=[SHARED], own=[OWN])

    async def applied() -> int:
        return len(firewall.applied)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(doors.run)
        await until(applied, lambda count: count == 1, within_s=15, every_s=0.01)
        doors.take([row(f"addr/{DEDICATED}", {"kind": "dedicated", "app": "web"})])
        await until(applied, lambda count: count == 2, within_s=15, every_s=0.01)
        doors.take([row("m/1", {}), row(f"addr/{DEDICATED}", {"kind": "dedicated", "app": "web"})])
        tasks.cancel_scope.cancel()
    assert firewall.applied[-1].elements["edge4"] == (SHARED, DEDICATED)
