"""`/v1/audit` and `pantala audit log`: what is in it, who may see what of it, its pages, how long it is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from commands import Cli

from pantala.control.context import Context
from pantala.errors import WrongState
from pantala.testing.platform import TestPlatform
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio


async def log(platform: TestPlatform, headers: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
    answer = await platform.http.get("/v1/audit", params=params, headers=headers or platform.auth)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def entries(platform: TestPlatform, headers: dict[str, str] | None = None, **params: Any) -> list[dict[str, Any]]:
    return list((await log(platform, headers, **params))["entries"])


async def done(platform: TestPlatform, method: str, path: str, **more: Any) -> str:
    """The request's id."""
    headers = platform.auth | {"fly-client-ip": "192.0.2.7"}
    answer = await platform.http.request(method, path, headers=headers, **more)
    assert answer.status_code < 300, answer.text
    return str(answer.headers["fly-request-id"])


async def test_acts_are_in_it_with_who_what_where_and_how_they_ended(cli: Cli) -> None:
    platform = cli.platform
    await platform.create_app("shop")
    made = await platform.create_machine("shop", config={"image": "registry.pantala.test/shop:v1"})
    machine = f"/v1/apps/shop/machines/{made['id']}"
    cli.agent.executed = wire.ExecResult(exit_code=3, signal=0, stdout_base64="", stderr_base64="")
    ids = [
        await done(platform, "POST", "/v1/apps/shop/secrets", json={"values": {"KEY": "hunter2", "OLD": None}}),
        await done(platform, "POST", f"{machine}/exec", json={"cmd": "false"}),
        await done(platform, "DELETE", f"{machine}?force=true"),
        await done(platform, "DELETE", "/v1/apps/shop"),
    ]
    found = {entry["request_id"]: entry for entry in await entries(platform) if entry["request_id"] in ids}
    assert [found[one]["action"] for one in ids] == ["secrets.set", "machine.exec", "machine.destroy", "app.delete"]
    assert [found[one]["target"] for one in ids] == ["shop", f"shop/{made['id']}", f"shop/{made['id']}", "shop"]
    assert {(entry["origin"], entry["org"]) for entry in found.values()} == {("192.0.2.7", "acme")}
    assert [found[one]["outcome"] for one in ids] == ["accepted", "exit code 3", "accepted", "accepted"]
    assert found[ids[0]]["detail"] == {"names": ["KEY", "OLD"]}
    assert "hunter2" not in json.dumps(await log(platform))


async def test_a_command_that_never_ran_says_why(cli: Cli) -> None:
    platform = cli.platform
    await platform.create_app("shop")
    made = await platform.create_machine("shop", config={"image": "registry.pantala.test/shop:v1"})
    cli.agent.fail_next[wire.ExecMachine] = WrongState("machine is stopped, not started")
    path = f"/v1/apps/shop/machines/{made['id']}/exec"
    answer = await platform.http.post(path, json={"cmd": "false"}, headers=platform.auth)
    assert answer.status_code >= 400
    (entry,) = [one for one in await entries(platform) if one["action"] == "machine.exec"]
    assert entry["outcome"] == "machine is stopped, not started"


async def test_members_see_their_org_operators_all_and_tokens_of_one_app_nothing(cli: Cli) -> None:
    platform = cli.platform
    await platform.create_app("shop")
    eve = await platform.admin("eve@example.com", "evil")
    made = await platform.http.post("/v1/apps", json={"app_name": "shoplift", "org_slug": "evil"}, headers=eve)
    assert made.status_code == 201, made.text
    assert {entry["org"] for entry in await entries(platform)} >= {"acme", "evil"}
    hers = await entries(platform, eve)
    assert [entry["target"] for entry in hers if entry["org"]] == ["shoplift"]
    assert {entry["actor"] for entry in hers if not entry["org"]} <= {"eve@example.com"}
    assert [entry["org"] for entry in await entries(platform, org_slug="evil")] == ["evil"]
    assert [entry["action"] for entry in await entries(platform, app="shop")] == ["app.create"]
    assert await entries(platform, eve, app="shop") == []
    for headers, params, code in (
        (eve, {"org_slug": "acme"}, 404),
        (platform.auth, {"org_slug": "nobody"}, 404),
        (platform.auth, {"limit": "0"}, 400),
        (platform.auth, {"cursor": "x"}, 400),
        ({}, {}, 401),
    ):
        answer = await platform.http.get("/v1/audit", params=params, headers=headers)
        assert answer.status_code == code, (params, answer.text)
    token = await platform.http.post(
        "/v1/tokens", json={"name": "ci", "app": "shop", "expiry": "1h"}, headers=platform.auth
    )
    bound = {"authorization": f"Bearer {token.json()['token']}"}
    assert (await platform.http.get("/v1/audit", headers=bound)).status_code == 403


async def test_pages_go_back_to_the_beginning_and_old_entries_are_forgotten(cli: Cli) -> None:
    platform, context = cli.platform, cli.platform.control.context
    for number in range(5):
        await platform.create_app(f"app-{number}")
    whole = await entries(platform)
    pages: list[dict[str, Any]] = []
    cursor = ""
    while page := await log(platform, limit=2, cursor=cursor):
        pages += page["entries"]
        if not (cursor := page["next_cursor"]):
            break
    assert pages == whole
    assert [entry["id"] for entry in whole] == sorted((entry["id"] for entry in whole), reverse=True)
    await _tell(context, at_ms=1)
    assert (await entries(platform))[0]["action"] == "old"
    assert "old" not in {entry["action"] for entry in await entries(platform, since="1h")}
    await platform.control.sweep.cycle()
    assert await entries(platform) == whole


async def _tell(context: Context, *, at_ms: int) -> None:
    from pantala.store import ledger

    await context.db.write(
        lambda c: ledger.write_audit(c, at_ms=at_ms, actor="x", org_id=None, action="old", target="y", request_id="")
    )


async def test_the_command_shows_it_newest_first(cli: Cli) -> None:
    for number in range(3):
        await cli.platform.create_app(f"app-{number}")
    table, short, document, wrong = await cli.run_many(
        ["audit", "log"],
        ["audit", "log", "--app", "app-1"],
        ["audit", "log", "--limit", "1", "--org", "acme", "--since", "1h", "--json"],
        ["audit", "log", "--since", "soon"],
    )
    assert (table.code, short.code, document.code, wrong.code) == (0, 0, 0, 1), (table, short, document)
    assert table.out.index("app-2") < table.out.index("app-0")
    assert "app-1" in short.out
    assert "app-2" not in short.out
    (one,) = json.loads(document.out)
    assert (one["action"], one["target"], one["org"]) == ("app.create", "app-2", "acme")
    assert "--since" in wrong.err
