"""Names in a box, whose own authority signs for them: served at once, and every publication shows the newest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pantala.testing.authority import Authority
from pantala.testing.platform import SETTINGS, TestPlatform, running

pytestmark = pytest.mark.anyio

NAME = "www.example.com"


async def imported(platform: TestPlatform) -> str:
    authority = Authority()
    made = authority.issue(NAME)
    chain = made.chain_pem + authority.pem()
    document = {"hostname": NAME, "fullchain": chain, "private_key": made.key_pem}
    path = "/v1/apps/web/certificates/custom"
    answer = await platform.http.post(path, json=document, headers=platform.auth)
    assert answer.status_code == 201, answer.text
    assert answer.json()["status"] == "active"
    return made.chain_pem.strip()


async def test_what_is_published_again_is_the_newest_certificate(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, sign_names=True)
    async with running(tmp_path, settings=settings) as platform:
        await platform.create_app("web")
        for _ in range(2):
            leaf = await imported(platform)
            for _ in range(2):
                await platform.control.publication.publish_all()
                assert platform.rows.rows[f"cert/custom:{NAME}"]["chain_pem"].startswith(leaf)

        path = f"/v1/apps/web/certificates/{NAME}"
        assert (await platform.http.delete(path, headers=platform.auth)).status_code == 204
        await platform.control.publication.publish_all()
        assert [key for key in platform.rows.rows if NAME in key] == []


async def test_a_name_is_signed_before_the_answer(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, sign_names=True)
    async with running(tmp_path, settings=settings) as platform:
        await platform.create_app("web")
        path = "/v1/apps/web/certificates/acme"
        answer = await platform.http.post(path, json={"hostname": f"*.{NAME}"}, headers=platform.auth)
        shown = answer.json()
        assert (shown["status"], shown["validation_errors"]) == ("active", [])
        assert shown["certificates"][0]["issuer"] == "Pantala box authority for names of users"
        assert platform.rows.rows[f"cert/acme:*.{NAME}"]["names"] == [f"*.{NAME}"]
