"""HTTP/2 from clients, and to apps that speak it without TLS (`h2_backend`): gRPC, WebSockets, trailers, hops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from http2_rig import connected, speaker
from mesh_rig import HOST, cluster
from proxy_rig import WITHIN_S, Rig, app_rows, machine_row, row, running, service_row

from pantala.testing.authority import Authority
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.machine import Concurrency, HTTPOptions, Port

pytestmark = pytest.mark.anyio
IP = "127.0.5.2"


def ports(rig_ports: Any, *, h2_backend: bool) -> list[Port]:
    options = HTTPOptions(h2_backend=h2_backend)
    return [
        Port(port=rig_ports.http, handlers=["http"], http_options=options),
        Port(port=rig_ports.https, handlers=["tls", "http"], http_options=options),
    ]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        await rig.agent.rows(row("certs", "cert/web", rig.ca.issue(HOST)))
        yield rig


async def web(rig: Rig, port: int, *, h2_backend: bool = True, **service: Any) -> None:
    service = {"ports": ports(rig.ports, h2_backend=h2_backend), **service}
    await rig.agent.rows(
        *app_rows("web", HOST), service_row(rig.ports, "web", port, **service), machine_row("web", "m1", IP)
    )


# -- gRPC --------------------------------------------------------------------------------------------------------


class Service(grpc.GenericRpcHandler):
    """`Echo` answers each message as it comes, `Fail` by a status, `Sum` once at the end."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        match handler_call_details.method:
            case "/t/Echo":
                return grpc.stream_stream_rpc_method_handler(self.echo)
            case "/t/Sum":
                return grpc.stream_unary_rpc_method_handler(self.sum)
            case "/t/Fail":
                return grpc.unary_unary_rpc_method_handler(self.fail)
            case _:
                return None

    async def echo(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.send_initial_metadata((("x-first", "1"),))
        async for message in messages:
            yield message
        context.set_trailing_metadata((("x-last", "2"),))

    async def sum(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        total = 0
        async for message in messages:
            total += len(message)
        return str(total).encode()

    async def fail(self, message: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more", (("x-last", "3"),))
        return b""


@contextlib.asynccontextmanager
async def grpc_server(ip: str, port: int) -> AsyncGenerator[None]:
    server = aio.server()
    server.add_generic_rpc_handlers((Service(),))
    assert server.add_insecure_port(f"{ip}:{port}") == port
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


def channel(rig: Rig, ca: Authority) -> aio.Channel:
    credentials = grpc.ssl_channel_credentials(ca.pem().encode())
    options = [("grpc.ssl_target_name_override", HOST), ("grpc.default_authority", HOST), ("grpc.enable_http_proxy", 0)]
    return aio.secure_channel(f"{rig.address}:{rig.ports.https}", credentials, options=options)


async def all_kinds_of_calls(made: aio.Channel) -> None:
    call: Any = made.stream_stream("/t/Echo")()
    for number in range(5):  # each comes back before the next is sent
        await call.write(b"ping%d" % number)
        assert await asyncio.wait_for(call.read(), WITHIN_S) == b"ping%d" % number
    await call.done_writing()
    assert await call.read() == aio.EOF
    assert dict(await call.initial_metadata())["x-first"] == "1"
    assert dict(await call.trailing_metadata())["x-last"] == "2"

    async def large() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield bytes(1 << 20)

    total: Any = made.stream_unary("/t/Sum")(large())
    assert await asyncio.wait_for(total, 2 * WITHIN_S) == str(40 << 20).encode()

    with pytest.raises(aio.AioRpcError) as failed:
        await asyncio.wait_for(made.unary_unary("/t/Fail")(b""), WITHIN_S)  # pyright: ignore[reportArgumentType]
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")
    assert dict(failed.value.trailing_metadata())["x-last"] == "3"


async def test_grpc_of_every_kind(rig: Rig) -> None:
    port = free_port()
    await web(rig, port)
    async with grpc_server(IP, port), channel(rig, rig.ca) as made:
        await all_kinds_of_calls(made)


async def test_grpc_to_a_machine_of_another_host(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr") as pair:
        here, there = pair.hosts
        port = free_port()
        ca = Authority()
        await pair.rows(row("certs", "cert/web", ca.issue(HOST)))
        await pair.web(port, pair.machine(there, "m1"), ports=ports(pair.ports, h2_backend=True))
        async with grpc_server(there.machines, port), channel(here.rig, ca) as made:
            await all_kinds_of_calls(made)


async def test_one_connection_carries_what_the_app_allows(rig: Rig) -> None:
    gate, inside, connections = asyncio.Event(), 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal inside, connections
        connections += 1
        async with speaker(reader, writer, client=False, streams_max=4) as app:
            async for stream in app.requests():
                inside += 1
                app.answer_later(stream, gate)

    port = free_port()
    await web(rig, port, concurrency=Concurrency(type="requests", soft_limit=50, hard_limit=50))
    async with await asyncio.start_server(serve, IP, port):
        first = asyncio.create_task(rig.get(HOST))

        async def asked() -> int:
            return inside

        await until(asked, lambda now: now == 1, within_s=WITHIN_S, every_s=0.01)
        assert connections == 1
        more = [asyncio.create_task(rig.get(HOST)) for _ in range(15)]
        await until(asked, lambda now: now == 16, within_s=WITHIN_S, every_s=0.01)
        gate.set()
        answers = await asyncio.gather(first, *more)
        assert {(r.status_code, r.text) for r in answers} == {(200, "ok")}
        # 4 at a time on each connection of each worker thread
        assert connections <= 16 // 4 + 2


async def test_an_app_without_http_2_on_its_port_is_told_so(rig: Rig) -> None:
    async def only_http_1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readuntil(b"\r\n\r\n") == b"PRI * HTTP/2.0\r\n\r\n"
        writer.write(b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    port = free_port()
    await web(rig, port)
    async with await asyncio.start_server(only_http_1, IP, port):
        response = await rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (502, "PU01")
    assert "h2_backend" in response.json()["hint"]
    frames = await rig.agent.frames_of("ProxyLog")
    assert [(line.code, "h2_backend" in line.message) for line in frames] == [("PU01", True)]


async def test_trailers_of_an_http_1_app_reach_a_client_of_http_2(rig: Rig) -> None:
    seen: list[bytes] = []

    async def trail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        writer.write(b"0\r\nx-sum: 7\r\n\r\n")
        await reader.read()
        writer.close()

    port = free_port()
    await web(rig, port, h2_backend=False)
    async with await asyncio.start_server(trail, IP, port), connected(rig) as client:
        stream = client.ask(("te", "trailers"))
        head, body, trailers = await client.answer(stream)
        assert (head[":status"], body, trailers.get("x-sum")) == ("200", b"ok", "7")
    assert b"\r\nte: trailers\r\n" in seen[0].lower()


# -- WebSockets over HTTP/2 (RFC 8441) ---------------------------------------------------------------------------

WEBSOCKET = ((":protocol", "websocket"), ("sec-websocket-version", "13"), ("sec-websocket-protocol", "chat"))


async def say_over_websocket(rig: Rig, ca: Authority) -> None:
    async with connected(rig, ca) as client:
        assert client.h2.remote_settings.enable_connect_protocol == 1
        stream = client.ask(*WEBSOCKET, method="CONNECT", path="/chat")
        head = await client.head(stream)
        assert head[":status"] == "200"
        assert not {"upgrade", "connection", "sec-websocket-accept"} & set(head)
        for message in (b"\x81\x02hi", b"\x82\x7e\x01\x00" + b"z" * 256):
            client.say(stream, message)
            assert await client.data(stream, len(message)) == message
        other = client.ask(path="/beside")  # on the same connection
        assert (await client.head(other))[":status"] == "200"
        client.say(stream, b"", end=True)
        await client.end(stream)


async def test_a_websocket_over_http_2(rig: Rig) -> None:
    port = free_port()
    backend = await rig.backend("one", IP, port)
    await web(rig, port, h2_backend=False)
    await say_over_websocket(rig, rig.ca)
    request = backend.requests[0]
    assert (request.method, request.path, request.header("upgrade")) == ("GET", "/chat", "websocket")
    assert request.header("sec-websocket-protocol") == "chat"
    assert len(request.header("sec-websocket-key") or "") == 24
    assert request.header("via") == "2 fly.io"


async def test_a_websocket_over_http_2_to_another_host(tmp_path: Path) -> None:
    async with cluster(tmp_path, "iad", "lhr") as pair:
        here, there = pair.hosts
        port, ca = free_port(), Authority()
        await pair.rows(row("certs", "cert/web", ca.issue(HOST)))
        await there.rig.backend("one", there.machines, port)
        await pair.web(port, pair.machine(there, "m1"))
        await say_over_websocket(here.rig, ca)


async def test_a_websocket_that_the_app_refuses(rig: Rig) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        await reader.read()
        writer.close()

    port = free_port()
    await web(rig, port, h2_backend=False)
    async with await asyncio.start_server(refuse, IP, port), connected(rig) as client:
        stream = client.ask(*WEBSOCKET, method="CONNECT", path="/chat")
        head, body, _ = await client.answer(stream)
        assert (head[":status"], body) == ("403", b"no")


@pytest.mark.parametrize("fields", [(), ((":protocol", "tcp"),)], ids=["plain", "another protocol"])
async def test_other_tunnels_are_refused(rig: Rig, fields: tuple[tuple[str, str], ...]) -> None:
    await web(rig, free_port())
    async with connected(rig) as client:
        stream = client.ask(*fields, method="CONNECT", path="/" if fields else None)
        assert (await client.head(stream))[":status"] == "405"
