"""Statics in buckets: the edge reads objects from an S3 server, without a machine; everything else is for the app."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from mesh_rig import HOST
from proxy_rig import Backend, Rig, app_rows, machine_row, row, running, service_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.testing.s3 import S3, s3
from pantala.wire.machine import HTTPOptions, Port, Static

pytestmark = pytest.mark.anyio
IP = "127.0.5.7"
BIG = bytes(range(256)) * 8192


@contextlib.asynccontextmanager
async def edge(folder: Path, store: S3, **changes: Any) -> AsyncGenerator[Rig]:
    opened = {"readers": {"private": ["personal"], "theirs": ["others"]}}
    async with running(folder, buckets=store.settings(**(opened | changes))) as rig:
        yield rig


async def web(rig: Rig, *mappings: Static, state: str = "started", **changes: Any) -> Backend:
    port = free_port()
    backend = await rig.backend("app", IP, port)
    await rig.agent.rows(
        *app_rows("web", HOST),
        service_row(rig.ports, "web", port, statics=list(mappings), **changes),
        machine_row("web", "m1", IP if state == "started" else "", state),
    )
    return backend


def of(bucket: str, prefix: str = "/static", folder: str = "/site", index: str | None = None) -> Static:
    return Static(url_prefix=prefix, guest_path=folder, tigris_bucket=bucket, index_document=index)


async def told(rig: Rig) -> list[str]:
    """What the app's log was told about its buckets."""
    frames = await rig.agent.frames_of("ProxyLog")
    return [frame.message for frame in frames if frame.code == "PR05"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[S3]:
    async with s3(tmp_path) as server:
        await server.bucket("assets", public=True)
        await server.bucket("private")
        await server.put("assets", "site/css/a%20b.css", b"body { color: black }", "content-type: text/css")
        await server.put("assets", "site/index.html", b"<h1>hello</h1>")
        await server.put("private", "site/secret.txt", b"for one org", "cache-control: max-age=60")
        yield server


async def test_an_object_needs_no_machine(tmp_path: Path, store: S3) -> None:
    async with edge(tmp_path, store) as rig:
        backend = await web(rig, of("assets", index="index.html"), state="stopped")
        for _ in range(2):
            response = await rig.get(HOST, "/static/css/a%20b.css?v=1")
            assert (response.status_code, response.text) == (200, "body { color: black }")
            assert response.headers["content-type"] == "text/css"
            assert response.headers["fly-request-id"]
            assert not [name for name in response.headers if name.startswith("x-amz")]
        index = await rig.get(HOST, "/static/")
        assert (index.text, index.headers["content-type"]) == ("<h1>hello</h1>", "text/html; charset=utf-8")
        assert not await rig.agent_asked_for_a_wake()
        assert backend.requests == []


@pytest.mark.parametrize("path", ["/static", "/static/", "/static/css", "/static/%2e%2e/x", "/other", "/staticx/a"])
async def test_everything_else_is_for_the_app(tmp_path: Path, store: S3, path: str) -> None:
    async with edge(tmp_path, store) as rig:
        backend = await web(rig, of("assets"))
        assert (await rig.get(HOST, path)).text == "app"
        assert [request.path for request in backend.requests] == [path]


async def test_a_private_bucket_is_read_for_those_whom_the_operator_names(tmp_path: Path, store: S3) -> None:
    await store.bucket("theirs")
    await store.put("theirs", "site/a.txt", b"of another org")
    async with edge(tmp_path, store) as rig:
        mappings = (of("private", "/mine"), of("theirs", "/theirs"), of("nowhere", "/nowhere"))
        backend = await web(rig, *mappings)
        mine = await rig.get(HOST, "/mine/secret.txt")
        assert (mine.status_code, mine.text, mine.headers["cache-control"]) == (200, "for one org", "max-age=60")
        assert (await rig.get(HOST, "/mine/none.txt")).text == "app", "not there, said with credentials"
        assert len(backend.requests) == 1
        assert (await rig.get(HOST, "/theirs/a.txt")).text == "app", "nobody reads a bucket by naming it"
        assert "proxy.buckets.readers" in (await told(rig))[0]
        nowhere = await rig.get(HOST, "/nowhere/a.txt")
        assert nowhere.status_code == 502
        assert "PR05" in nowhere.text
        assert "there is no such bucket" in nowhere.text


async def test_conditions_ranges_and_large_objects(tmp_path: Path, store: S3) -> None:
    await store.put("assets", "site/big.bin", BIG)
    async with edge(tmp_path, store) as rig:
        backend = await web(rig, of("assets"))
        whole = await rig.get(HOST, "/static/big.bin")
        assert (whole.content, whole.headers["content-type"]) == (BIG, "application/octet-stream")
        tag = whole.headers["etag"]
        for condition in ({"if-none-match": tag}, {"if-none-match": f"W/{tag}"}):
            response = await rig.get(HOST, "/static/big.bin", **condition)
            assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
        part = await rig.get(HOST, "/static/big.bin", range="bytes=256-259")
        assert (part.status_code, part.content) == (206, bytes([0, 1, 2, 3]))
        assert part.headers["content-range"] == f"bytes 256-259/{len(BIG)}"
        beyond = await rig.get(HOST, "/static/big.bin", range=f"bytes={len(BIG)}-")
        assert (beyond.status_code, beyond.content) == (416, b"")
        head = await rig.raw(f"HEAD /static/big.bin HTTP/1.0\r\nHost: {HOST}\r\n\r\n".encode())
        assert head.endswith(b"\r\n\r\n")
        assert f"content-length: {len(BIG)}".encode() in head.lower()
        many = await asyncio.gather(*(rig.get(HOST, "/static/big.bin") for _ in range(20)))
        assert {len(one.content) for one in many} == {len(BIG)}
        assert backend.requests == []


async def test_text_is_compressed_on_the_way(tmp_path: Path, store: S3) -> None:
    text = b"line of text\n" * 1000
    await store.put("assets", "site/long.txt", text)
    async with edge(tmp_path, store) as rig:
        ports = [Port(port=rig.ports.http, handlers=["http"], http_options=HTTPOptions(compress=True))]
        await web(rig, of("assets"), ports=ports)
        response = await rig.get(HOST, "/static/long.txt", **{"accept-encoding": "gzip"})
        assert (response.headers["content-encoding"], response.content) == ("gzip", text)
        again = await rig.get(HOST, "/static/long.txt", **{"if-none-match": response.headers["etag"]})
        assert again.status_code == 304


async def test_a_store_over_tls_is_known_by_its_authority(tmp_path: Path) -> None:
    async with s3(tmp_path, tls=True) as store:
        await store.bucket("private")
        await store.put("private", "site/a.txt", b"over tls")
        async with edge(tmp_path, store) as rig:
            await web(rig, of("private"))
            assert (await rig.get(HOST, "/static/a.txt")).text == "over tls"
    other = tmp_path / "other"
    other.mkdir()
    async with s3(other, tls=True) as store, edge(other, store, ca_file="") as rig:
        await web(rig, of("private"))
        response = await rig.get(HOST, "/static/a.txt")
        assert response.status_code == 502
        assert "certificate" in (await told(rig))[0]


async def test_a_store_that_restarts_or_stays_away(tmp_path: Path, store: S3) -> None:
    async with edge(tmp_path, store) as rig:
        await web(rig, of("assets"))
        path = "/static/css/a%20b.css"
        assert (await rig.get(HOST, path)).status_code == 200
        await store.stop()
        response = await rig.get(HOST, path)
        assert response.status_code == 502
        assert "cannot be reached" in (await told(rig))[0]
        assert (await rig.get(HOST, "/")).text == "app"
        await store.start()
        assert (await rig.get(HOST, path)).status_code == 200


async def test_a_silent_store_is_given_up(tmp_path: Path, store: S3) -> None:
    """One that takes the request and says nothing; then one that stops in the middle of an object."""
    sayings = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"]
    open_ends: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ends.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sayings.pop(0))

    port = free_port()
    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        times = {"answer_timeout_ms": 300, "silence_timeout_ms": 300}
        async with edge(tmp_path, store, endpoint=f"http://127.0.0.1:{port}", **times) as rig:
            await web(rig, of("assets"))
            response = await rig.get(HOST, "/static/a")
            assert response.status_code == 502
            assert "no answer in" in (await told(rig))[0]
            request = f"GET /static/a HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
            assert (await rig.raw(request)).endswith(b"\r\n\r\nhalf"), "and the connection was closed"

            async def silent() -> bool:
                return any("was silent" in message for message in await told(rig))

            await until(silent, bool, within_s=15, every_s=0.02)
    finally:
        for writer in open_ends:
            writer.close()
        server.close()
        await server.wait_closed()


async def test_without_a_store_the_file_is_refused_by_name(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await web(rig, of("assets"))
        response = await rig.get(HOST, "/static/a.txt")
        assert response.status_code == 502
        assert "proxy.buckets" in response.text
        assert (await rig.get(HOST, "/")).text == "app"


async def test_an_org_is_known_by_control_s_word_alone(tmp_path: Path, store: S3) -> None:
    """Until the row of the app is there nobody vouches for whom it belongs to."""
    async with edge(tmp_path, store) as rig:
        port = free_port()
        await rig.backend("app", IP, port)
        await rig.agent.rows(
            row("routes", f"host/{HOST}", {"app": "web"}),
            service_row(rig.ports, "web", port, statics=[of("private")]),
            machine_row("web", "m1", IP),
        )
        assert (await rig.get(HOST, "/static/secret.txt")).text == "app"
