"""Tokens and grants, without I/O."""

from __future__ import annotations

import base64

import pytest

from pantala.auth import tokens
from pantala.auth.grants import ALLOWED, Action, Grant, allows
from pantala.errors import Unauthenticated

NOW = 1_000_000


def grant(role: str, *, org: int = 1, app: int | None = None, expires: int = NOW + 1) -> Grant:
    return Grant(role=role, org_id=org, app_id=app, expires_at_ms=expires)  # pyright: ignore[reportArgumentType]


def test_a_token_is_opaque_long_and_not_of_a_prefix_that_clients_drop() -> None:
    token = tokens.mint()
    assert token.startswith("pantala_")
    assert len(token) > 48
    assert token != tokens.mint()
    assert token.partition("_")[0] not in ("fm1r", "fm1a", "fm2")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("Bearer abc", ["abc"]),
        ("bearer  abc ", ["abc"]),
        ("FlyV1 fm2_a,pantala_b", ["fm2_a", "pantala_b"]),
        ("Bearer FlyV1 abc", ["abc"]),
        ("Basic " + base64.b64encode(b"x:abc").decode(), ["abc"]),
        ("Basic " + base64.b64encode(b"x:FlyV1 abc,def").decode(), ["abc", "def"]),
    ],
)
def test_tokens_of_a_header(header: str, found: list[str]) -> None:
    assert tokens.from_header(header) == found


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ,", "Digest abc", "Basic !!", "Bearer " + "a," * 40])
def test_headers_without_a_readable_token_are_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        tokens.from_header(header)


def test_any_one_grant_that_allows_suffices() -> None:
    grants = [grant("read"), grant("deploy", app=7)]
    assert allows(grants, Action.DEPLOY, org_id=1, app_id=7, now_ms=NOW)
    assert not allows(grants, Action.DEPLOY, org_id=1, app_id=8, now_ms=NOW)
    assert allows(grants, Action.READ, org_id=1, app_id=8, now_ms=NOW)


@pytest.mark.parametrize("action", list(Action))
def test_an_expired_grant_and_a_grant_of_another_org_allow_nothing(action: Action) -> None:
    assert not allows([grant("admin", expires=NOW)], action, org_id=1, app_id=None, now_ms=NOW)
    assert not allows([grant("admin", org=2)], action, org_id=1, app_id=None, now_ms=NOW)


@pytest.mark.parametrize("action", list(Action))
def test_a_grant_for_one_app_says_nothing_about_its_org(action: Action) -> None:
    assert not allows([grant("deploy", app=7)], action, org_id=1, app_id=None, now_ms=NOW)


def test_roles_grow_and_a_deploy_token_cannot_make_tokens() -> None:
    assert ALLOWED["read"] < ALLOWED["deploy"] < ALLOWED["member"] < ALLOWED["admin"]
    assert Action.ISSUE_APP_TOKENS not in ALLOWED["deploy"]
