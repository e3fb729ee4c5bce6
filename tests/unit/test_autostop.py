"""Which machines may sleep: the planner's rules as properties and as the documented table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.planner.autostop import Candidate, Rules, plan, why_awake

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        machine=st.uuids().map(str),
        in_flight=st.integers(0, 30),
        seq=st.integers(0, 100),
        idle_ms=st.integers(0, 120_000),
        autostop=st.sampled_from(["off", "stop", "suspend"]),
        soft_limit=st.sampled_from([0, 10, 20]),
        leased=st.booleans(),
        held=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda candidate: candidate.machine,
)
RULES = st.builds(
    Rules,
    idle_window_ms=st.sampled_from([0, 1_000, 60_000]),
    floor=st.integers(0, 4),
    mode=st.sampled_from(["all_idle", "one_per_pass"]),
)


@given(CANDIDATES, RULES)
def test_what_never_sleeps(candidates: list[Candidate], rules: Rules) -> None:
    chosen = plan(candidates, rules)
    for candidate in chosen:
        assert candidate.in_flight == 0
        assert not candidate.leased
        assert not candidate.held
        assert candidate.autostop != "off"
    assert len(candidates) - len(chosen) >= min(rules.floor, len(candidates))
    if rules.mode == "one_per_pass":
        assert len(chosen) <= 1


@given(CANDIDATES, RULES)
def test_each_machine_is_about_to_sleep_or_has_a_reason_not_to(candidates: list[Candidate], rules: Rules) -> None:
    chosen = plan(candidates, rules)
    for candidate in candidates:
        why = why_awake(candidate, candidates, rules)
        assert why
        assert (why == ["nothing keeps it awake: it is about to sleep"]) == (candidate in chosen)


@given(CANDIDATES)
def test_without_a_floor_every_idle_machine_sleeps_in_one_pass(candidates: list[Candidate]) -> None:
    chosen = {candidate.machine for candidate in plan(candidates, Rules(idle_window_ms=60_000))}
    may = {
        c.machine
        for c in candidates
        if c.autostop != "off" and not c.leased and not c.held and not c.in_flight and c.idle_ms >= 60_000
    }
    assert chosen == may


def running(loads: list[int]) -> list[Candidate]:
    return [
        Candidate(machine=f"m{n}", in_flight=load, seq=1, idle_ms=0, autostop="stop", soft_limit=10)
        for n, load in enumerate(loads)
    ]


@pytest.mark.parametrize(
    ("loads", "stops"),
    [
        ([0], 1),
        ([3], 0),
        ([0, 3], 1),
        ([0, 12], 0),
        ([0, 0, 12], 1),
        ([3, 3], 0),
        ([12, 12, 0], 0),
        ([12, 12, 0, 0], 1),
    ],
)
def test_the_original_stops_one_when_there_is_an_excess(loads: list[int], stops: int) -> None:
    assert len(plan(running(loads), Rules(idle_window_ms=0, mode="one_per_pass"))) == stops


def test_the_longest_idle_goes_first() -> None:
    candidates = [
        Candidate(machine=name, in_flight=0, seq=1, idle_ms=idle_ms, autostop="stop")
        for name, idle_ms in (("a", 70_000), ("b", 90_000))
    ]
    assert [c.machine for c in plan(candidates, Rules(idle_window_ms=60_000, floor=1))] == ["b"]
