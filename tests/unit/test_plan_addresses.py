"""Which address of a pool is given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import InvalidRequest
from pantala.planner.addresses import pick, prefixes


def test_pools_are_judged_at_start() -> None:
    assert [str(one) for one in prefixes(["192.0.2.0/30", "198.51.100.7/32"], version=4, field="pools.v4")] == [
        "192.0.2.0/30",
        "198.51.100.7/32",
    ]
    for texts, why in (
        (["192.0.2.1/30"], "no prefix"),
        (["2001:db8::/64"], "not IPv4"),
        (["192.0.2.0/30", "192.0.2.0/24"], "overlaps"),
        (["x"], "no prefix"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            prefixes(texts, version=4, field="pools.v4")


def test_network_and_broadcast_addresses_are_left_out() -> None:
    pool = prefixes(["192.0.2.0/30", "198.51.100.7/32"], version=4, field="v4")
    taken: dict[str, bool] = {}
    given_out: list[str] = []
    while (address := pick(pool, taken).address) is not None:
        given_out.append(address)
        taken[address] = True
    assert given_out == ["192.0.2.1", "192.0.2.2", "198.51.100.7"]


@given(st.dictionaries(st.integers(1, 14).map(lambda n: f"192.0.2.{n}"), st.booleans()))
def test_nothing_taken_is_given_and_nothing_free_is_withheld(taken: dict[str, bool]) -> None:
    picked = pick(prefixes(["192.0.2.0/28"], version=4, field="v4"), taken)
    assert (picked.address is None) == (len(taken) == 14)
    assert picked.address not in taken
    if picked.address is None:
        assert picked.used + picked.resting == 14
