"""What network policies mean, how they travel, and that machines of a host get them. Source: machines reference, 14."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.agent.certs import EdgeCertificates
from pantala.agent.policies import Policies
from pantala.catalogue.view import View, why_set_aside
from pantala.domain import policies
from pantala.domain.policies import Allowed, allowed, rows
from pantala.domain.runtime import NetworkPlan
from pantala.errors import DriverError
from pantala.kit.sealing import Opener
from pantala.net import links, rules
from pantala.testing.agent import APP, RunningAgent, World, config
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.catalogue import OwnedRow, PolicyRow
from pantala.wire.feed import FeedRow
from pantala.wire.network_policies import (
    Direction,
    PolicyMachine,
    PolicyPort,
    PolicyRule,
    PolicySelector,
    Protocol,
)

pytestmark = pytest.mark.anyio

ALL = PolicySelector(all=True)
WEB = PolicySelector(metadata={"role": "web", "env": "production"})


def rule(direction: Direction, *ports: tuple[Protocol, int]) -> PolicyRule:
    return PolicyRule(
        action="allow",
        direction=direction,
        ports=[PolicyPort(protocol=protocol, port=port) for protocol, port in ports],
    )


# -- what they mean ------------------------------------------------------------------------------------------------


def test_without_a_policy_all_is_open_and_the_first_rule_closes_its_direction_only() -> None:
    assert allowed([], "m1", {}) == Allowed(ingress=None, egress=None)
    made = rows("web", ALL, [rule("egress", ("tcp", 443), ("tcp", 80))])
    assert allowed(made, "m1", {}) == Allowed(ingress=None, egress=(("tcp", 80), ("tcp", 443)))


def test_a_rule_without_ports_closes_and_opens_nothing() -> None:
    assert allowed(rows("web", ALL, [rule("ingress")]), "m1", {}) == Allowed(ingress=(), egress=None)


@pytest.mark.parametrize(
    ("selector", "machine_id", "metadata", "holds"),
    [
        (ALL, "m1", {}, True),
        (PolicySelector(machines=[PolicyMachine(id="m1"), PolicyMachine(id="m2")]), "m2", {}, True),
        (PolicySelector(machines=[PolicyMachine(id="m1")]), "m2", {}, False),
        (WEB, "m1", {"role": "web", "env": "production", "more": "x"}, True),
        (WEB, "m1", {"role": "web"}, False),
        (WEB, "m1", {"role": "web", "env": "staging"}, False),
        (PolicySelector(machines=[PolicyMachine(id="m1")], metadata={"role": "web"}), "m1", {"role": "db"}, False),
        (PolicySelector(all=True, machines=[PolicyMachine(id="m1")]), "m2", {}, False),
    ],
    ids=["all", "one of ids", "other id", "metadata", "a pair is missing", "a pair differs", "id alone", "all and id"],
)
def test_selectors(selector: PolicySelector, machine_id: str, metadata: dict[str, str], holds: bool) -> None:
    found = allowed(rows("web", selector, [rule("ingress", ("tcp", 80))]), machine_id, metadata)
    assert found == Allowed(ingress=(("tcp", 80),) if holds else None, egress=None)


IDS = st.integers(0, 9).map(lambda number: f"m{number}")
METADATA = st.dictionaries(st.sampled_from("abc"), st.sampled_from("xy"))
PORTS = st.builds(
    PolicyPort, protocol=st.sampled_from(["tcp", "udp"]), port=st.integers(1, 40) | st.integers(65_500, 65_535)
)
RULES = st.lists(
    st.builds(
        PolicyRule,
        action=st.just("allow"),
        direction=st.sampled_from(["ingress", "egress"]),
        ports=st.lists(PORTS, max_size=15),
    ),
    max_size=3,
)
SELECTORS = st.builds(
    PolicySelector,
    all=st.booleans(),
    machines=st.lists(IDS.map(lambda name: PolicyMachine(id=name)), max_size=9),
    metadata=METADATA,
)
POLICIES = st.lists(st.tuples(SELECTORS, RULES), max_size=3)


@given(POLICIES, IDS, METADATA)
def test_a_machine_may_what_some_policy_for_it_says_and_no_more(
    known: list[tuple[PolicySelector, list[PolicyRule]]], machine_id: str, metadata: dict[str, str]
) -> None:
    """The sentences of the reference, said a second time without rows."""
    mine = [
        rule
        for selector, rules in known
        if not selector.machines or machine_id in {machine.id for machine in selector.machines}
        if selector.metadata.items() <= metadata.items()
        for rule in rules
    ]
    found = allowed([row for selector, rules in known for row in rows("a", selector, rules)], machine_id, metadata)
    for direction in policies.DIRECTIONS:
        speaking = [rule for rule in mine if rule.direction == direction]
        wanted = {(port.protocol, port.port) for rule in speaking for port in rule.ports}
        got = getattr(found, direction)
        assert (got is None) == (not speaking)
        assert set(got or ()) == wanted


@given(SELECTORS, RULES)
def test_rows_stay_small(selector: PolicySelector, rules: list[PolicyRule]) -> None:
    selector = msgspec.structs.replace(
        selector,
        machines=[PolicyMachine(id=f"{number:014x}") for number in range(len(selector.machines))],
        metadata={"k": "v" * 119} if selector.metadata else {},
    )
    for row in rows("a" * 63, selector, rules):
        assert len(msgspec.json.encode(row)) <= 512


@given(POLICIES, st.tuples(SELECTORS, RULES), IDS, METADATA)
def test_another_policy_opens_more_or_is_the_first_of_its_direction(
    known: list[tuple[PolicySelector, list[PolicyRule]]],
    more: tuple[PolicySelector, list[PolicyRule]],
    machine_id: str,
    metadata: dict[str, str],
) -> None:
    before = [row for selector, rules in known for row in rows("a", selector, rules)]
    old = allowed(before, machine_id, metadata)
    new = allowed([*before, *rows("a", *more)], machine_id, metadata)
    for was, now in ((old.ingress, new.ingress), (old.egress, new.egress)):
        assert was is None or (now is not None and set(was) <= set(now))


@pytest.mark.parametrize("text", ["icmp/1", "tcp/0", "tcp/65536", "tcp/80-90", "tcp", "tcp/ 80", "tcp/80 }; drop"])
def test_what_a_later_version_may_say_opens_nothing(text: str) -> None:
    row = PolicyRow(app="a", direction="ingress", ports=[text, "tcp/80"])
    assert allowed([row], "m1", {}) == Allowed(ingress=(("tcp", 80),))


# -- the firewall --------------------------------------------------------------------------------------------------

PLAN = NetworkPlan(
    machine_id="148e127ad43d89",
    slot=2,
    network=0x18,
    ip4="172.19.0.10",
    gateway4="172.19.0.9",
    ip6="fdaa:0:18:0:7:0:5:2",
    uid_base=1_000_000,
)
LINK = links.link_name(PLAN.machine_id)


def test_a_policy_is_elements_of_the_same_transaction_and_what_was_before_goes() -> None:
    open_to_all = rules.add_machine(PLAN)
    assert "ruled_" not in open_to_all
    plan = msgspec.structs.replace(PLAN, allowed=Allowed(ingress=(("tcp", 80),), egress=()))
    former = [Allowed(ingress=(("tcp", 80), ("udp", 53)))]
    script = rules.add_machine(plan, former)
    assert script.startswith(
        f'add element inet pantala open_in {{ "{LINK}" . udp . 53 comment "{PLAN.machine_id}" }}\n'
    )
    assert [line for line in script.splitlines() if line.startswith("delete")] == [
        f'delete element inet pantala open_in {{ "{LINK}" . udp . 53 }}'
    ]
    for name, element in (("ruled_in", ""), ("open_in", " . tcp . 80"), ("ruled_out", "")):
        assert f'add element inet pantala {name} {{ "{LINK}"{element} comment' in script
    assert open_to_all in script
    removed = rules.remove_machine(plan, former)
    assert removed.count("delete element") == 3 + 4
    assert removed.count("add element") == removed.count("delete element")


# -- the catalogue -------------------------------------------------------------------------------------------------


def test_only_control_speaks_of_policies_and_only_under_their_app() -> None:
    row = OwnedRow(
        stream="routes",
        key="policy/web/p1/0",
        seq=1,
        value=msgspec.to_builtins(PolicyRow(app="web", direction="egress")),
    )
    assert why_set_aside("control", row, control="control") == ""
    assert "does not own" in why_set_aside("node-1", row, control="control")
    other = msgspec.structs.replace(row, key="policy/webby/p1/0")
    assert "another app" in why_set_aside("control", other, control="control")


def test_the_proxy_does_not_hear_of_them() -> None:
    certificates = EdgeCertificates(View(control="control"), Opener(b"k" * 32), node="node-1")
    shown = certificates.for_proxy(
        [FeedRow(stream="routes", key=key, value={}) for key in ("policy/web/p/0", "app/web")]
    )
    assert [row.key for row in shown] == ["app/web"]


# -- the agent -----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def app(name: str = "hello", *, there: bool = True) -> FeedRow:
    return FeedRow(stream="routes", key=f"app/{name}", value={"app": name} if there else None)


def policy(direction: Direction, *ports: str, name: str = "hello", key: str = "p1/0", **more: Any) -> FeedRow:
    row = PolicyRow(app=name, direction=direction, ports=list(ports), **more)
    return FeedRow(stream="routes", key=f"policy/{name}/{key}", value=msgspec.to_builtins(row))


def gone(row: FeedRow) -> FeedRow:
    return msgspec.structs.replace(row, value=None)


OTHER, OTHER_MACHINE = "other", "e7d8d9510a2951"


async def network_made(agent: RunningAgent, world: World) -> None:
    await agent.create()
    await until(lambda: _plans(world), lambda plans: len(plans) == 1, within_s=15)


async def _plans(world: World) -> list[Allowed | None]:
    """Of the machines of the app `hello`."""
    await anyio.lowlevel.checkpoint()
    return [plan.allowed for plan in world.network.plans.values() if plan.machine_id != OTHER_MACHINE]


EGRESS = Allowed(egress=(("tcp", 443),))


async def reaches(world: World, wanted: Allowed) -> None:
    await until(lambda: _plans(world), lambda plans: plans == [wanted], within_s=15)


async def test_a_machine_meets_its_policies_with_its_network(world: World) -> None:
    world.policies.take([app(), policy("egress", "tcp/443"), policy("egress", "tcp/25", name="other")])
    async with world.agent() as agent:
        await network_made(agent, world)
        assert await _plans(world) == [EGRESS]


async def test_a_change_reaches_machines_that_are_there_without_a_restart(world: World) -> None:
    async with world.agent() as agent:
        world.policies.take([app()])
        made = await agent.create(config=config(metadata={"role": "db"}))
        await reaches(world, Allowed())
        chosen = policy("egress", "tcp/443", metadata={"role": "web"})
        world.policies.take([chosen, policy("ingress", key="p2/0", machines=["nobody"])])
        await agent.do(node.PatchMetadata, metadata={"role": "web"})
        await reaches(world, EGRESS)
        assert (await agent.get()).instance_id == made.instance_id
        world.policies.take([gone(chosen)])
        await reaches(world, Allowed())


async def test_nothing_opens_when_an_app_is_deleted_or_not_known_yet(world: World) -> None:
    """A machine of another app shows that the changes have been looked at."""

    async def looked_at(wanted: Allowed) -> None:
        async def seen() -> Allowed | None:
            await anyio.lowlevel.checkpoint()
            plan = world.network.plans.get(OTHER_MACHINE)
            return plan.allowed if plan is not None else None

        await until(seen, lambda allowed: allowed == wanted, within_s=15)

    chosen = policy("egress", "tcp/443")
    world.policies.take([app(), chosen, app(OTHER)])
    async with world.agent() as agent:
        await network_made(agent, world)
        await agent.create(OTHER_MACHINE, app=msgspec.structs.replace(APP, name=OTHER))
        await looked_at(Allowed())
        world.policies.take([app(there=False), gone(chosen), policy("egress", "tcp/1", name=OTHER)])
        await looked_at(Allowed(egress=(("tcp", 1),)))
        assert await _plans(world) == [EGRESS]
    world.policies = Policies()
    world.policies.take([app(OTHER), policy("egress", "tcp/2", name=OTHER)])
    async with world.agent():
        await looked_at(Allowed(egress=(("tcp", 2),)))
        assert await _plans(world) == [EGRESS]


async def test_an_agent_that_comes_back_applies_what_changed_meanwhile(world: World) -> None:
    world.policies.take([app()])
    async with world.agent() as agent:
        await network_made(agent, world)
    world.policies.take([policy("egress", "tcp/443")])
    async with world.agent():
        await reaches(world, EGRESS)


async def test_what_failed_is_tried_again(world: World) -> None:
    world.policies.take([app()])
    async with world.agent() as agent:
        await network_made(agent, world)
        world.network.failures = [DriverError("nft failed: busy")] * 2
        world.policies.take([policy("egress", "tcp/443")])
        await reaches(world, EGRESS)
    assert not world.network.failures
