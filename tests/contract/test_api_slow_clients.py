"""Clients that send slowly, stop in the middle, or do not read: each is ended in time, and holds up nobody else."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import httpx2
import pytest

from pantala.server.app import make_app
from pantala.server.connections import Bounds
from pantala.server.http import HttpServer
from pantala.server.limits import RateLimits
from pantala.testing.platform import TestPlatform
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

WITHIN_S = 10.0


@asynccontextmanager
async def serving(platform: TestPlatform, bounds: Bounds, **more: float) -> AsyncGenerator[HttpServer]:
    limits = RateLimits(platform.control.context.clock, per_s=1000, burst=10_000)
    app = make_app(platform.control, limits, **more)  # pyright: ignore[reportArgumentType]
    server = HttpServer(app, "127.0.0.1", 0, bounds)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run_until_stopped)
        try:
            yield server
        finally:
            server.stop(now=True)


class Client:
    """A connection to the server, byte by byte."""

    def __init__(self, stream: anyio.abc.SocketStream, platform: TestPlatform) -> None:
        self._stream = stream
        self._token = platform.token

    async def says(self, text: str) -> None:
        await self._stream.send(text.encode())

    async def begins(self, path: str = "/v1/apps", *, body_bytes: int = 100) -> None:
        """The head of a request whose body is to follow."""
        await self.says(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._token}\r\n"
            f"content-type: application/json\r\ncontent-length: {body_bytes}\r\n\r\n"
        )

    async def hears(self, *, until: bytes = b"the end of the connection", some: bool = False) -> bytes:
        """`some`: more may come after `until`."""
        heard = bytearray()
        with anyio.fail_after(WITHIN_S):
            try:
                while not (until in heard if some else heard.endswith(until)):
                    heard += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass
        return bytes(heard)


@asynccontextmanager
async def client(server: HttpServer, platform: TestPlatform) -> AsyncGenerator[Client]:
    host, port = server.address
    async with await anyio.connect_tcp(host, port) as stream:
        yield Client(stream, platform)


async def answers(server: HttpServer, platform: TestPlatform) -> int:
    """The code of a usual request."""
    host, port = server.address
    async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", headers=platform.auth) as http:
        return (await http.post("/v1/apps", json={"app_name": "other", "org_slug": "acme"})).status_code


async def test_a_body_that_does_not_come_is_a_408_and_ends_the_connection(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(), body_within_s=0.1) as server, client(server, platform) as slow:
        await slow.begins()
        await slow.says('{"app_name": ')
        head, _, body = (await slow.hears()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head
        assert json.loads(body)["status"] == "timeout"
        assert (await platform.http.get("/v1/apps?org_slug=acme", headers=platform.auth)).json()["apps"] == []


async def test_slow_bodies_take_no_turn_from_others(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(), at_once=1) as server, client(server, platform) as slow:
        await slow.begins()
        assert await answers(server, platform) == 201


async def test_more_bodies_on_their_way_than_there_is_room_for_are_refused(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(), bodies_at_once=1) as server, client(server, platform) as slow:
        await slow.begins()
        await until(lambda: code_of(server, platform), lambda code: code == 429, within_s=WITHIN_S)


async def code_of(server: HttpServer, platform: TestPlatform) -> int:
    return await answers(server, platform)


async def test_an_upload_may_be_long_but_not_silent(platform: TestPlatform) -> None:
    await platform.create_app("web")
    async with serving(platform, Bounds(), upload_silent_s=0.1) as server, client(server, platform) as slow:
        await slow.begins("/v1/apps/web/builds", body_bytes=1000)
        await slow.says("a piece")
        heard = await slow.hears()
        assert heard.startswith(b"HTTP/1.1 408 ")
        assert b"nothing of the upload came" in heard


async def test_a_head_that_does_not_end_ends_the_connection(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(head_s=0.1)) as server:
        async with client(server, platform) as slow, client(server, platform) as silent:
            await slow.says("GET /v1/apps HTTP/1.1\r\nhost: x\r\nx-more: ")
            assert await slow.hears() == b""
            assert await silent.hears() == b""
        assert server.ended.counts == {"head not whole": 2}


async def test_a_connection_that_is_kept_has_the_same_time_for_each_request(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(head_s=1.0)) as server, client(server, platform) as slow:
        await slow.says("GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await slow.hears(until=b"}")).startswith(b"HTTP/1.1 404 ")
        await slow.says("GET /nothing HTTP/1.1\r\nhost: x\r\nx-more: ")
        assert await slow.hears() == b""
        assert server.ended.counts == {"head not whole": 1}


async def test_an_answer_that_nobody_reads_is_dropped(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(unread_s=0.1)) as server, client(server, platform) as deaf:
        await deaf.says("GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 100)  # at once: it is cut off soon

        async def ended() -> int:
            return server.ended.counts["answer not read"]

        await until(ended, lambda number: number == 1, within_s=WITHIN_S)


async def test_connections_above_the_bound_are_told_so(platform: TestPlatform) -> None:
    async with serving(platform, Bounds(connections_max=2)) as server:
        async with client(server, platform) as first, client(server, platform) as second:
            await first.says("GET ")
            await second.says("GET ")
            assert await answers(server, platform) == 429
        await until(lambda: code_of(server, platform), lambda code: code == 201, within_s=WITHIN_S)


async def test_log_streams_above_the_bound_are_refused_until_one_ends(platform: TestPlatform) -> None:
    await platform.create_app("web")
    follow = f"GET /v1/apps/web/logs?follow=true HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {platform.token}\r\n\r\n"

    async def begun(server: HttpServer) -> bytes:
        async with client(server, platform) as one:
            await one.says(follow)
            return (await one.hears(until=b"\r\n\r\n", some=True))[:12]

    async with serving(platform, Bounds(), waits=2) as server:
        async with client(server, platform) as first, client(server, platform) as second:
            for stream in (first, second):
                await stream.says(follow)
                assert (await stream.hears(until=b"\r\n\r\n", some=True)).startswith(b"HTTP/1.1 200 ")
            assert await begun(server) == b"HTTP/1.1 429"
            assert await answers(server, platform) == 201
        await until(lambda: begun(server), lambda head: head == b"HTTP/1.1 200", within_s=WITHIN_S)
