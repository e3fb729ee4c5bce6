"""Statics: files of a machine are served by the file server beside its app, everything else by the app."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mesh_rig import HOST, cluster
from proxy_rig import Backend, Rig, app_rows, machine_row, running, service_row

from pantala.kit import binaries
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import ProxyFrame, Wake, WakeResult
from pantala.wire.guest import STATICS_PORT
from pantala.wire.machine import Static

pytestmark = pytest.mark.anyio
IP = "127.0.5.6"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        yield rig


@pytest.fixture
def site(tmp_path: Path) -> Path:
    public = tmp_path / "public"
    (public / "css").mkdir(parents=True)
    (public / "css" / "site.css").write_text("body { color: black }")
    (public / "big.txt").write_bytes(b"0123456789" * 100_000)
    (tmp_path / "secret").write_text("secret")
    (public / "link").symlink_to("../secret")
    return public


@contextlib.asynccontextmanager
async def file_server(ip: str, site: Path) -> AsyncGenerator[None]:
    """As init begins it in a machine."""
    listen = f"{ip}:{STATICS_PORT}"
    command = [binaries.find("pantala-init"), "statics", listen, "/static", str(site)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection(ip, STATICS_PORT)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, bool, within_s=15, every_s=0.02)
        yield
    finally:
        process.kill()
        process.wait(10)


def statics(site: Path) -> dict[str, Any]:
    return {"statics": [Static(url_prefix="/static", guest_path=str(site))]}


async def web(rig: Rig, site: Path, state: str = "started") -> Backend:
    port = free_port()
    backend = await rig.backend("app", IP, port)
    ip4 = IP if state == "started" else ""
    await rig.agent.rows(
        *app_rows("web", HOST),
        service_row(rig.ports, "web", port, **statics(site)),
        machine_row("web", "m1", ip4, state),
    )
    return backend


async def test_a_file_passes_the_app_by(rig: Rig, site: Path) -> None:
    backend = await web(rig, site)
    async with file_server(IP, site):
        for _ in range(2):
            response = await rig.get(HOST, "/static/css/site.css?v=1")
            assert (response.status_code, response.text) == (200, "body { color: black }")
            assert response.headers["content-type"] == "text/css; charset=utf-8"
            assert response.headers["fly-request-id"]
        assert len((await rig.get(HOST, "/static/big.txt")).content) == 1_000_000
        assert backend.requests == []


@pytest.mark.parametrize(
    "path",
    [
        "/static",
        "/static/",
        "/static/css",
        "/static/none.css",
        "/static/link",
        "/static/%2e%2e/secret",
        "/other",
        "/staticx/a",
    ],
)
async def test_everything_else_is_for_the_app(rig: Rig, site: Path, path: str) -> None:
    backend = await web(rig, site)
    async with file_server(IP, site):
        assert (await rig.get(HOST, path)).text == "app"
    assert [request.path for request in backend.requests] == [path]


async def test_conditions_and_ranges(rig: Rig, site: Path) -> None:
    backend = await web(rig, site)
    async with file_server(IP, site):
        whole = await rig.get(HOST, "/static/big.txt")
        tag, modified = whole.headers["etag"], whole.headers["last-modified"]
        for condition in ({"if-none-match": tag}, {"if-none-match": f"W/{tag}"}, {"if-modified-since": modified}):
            response = await rig.get(HOST, "/static/big.txt", **condition)
            assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
        part = await rig.get(HOST, "/static/big.txt", range="bytes=10-14", **{"if-range": tag})
        assert (part.status_code, part.text, part.headers["content-range"]) == (206, "01234", "bytes 10-14/1000000")
        stale = await rig.get(HOST, "/static/big.txt", range="bytes=10-14", **{"if-range": '"old"'})
        assert (stale.status_code, len(stale.content)) == (200, 1_000_000)
        beyond = await rig.get(HOST, "/static/big.txt", range="bytes=1000000-")
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */1000000")
        head = await rig.raw(f"HEAD /static/big.txt HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode())
        assert head.endswith(b"\r\n\r\n")
        assert b"content-length: 1000000" in head.lower()
    assert backend.requests == []


async def test_without_its_file_server_the_app_is_asked(rig: Rig, site: Path) -> None:
    await web(rig, site)
    assert (await rig.get(HOST, "/static/css/site.css")).text == "app"


async def test_a_request_for_a_file_wakes_its_machine(rig: Rig, site: Path) -> None:
    async def wake(frame: ProxyFrame) -> None:
        if isinstance(frame, Wake):
            await rig.agent.send(WakeResult(id=frame.id, machine="m1", ok=True, ip4=IP))

    rig.agent.on_frame = wake
    backend = await web(rig, site, "stopped")
    async with file_server(IP, site):
        assert (await rig.get(HOST, "/static/css/site.css")).text == "body { color: black }"
    assert await rig.agent_asked_for_a_wake()
    assert backend.requests == []


async def test_a_file_of_a_machine_of_another_host(tmp_path: Path, site: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr") as pair:
        here, there = pair.hosts
        port = free_port()
        backend = await there.rig.backend("app", there.machines, port)
        await pair.web(port, pair.machine(there, "m1"), **statics(site))
        async with file_server(there.machines, site):
            response = await here.rig.get(HOST, "/static/css/site.css")
            assert response.text == "body { color: black }"
            assert (await here.rig.get(HOST, "/")).text == "app"
        assert len(backend.requests) == 1
