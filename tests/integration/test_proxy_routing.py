"""From a client's connection to an app's answer: names, TLS, HTTP versions, headers, refusals."""

from __future__ import annotations

import asyncio
import re
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
    json_of,
    machine_row,
    row,
    running,
    service_row,
)

from pantala.testing.ports import free_port
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


async def test_http_2_to_the_client_http_1_to_the_app(rig: Rig) -> None:
    async with rig.client("one.apps.test", http2=True) as client:
        answers = await asyncio.gather(
            *(client.get(f"/{n}", extensions={"sni_hostname": "one.apps.test"}) for n in range(20))
        )
        assert {(a.status_code, a.text, a.http_version) for a in answers} == {(200, "one", "HTTP/2")}
        assert answers[0].headers["via"] == "2 fly.io"
        big = await client.post("/", content=b"x" * 300_000, extensions={"sni_hostname": "one.apps.test"})
        assert big.status_code == 200


async def test_a_new_certificate_serves_the_next_handshake(rig: Rig) -> None:
    async def over_tls(name: str) -> bytes:
        context = rig.ca.context()
        _, writer = await asyncio.open_connection("127.0.0.1", rig.ports.https, ssl=context, server_hostname=name)
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return certificate

    before = await over_tls("one.apps.test")
    await rig.agent.rows(row("certs", "cert/one", rig.ca.issue("one.apps.test")))
    assert await over_tls("one.apps.test") != before
    await rig.agent.rows(row("certs", "cert/one", None))
    await over_tls("one.apps.test")  # the wildcard serves it now
    with pytest.raises(ssl.SSLError):
        await over_tls("elsewhere.test")
    await over_tls("two.apps.test")


async def test_the_headers_an_app_and_a_client_see(rig: Rig) -> None:
    seen: list[Request] = []

    async def note(backend: Backend, request: Request) -> bytes:
        seen.append(request)
        return answer(b"", "200 OK", "Server: gunicorn", "Connection: X-Inner", "X-Inner: 1", "X-Kept: 1")

    await rig.backend("three", "127.0.1.3", (port := free_port()), note)
    await rig.agent.rows(
        *app_rows("three", "three.apps.test"),
        service_row(rig.ports, "three", port),
        machine_row("three", "m-three", "127.0.1.3"),
    )
    async with rig.client("three.apps.test") as client:
        response = await client.get(
            "/p?q=1",
            headers={
                "X-Forwarded-For": "1.2.3.4",
                "X-Forwarded-Proto": "gopher",
                "Fly-Client-IP": "6.6.6.6",
                "Fly-Request-Id": "mine",
                "Fly-Replay-Src": "instance=x",
                "X-Hop": "1",
                "Connection": "X-Hop, Fly-Client-IP",
            },
            extensions={"sni_hostname": "three.apps.test"},
        )
    request = seen[0]
    request_id = response.headers["fly-request-id"]
    wanted = {
        "host": f"three.apps.test:{rig.ports.https}",
        "fly-client-ip": "127.0.0.1",
        "x-forwarded-for": "1.2.3.4, 127.0.0.1, 127.0.0.1",
        "x-forwarded-proto": "https",
        "x-forwarded-ssl": "on",
        "x-forwarded-port": str(rig.ports.https),
        "fly-forwarded-port": str(rig.ports.https),
        "fly-region": "iad",
        "fly-request-id": request_id,
        "via": "1.1 fly.io",
        "x-hop": None,
        "connection": None,
        "fly-replay-src": None,
    }
    assert {name: request.header(name) for name in wanted} == wanted
    assert (request.method, request.path) == ("GET", "/p?q=1")
    assert (request.header("x-request-start") or "").startswith("t=")
    assert len(request_id) == 26 + len("-iad")
    assert request_id.endswith("-iad")
    assert re.fullmatch(r"Fly/[\d.]+ \(\d{4}-\d\d-\d\d\)", response.headers["server"])
    assert response.headers["x-kept"] == "1"
    assert "x-inner" not in response.headers


async def test_pristine_and_response_headers_of_a_service(rig: Rig) -> None:
    async def named(backend: Backend, request: Request) -> bytes:
        return answer(b"", "200 OK", "Server: gunicorn", "X-Secret: 1")

    await rig.backend("own", "127.0.1.4", (port := free_port()), named)
    options = HTTPOptions(response=HTTPResponseOptions(headers={"X-Secret": False, "X-Two": ["a", "b"]}, pristine=True))
    ports = [Port(port=rig.ports.http, handlers=["http"], http_options=options)]
    await rig.agent.rows(
        *app_rows("own", "own.apps.test"),
        service_row(rig.ports, "own", port, ports=ports),
        machine_row("own", "m-own", "127.0.1.4"),
    )
    response = await rig.get("own.apps.test")
    assert response.headers["server"] == "gunicorn"
    assert response.headers.get_list("x-two") == ["a", "b"]
    assert not {"x-secret", "via", "fly-request-id"} & set(response.headers)


async def test_force_https_redirects_http_only(rig: Rig) -> None:
    ports = [
        Port(port=rig.ports.http, handlers=["http"], force_https=True),
        Port(port=rig.ports.https, handlers=["tls", "http"]),
    ]
    await rig.agent.rows(
        *app_rows("safe", "safe.apps.test"),
        service_row(rig.ports, "safe", 1, ports=ports),
        machine_row("safe", "m-safe", "127.0.1.9", "stopped"),
    )
    response = await rig.get("safe.apps.test", "/a?b=c")
    assert (response.status_code, response.headers["location"]) == (301, "https://safe.apps.test/a?b=c")
    assert not await rig.agent_asked_for_a_wake()


async def test_websocket_passes_through(rig: Rig) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.ports.http)
    writer.write(
        b"GET /ws HTTP/1.1\r\nHost: one.apps.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 15)
    assert head.startswith(b"HTTP/1.1 101")
    assert b"upgrade: websocket" in head.lower()
    for message in (b"\x81\x02hi", b"\x82\x7e\x01\x00" + b"z" * 256):
        writer.write(message)
        assert await asyncio.wait_for(reader.readexactly(len(message)), 5) == message
    writer.close()


async def test_a_platform_service_gets_streams_unbuffered(rig: Rig) -> None:
    size = 3_000_000

    async def count(backend: Backend, request: Request) -> bytes:
        return answer(str(len(request.body)).encode())

    backend = await rig.backend("registry", "127.0.1.5", free_port(), count)
    await rig.agent.rows(row("routes", "host/registry.test", HostRow(backend=f"{backend.ip}:{backend.port}")))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // 100_000):
            yield b"x" * 100_000

    async with httpx2.AsyncClient(trust_env=False, timeout=15) as client:
        response = await client.put(
            f"http://127.0.0.1:{rig.ports.http}/v2/", content=pieces(), headers={"host": "registry.test"}
        )
    assert response.text == str(size)


async def test_a_dedicated_address_needs_no_name(rig: Rig) -> None:
    await rig.agent.rows(row("routes", "addr/127.0.0.1", AddressRow(kind="dedicated", app="two")))
    assert (await rig.get("whatever.test")).text == "two"
    await rig.agent.rows(row("routes", "addr/127.0.0.1", AddressRow(kind="shared")))
    assert (await rig.get("whatever.test")).status_code == 404


async def test_an_unknown_name_gets_a_page_with_the_request_id(rig: Rig) -> None:
    page = await rig.get("nobody.test", accept="text/html")
    assert page.status_code == 404
    assert page.headers["fly-request-id"] in page.text
    assert "nobody.test" in page.text
    document = json_of(await rig.get("nobody.test", accept="application/json"))
    assert document["error"] == "No app is at nobody.test."


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: one.apps.test\r\nHost: one.apps.test\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: one.apps.test\r\nX_Forwarded_For: 1\r\n\r\n", 400),
        (b"GET http://two.apps.test/ HTTP/1.1\r\nHost: one.apps.test\r\n\r\n", 400),
        (b"CONNECT one.apps.test:443 HTTP/1.1\r\nHost: one.apps.test\r\n\r\n", 405),
        (b"POST / HTTP/1.1\r\nHost: one.apps.test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: one.apps.test\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    ],
)
async def test_an_ambiguous_request_is_refused(rig: Rig, request_bytes: bytes, status: int) -> None:
    assert (await rig.raw(request_bytes)).startswith(f"HTTP/1.1 {status}".encode())


async def test_a_poisonous_row_is_set_aside_and_stops_nobody(rig: Rig) -> None:
    poison = [
        row("routes", "m/bad", {"id": "bad", "state": 7}),
        row("routes", "host/bad host", HostRow(app="one")),
        row("routes", "svc/one/d9", {"app": "one", "protocol": "tcp", "internal_port": 99999}),
        row("routes", "m/m-one", {"id": "m-one"}),
        row("certs", "cert/bad", {"names": ["bad.test"], "chain_pem": "x", "not_after_ms": 1, "key_pem": "y"}),
    ]
    await rig.agent.rows(*poison, row("routes", "host/also.apps.test", HostRow(app="two")))
    assert set(await rig.agent.applied()) == {one.key for one in poison}
    assert (await rig.get("one.apps.test")).text == "one"  # the older, readable row stays
    assert (await rig.get("also.apps.test")).text == "two"
    assert set((await rig.snapshot())["set_aside"]) == {one.key for one in poison}
    await rig.agent.rows(row("routes", "m/bad", None), machine_row("one", "m-one", "127.0.1.1"))
    assert set(await rig.agent.applied()) == {"host/bad host", "svc/one/d9", "cert/bad"}


async def test_an_app_without_http_on_the_port_is_not_served(rig: Rig) -> None:
    ports = [Port(port=rig.ports.https, handlers=["tls", "http"])]
    await rig.agent.rows(
        *app_rows("deaf", "deaf.apps.test"),
        service_row(rig.ports, "deaf", 1, ports=ports, concurrency=Concurrency()),
        machine_row("deaf", "m-deaf", "127.0.1.9"),
    )
    assert (await rig.get("deaf.apps.test")).status_code == 404


async def test_metrics(rig: Rig) -> None:
    await rig.get("one.apps.test")
    text = await rig.admin("/metrics") or ""
    counted = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert int(counted["pantala_proxy_requests_total"]) >= 1
