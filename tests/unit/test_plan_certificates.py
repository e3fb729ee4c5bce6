"""Decisions about users' certificates: DNS judged, challenges chosen, when to look again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.domain.hostnames import covers, normalise
from pantala.planner import certificates as plan
from pantala.wire.certificates import ChallengeName, DnsRecords, DnsRequirements, Ownership, Validation

HOUR_MS = 3_600_000
WANTED = DnsRequirements(
    a=["192.0.2.1"],
    aaaa=["2001:db8::1"],
    cname="web.apps.test",
    acme_challenge=ChallengeName(name="_acme-challenge.www.example.com", target="www.example.com.id.acme.test"),
    ownership=Ownership(name="_fly-ownership.www.example.com", app_value="app-1", org_value="org-1"),
)
OURS = frozenset(("192.0.2.1", "2001:db8::1"))


def judge(hostname: str = "www.example.com", **records: Any) -> plan.Judged:
    seen = DnsRecords(**records)
    return plan.judge(hostname, WANTED, seen, ours=OURS, at="now")


@pytest.mark.parametrize(
    ("records", "challenges", "owned", "codes"),
    [
        ({}, [], False, ["dns_missing"]),
        ({"resolved_addresses": ["192.0.2.1"]}, ["tls-alpn-01", "http-01"], True, []),
        ({"resolved_addresses": ["192.0.2.1", "2001:db8::1"]}, ["tls-alpn-01", "http-01"], True, []),
        ({"resolved_addresses": ["192.0.2.1", "203.0.113.9"]}, [], True, ["dns_foreign_address"]),
        ({"resolved_addresses": ["203.0.113.9"]}, [], False, ["dns_elsewhere"]),
        (
            {"resolved_addresses": ["203.0.113.9"], "acme_challenge_cname": WANTED.acme_challenge.target},
            ["dns-01"],
            True,
            [],
        ),
        ({"acme_challenge_cname": "elsewhere.test"}, [], False, ["dns_missing"]),
        ({"acme_challenge_cname": WANTED.acme_challenge.target}, ["dns-01"], True, ["dns_missing"]),
        ({"ownership_txt": ["x", "a; org-1"]}, [], True, ["dns_missing"]),
        ({"cname": ["web.apps.test"], "resolved_addresses": ["192.0.2.1"]}, ["tls-alpn-01", "http-01"], True, []),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict | list) else None,
)
def test_dns_is_judged(records: dict[str, Any], challenges: list[str], owned: bool, codes: list[str]) -> None:
    judged = judge(**records)
    assert sorted(plan.challenges("www.example.com", judged.validation)) == sorted(challenges)
    assert (judged.owned, [error.code for error in judged.errors]) == (owned, codes)
    assert all(error.remediation for error in judged.errors)


def test_a_wildcard_needs_an_address_besides() -> None:
    codes = [error.code for error in judge("*.example.com").errors]
    assert codes == ["acme_challenge_missing", "dns_missing"]
    delegated = judge("*.example.com", acme_challenge_cname=WANTED.acme_challenge.target)
    assert "add *.example.com A 192.0.2.1" in delegated.errors[0].remediation


def test_a_wildcard_is_never_validated_by_address() -> None:
    judged = judge("*.example.com", resolved_addresses=["192.0.2.1"])
    assert plan.challenges("*.example.com", judged.validation) == []
    everything = Validation(dns_configured=True, alpn_configured=True, http_configured=True)
    assert plan.challenges("*.example.com", everything) == ["dns-01"]


def test_each_failure_gives_the_next_challenge_its_turn() -> None:
    everything = Validation(dns_configured=True, alpn_configured=True, http_configured=True)
    turns = [plan.choose("www.example.com", everything, failures=failures) for failures in range(4)]
    assert len(set(turns[:3])) == 3
    assert turns[3] == turns[0]
    assert plan.choose("www.example.com", Validation(), failures=0) is None


@given(st.integers(0, 10**12), st.integers(1, 10**10))
def test_renewal_is_at_two_thirds(issued_at_ms: int, life_ms: int) -> None:
    at_ms = plan.renew_at_ms(issued_at_ms=issued_at_ms, not_after_ms=issued_at_ms + life_ms)
    assert abs((at_ms - issued_at_ms) * 3 - 2 * life_ms) < 3


def test_no_authority_is_asked_more_than_five_times_an_hour() -> None:
    """Failing at once each time, by itself and with a user who asks every minute."""
    at_ms, failures, attempts = 0, 0, []
    while at_ms < HOUR_MS:
        attempts.append(at_ms)
        failures += 1
        at_ms = plan.retry_at_ms(at_ms, failures=failures)
    assert len(attempts) <= 5
    assert plan.retry_at_ms(0, failures=50) == 6 * HOUR_MS
    asked, failed_at_ms = [0], 0
    for minute in range(1, 60):
        now_ms = minute * 60_000
        begin = plan.asked_at_ms(now_ms, failures=len(asked), failed_at_ms=failed_at_ms, limited_until_ms=0)
        if begin <= now_ms:
            asked.append(now_ms)
            failed_at_ms = now_ms
    assert len(asked) <= 5
    assert plan.asked_at_ms(0, failures=0, failed_at_ms=0, limited_until_ms=9) == 9


@given(st.integers(0, 10**11), st.integers(0, 10**11))
def test_dns_is_always_looked_at_again(since_ms: int, age_ms: int) -> None:
    now_ms = since_ms + age_ms
    assert now_ms < plan.look_again_ms(now_ms, since_ms=since_ms) <= now_ms + HOUR_MS


@given(st.text(max_size=300))
def test_a_name_has_one_spelling(text: str) -> None:
    from pantala.errors import InvalidRequest

    try:
        name = normalise(text)
    except InvalidRequest:
        return
    assert normalise(name) == name
    assert covers([name], name)


@pytest.mark.parametrize(
    ("names", "hostname", "covered"),
    [
        (["*.example.com"], "www.example.com", True),
        (["*.example.com"], "a.b.example.com", False),
        (["*.example.com"], "example.com", False),
        (["*.example.com"], "*.example.com", True),
        (["www.example.com"], "*.example.com", False),
    ],
)
def test_what_a_certificate_covers(names: list[str], hostname: str, covered: bool) -> None:
    assert covers(names, hostname) is covered
