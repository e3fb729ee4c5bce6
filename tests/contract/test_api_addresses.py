"""Addresses over the API: what pools give, what they refuse, what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from golden import check

from pantala.testing.clock import ManualClock
from pantala.testing.platform import SETTINGS, TestPlatform, running
from pantala.wire.server import AddressPools

pytestmark = pytest.mark.anyio

POOLS = AddressPools(shared_v4=["192.0.2.1"], v4=["198.51.100.0/30"], v6=["2001:db8:1::/64"])
DAY_S = 24 * 3600.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def pooled(tmp_path: Path, clock: ManualClock) -> AsyncGenerator[TestPlatform]:
    settings = msgspec.structs.replace(SETTINGS, pools=POOLS)
    async with running(tmp_path, settings=settings, clock=clock) as made:
        await made.create_app("web")
        yield made


async def allocate(platform: TestPlatform, kind: str, app: str = "web", **more: Any) -> httpx2.Response:
    path = f"/v1/apps/{app}/ip_assignments"
    return await platform.http.post(path, json={"type": kind, "region": ""} | more, headers=platform.auth)


async def release(platform: TestPlatform, ip: str, app: str = "web") -> httpx2.Response:
    return await platform.http.delete(f"/v1/apps/{app}/ip_assignments/{ip}", headers=platform.auth)


async def addresses(platform: TestPlatform, app: str = "web") -> list[str]:
    answer = await platform.http.get(f"/v1/apps/{app}/ip_assignments", headers=platform.auth)
    return sorted(one["ip"] for one in answer.json()["ips"])


async def test_each_kind_is_given_listed_and_published(pooled: TestPlatform) -> None:
    assert (await allocate(pooled, "v6")).json()["ip"] == "2001:db8:1::1"
    check("ip_assignment_shared", await allocate(pooled, "shared_v4"))
    check("ip_assignment_dedicated", await allocate(pooled, "v4"))
    assert (await allocate(pooled, "private_v6")).json()["ip"] == "fdaa:0:1::1:3"
    assert await addresses(pooled) == ["192.0.2.1", "198.51.100.1", "2001:db8:1::1", "fdaa:0:1::1:3"]
    shown = {key: row for key, row in pooled.rows.rows.items() if key.startswith("addr/")}
    assert shown == {
        "addr/198.51.100.1": {"kind": "dedicated", "app": "web"},
        "addr/2001:db8:1::1": {"kind": "dedicated", "app": "web"},
        "addr/fdaa:0:1::1:3": {"kind": "private", "app": "web", "network": 1},
    }
    await pooled.control.publication.publish_all()
    assert pooled.rows.rows["addr/192.0.2.1"] == {"kind": "shared"}
    assert shown.items() <= pooled.rows.rows.items()


async def test_a_released_address_rests_for_a_day(pooled: TestPlatform, clock: ManualClock) -> None:
    first, second = (await allocate(pooled, "v4")).json()["ip"], (await allocate(pooled, "v4")).json()["ip"]
    assert (first, second) == ("198.51.100.1", "198.51.100.2")
    assert (await release(pooled, first)).status_code == 204
    assert f"addr/{first}" not in pooled.rows.rows
    refused = await allocate(pooled, "v4")
    check("ip_assignment_pool_empty", refused)
    await clock.advance(DAY_S + 1)
    assert (await allocate(pooled, "v4")).json()["ip"] == first


async def test_a_platform_without_pools_says_so(platform: TestPlatform) -> None:
    await platform.create_app("web")
    for kind, words in (("v4", "dedicated IPv4"), ("v6", "IPv6"), ("shared_v4", "shared IPv4")):
        answer = await allocate(platform, kind)
        assert answer.status_code == 422
        assert f"no pool of {words} addresses" in answer.json()["error"]
        assert f"pools.{kind}" in answer.json()["error"]


async def test_what_makes_no_sense_is_refused(pooled: TestPlatform) -> None:
    await allocate(pooled, "shared_v4")
    assert (await allocate(pooled, "shared_v4")).status_code == 409
    assert (await allocate(pooled, "v5")).status_code == 400
    assert (await allocate(pooled, "v4", network="default")).json()["error"].startswith("network: ")
    assert (await release(pooled, "198.51.100.1")).status_code == 404
    assert (await release(pooled, "nonsense")).status_code == 400


async def test_private_addresses_of_other_networks(pooled: TestPlatform) -> None:
    await pooled.http.post(
        "/v1/apps", json={"app_name": "db", "org_slug": "acme", "network": "inner"}, headers=pooled.auth
    )
    assert (await allocate(pooled, "private_v6", network="inner")).json()["ip"].startswith("fdaa:0:2:")
    assert pooled.rows.rows["addr/fdaa:0:2::1:3"] == {"kind": "private", "app": "web", "network": 2}
    assert (await allocate(pooled, "private_v6", network="unknown")).status_code == 404
    await pooled.admin("eve@example.com", "evil")
    assert (await allocate(pooled, "private_v6", org_slug="evil")).status_code == 404


async def test_an_app_that_is_deleted_gives_them_back(pooled: TestPlatform) -> None:
    for kind in ("v4", "v4", "shared_v4", "v6"):
        await allocate(pooled, kind)
    await pooled.http.delete("/v1/apps/web", headers=pooled.auth)
    assert [key for key in pooled.rows.rows if key.startswith("addr/198")] == []
    await pooled.create_app("next")
    assert (await allocate(pooled, "v4", "next")).status_code == 422
    assert (await allocate(pooled, "v6", "next")).json()["ip"] == "2001:db8:1::2"
