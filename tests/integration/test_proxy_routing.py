"""From a client's connection to an app's answer: names, TLS, HTTP versions, headers, refusals."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from proxy_rig import (
    Backend,
    Request,
    Rig,
    answer,
    app_rows,
    free_port,
    json_of,
    machine_row,
    row,
    running,
    service_row,
)

from pantala.wire.feed import AddressRow, HostRow
from pantala.wire.machine import Concurrency, HTTPOptions, HTTPResponseOptions, Port

pytestmark = pytest.mark.anyio


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        port = free_port()
        for app, ip in (("one", "127.0.1.1"), ("two", "127.0.1.2")):
            await rig.backend(app, ip, port)
            await rig.agent.rows(
                *app_rows(app, f"{app}.apps.test"), service_row(rig.ports, app, port), machine_row(app, f"m-{app}", ip)
            )
        await rig.agent.rows(row("certs", "cert/one", rig.ca.issue("one.apps.test")))
        await rig.agent.rows(row("certs", "cert/all", rig.ca.issue("*.apps.test")))
        yield rig


async def test_the_name_decides_over_tls_and_plain(rig: Rig) -> None:
    for app in ("one", "two"):
        assert (await rig.get(f"{app}.apps.test")).text == app
        async with rig.client(f"{app}.apps.test") as client:
            response = await client.get("/", extensions={"sni_hostname": f"{app}.apps.test"})
            assert (response.status_code, response.text, response.http_version) == (200, app, "HTTP/1.1")
