"""Accounts at an authority that knows its customers (external account binding), and names that nobody outside signs."""

from __future__ import annotations

from pathlib import Path

import pytest
from pebble_rig import EDGE, issuing

pytestmark = pytest.mark.anyio

NAME = "www.example.test"
KID, KEY = "operator-7", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"


async def test_an_account_is_bound_where_the_authority_wants_it(tmp_path: Path) -> None:
    secret = tmp_path / "eab.key"
    secret.write_text(f"{KEY}\n")
    async with issuing(tmp_path, bindings={KID: KEY}, acme_eab_kid=KID, acme_eab_key_file=str(secret)) as world:
        world.dns.says(NAME, "A", EDGE)
        await world.add("web", NAME)
        await world.platform.control.issuance.cycle()
        assert (await world.show("web", NAME))["status"] == "active"
        assert "Pebble" in await world.issuer(NAME)


@pytest.mark.parametrize(
    ("kid", "key", "said"),
    [
        pytest.param("", "", "acme_eab_kid", id="not-bound"),
        pytest.param(KID, "not base64url!", "base64url", id="not-a-key"),
        pytest.param("stranger", KEY, "", id="unknown"),
    ],
)
async def test_without_the_right_binding_the_answer_says_what_the_operator_does(
    tmp_path: Path, kid: str, key: str, said: str
) -> None:
    secret = tmp_path / "eab.key"
    secret.write_text(key)
    async with issuing(
        tmp_path, bindings={KID: KEY}, acme_eab_kid=kid, acme_eab_key_file=str(secret) if kid else ""
    ) as world:
        world.dns.says(NAME, "A", EDGE)
        await world.add("web", NAME)
        await world.platform.control.issuance.cycle()
        shown = await world.show("web", NAME)
        assert shown["status"] == "pending_validation"
        error = shown["validation_errors"][0]
        assert said in error["message"] + error["remediation"]
        assert error["message"]
        assert KEY not in str(shown)
