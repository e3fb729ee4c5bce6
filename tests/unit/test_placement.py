"""The placement planner: properties over any cluster, and the sentence of a refusal."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import CapacityError
from pantala.planner.placement import Ask, Candidate, Fleet, excluded_by

REGIONS = ("iad", "lhr", "nrt")


def node(name: str = "a", **changes: object) -> Candidate:
    values: dict[str, object] = {
        "id": name,
        "region": "iad",
        "zone": "z1",
        "reachable": True,
        "draining": False,
        "isolation": "container",
        "cpus_free": 4.0,
        "memory_mib": 8192,
        "memory_mib_free": 8192,
        "disk_mib_free": 10_000,
        "orgs": frozenset(),
    }
    return Candidate(**(values | changes))  # pyright: ignore[reportArgumentType]


def ask(**changes: object) -> Ask:
    values: dict[str, object] = {
        "org": 1,
        "regions": [frozenset({"iad"})],
        "cpus": 1,
        "shared_cpu": True,
        "memory_mib": 256,
    }
    return Ask(**(values | changes))  # pyright: ignore[reportArgumentType]


def choose(wanted: Ask, nodes: list[Candidate]) -> Candidate:
    return Fleet(nodes).choose(wanted)


nodes_strategy = st.lists(
    st.builds(
        node,
        name=st.integers(0, 99).map(lambda n: f"n{n}"),
        region=st.sampled_from(REGIONS),
        zone=st.sampled_from(("z1", "z2")),
        reachable=st.booleans(),
        draining=st.booleans(),
        isolation=st.sampled_from(("vm", "container")),
        cpus_free=st.floats(0, 8),
        memory_mib_free=st.integers(0, 8192),
        disk_mib_free=st.integers(0, 10_000),
        orgs=st.frozensets(st.integers(1, 3), max_size=3),
    ),
    max_size=12,
    unique_by=lambda candidate: candidate.id,
)
asks = st.builds(
    ask,
    regions=st.lists(st.frozensets(st.sampled_from(REGIONS), min_size=1), min_size=1, max_size=3),
    cpus=st.integers(1, 4),
    shared_cpu=st.booleans(),
    memory_mib=st.integers(1, 32).map(lambda n: n * 256),
    disk_mib=st.integers(0, 5000),
    shared_kernel=st.booleans(),
    refused=st.frozensets(st.integers(0, 99).map(lambda n: f"n{n}"), max_size=4),
    present=st.dictionaries(st.integers(0, 99).map(lambda n: f"n{n}"), st.integers(0, 4), max_size=6),
    volume_nodes=st.none() | st.frozensets(st.integers(0, 99).map(lambda n: f"n{n}"), max_size=4),
)


@given(asks, nodes_strategy)
def test_the_choice_fits_and_is_none_only_when_nothing_does(wanted: Ask, nodes: list[Candidate]) -> None:
    fitting = [candidate for candidate in nodes if excluded_by(wanted, candidate) is None]
    if not fitting:
        with pytest.raises(CapacityError) as refused:
            choose(wanted, nodes)
        assert sum(refused.value.excluded.values()) == len(nodes)
        assert refused.value.status == "insufficient_capacity"
        return
    chosen = choose(wanted, nodes)
    assert chosen in fitting
    assert chosen.memory_mib_free >= wanted.memory_mib
    assert chosen.id not in wanted.refused
    first = next(r for r in wanted.regions if any(candidate.region in r for candidate in fitting))
    assert chosen.region in first
    same = [c for c in fitting if c.region in first]
    assert wanted.present.get(chosen.id, 0) == min(wanted.present.get(candidate.id, 0) for candidate in same)


@given(asks, nodes_strategy)
def test_the_order_of_the_view_does_not_matter(wanted: Ask, nodes: list[Candidate]) -> None:
    def outcome(given_nodes: list[Candidate]) -> object:
        try:
            return choose(wanted, given_nodes)
        except CapacityError as error:
            return error.message

    assert outcome(nodes) == outcome(list(reversed(nodes)))


def test_machines_of_one_app_spread_over_nodes_then_zones() -> None:
    view = [node("a", zone="z1"), node("b", zone="z1"), node("c", zone="z2", memory_mib_free=1024)]
    assert choose(ask(present={"a": 1}), view).id == "c"
    assert choose(ask(present={"a": 1, "c": 1}), view).id == "b"
    assert choose(ask(present={"a": 2, "b": 2, "c": 1}), view).id == "c"


def test_a_machine_goes_where_its_volume_is() -> None:
    view = [node("a"), node("b", memory_mib_free=300)]
    assert choose(ask(volume_nodes=frozenset({"b"})), view).id == "b"
    with pytest.raises(CapacityError) as refused:
        choose(ask(volume_nodes=frozenset({"b"}), memory_mib=512), view)
    assert refused.value.excluded == {"volume": 1, "memory": 1}


@pytest.mark.parametrize("seed", range(4))
def test_a_fleet_that_changes_chooses_as_one_made_anew_and_never_outside_the_regions(seed: int) -> None:
    dice = random.Random(seed)
    fleet, known = Fleet(), dict[str, Candidate]()
    for _ in range(2_500):
        name = f"n{dice.randrange(60)}"
        match dice.choice(["put", "put", "remove", "place", "place", "place"]):
            case "put":
                known[name] = node(
                    name, region=dice.choice(REGIONS), zone=dice.choice(("z1", "z2")), reachable=dice.random() > 0.1,
                    memory_mib_free=dice.randrange(8192), draining=dice.random() < 0.1,
                )  # fmt: skip
                fleet.put(known[name])
            case "remove":
                known.pop(name, None)
                fleet.remove(name)
            case _:
                regions = [frozenset(dice.sample(REGIONS, dice.randint(1, 2))) for _ in range(dice.randint(1, 2))]
                wanted = ask(regions=regions, memory_mib=dice.choice((256, 1024)), present={name: dice.randrange(3)})
                try:
                    chosen = fleet.choose(wanted)
                except CapacityError:
                    assert all(excluded_by(wanted, candidate) for candidate in known.values())
                    continue
                assert chosen == Fleet(known.values()).choose(wanted)
                assert chosen.region in frozenset[str]().union(*regions)
                fleet.take(chosen.id, wanted)
                known[chosen.id] = msgspec.structs.replace(
                    chosen, memory_mib_free=chosen.memory_mib_free - wanted.memory_mib,
                    cpus_free=chosen.cpus_free - wanted.cpus_needed(), orgs=chosen.orgs | {1},
                )  # fmt: skip


def test_orgs_share_no_kernel_unless_the_operator_says_so() -> None:
    theirs = node("a", orgs=frozenset({2}))
    with pytest.raises(CapacityError) as refused:
        choose(ask(), [theirs])
    assert refused.value.excluded == {"isolation": 1}
    assert choose(ask(shared_kernel=True), [theirs]).id == "a"
    assert choose(ask(), [node("v", orgs=frozenset({2}), isolation="vm")]).id == "v"


def test_who_asks_for_isolation_gets_no_less() -> None:
    container, vm = node("a"), node("v", isolation="vm")
    assert choose(ask(isolation="vm"), [container, vm]).id == "v"
    assert choose(ask(isolation="container"), [vm]).id == "v"
    for there in (container, node("b", isolation="none"), node("c", isolation="")):
        with pytest.raises(CapacityError, match="1 whose isolation is weaker than asked for") as refused:
            choose(ask(isolation="vm"), [there])
        assert refused.value.excluded == {"weaker": 1}


def test_a_refusal_counts_hosts_by_constraint() -> None:
    view = [node("a", region="lhr"), node("b", memory_mib_free=100), node("c", reachable=False), node("d")]
    with pytest.raises(CapacityError) as refused:
        choose(ask(refused=frozenset({"d"}), memory_mib=512), view)
    assert refused.value.excluded == {"region": 1, "memory": 1, "reachable": 1, "refused": 1}
    assert refused.value.message == (
        "no host can take this machine (1 shared CPU, 512 MiB) in iad: 1 in another region; 1 not answering; "
        "1 refused it; 1 without enough free memory"
    )


def test_no_hosts_at_all_is_said_so() -> None:
    with pytest.raises(CapacityError, match="there are no hosts"):
        choose(ask(), [])


def test_shared_cpus_need_a_sixteenth_of_a_cpu() -> None:
    small = node("a", cpus_free=0.1)
    assert choose(ask(), [small]).id == "a"
    with pytest.raises(CapacityError):
        choose(ask(shared_cpu=False), [small])
