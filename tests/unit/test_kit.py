from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import InvalidRequest
from pantala.kit import ids, request_ids
from pantala.kit.clock import until_tick
from pantala.kit.sealing import Opener, Signer, seal, verify
from pantala.kit.secret import Secret
from pantala.kit.units import format_go_duration, parse_go_duration
from pantala.testing.bus import matches


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("10s", 10), ("1m21s", 81), ("2h45m", 9900), ("0", 0), ("1.5s", 1.5)]
)
def test_go_durations(text: str, seconds: float) -> None:
    assert parse_go_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("at_s", "every_s", "left_s"),
    [(0, 1, 1), (0.25, 1, 0.75), (7.5, 5, 2.5), (0.9999, 1, 1.0001), (2.0, 1, 1), (0.015, 0.02, 0.005)],
    ids=["at the start", "in between", "longer", "woken a little early", "woken in time", "short"],
)
def test_tasks_that_tick_alike_wake_together(at_s: float, every_s: float, left_s: float) -> None:
    assert until_tick(at_s, every_s) == pytest.approx(left_s)


@pytest.mark.parametrize("text", ["", "10", "s", "10 s", "-5s", "1m x"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_go_duration(text)


@given(st.integers(0, 10**8))
def test_durations_survive_writing_and_reading(ms: int) -> None:
    assert round(parse_go_duration(format_go_duration(ms / 1000)) * 1000) == ms


def test_ids_have_the_shapes_of_the_machines_api() -> None:
    assert re.fullmatch(r"[0-9a-f]{14}", ids.machine_id())
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}", ids.ulid())
    assert re.fullmatch(r"[a-z]+-[a-z]+-\d{4}", ids.generated_name())
    assert ids.ulid(1) < ids.ulid(2)


def test_secrets_do_not_print() -> None:
    assert "hunter2" not in f"{Secret('hunter2')!r} {Secret('hunter2')}"


def test_sealed_boxes_open_only_with_their_key() -> None:
    ours, theirs = Opener(b"1" * 32), Opener(b"2" * 32)
    sealed = seal(ours.public_key, b"secret")
    assert ours.open(sealed) == b"secret"
    with pytest.raises(InvalidRequest):
        theirs.open(sealed)


def test_signatures_hold_for_their_data_only() -> None:
    signer = Signer(b"3" * 32)
    assert verify(signer.verify_key, b"a", signer.sign(b"a"))
    assert not verify(signer.verify_key, b"b", signer.sign(b"a"))


@pytest.mark.parametrize(
    ("pattern", "subject", "does"),
    [("a.*.c", "a.b.c", True), ("a.>", "a.b.c", True), ("a.>", "a", False), ("a.*", "a.b.c", False), ("a", "a", True)],
)
def test_bus_patterns(pattern: str, subject: str, does: bool) -> None:
    assert matches(pattern, subject) is does


# -- request ids -------------------------------------------------------------------------------------------------------


def test_request_ids_are_read_with_or_without_a_region() -> None:
    ulid = ids.ulid(1_732_222_222_222)
    assert request_ids.parse(ulid) == (ulid, "")
    assert request_ids.parse(f" {ulid.lower()}-LHR\n") == (ulid, "lhr")
    assert request_ids.made_at_ms(ulid) == 1_732_222_222_222


@pytest.mark.parametrize("text", ["", "x", "8" + "Z" * 25, "0" * 25, "0" * 26 + "-", "0" * 26 + "-a_b", "0" * 25 + "I"])
def test_what_is_no_request_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a request id"):
        request_ids.parse(text)
