"""`http_options.compress`: which answers are compressed, how, and that nothing is held back."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import zstandard
from mesh_rig import talk
from proxy_rig import Backend, Request, Rig, answer, app_rows, machine_row, running, service_row

from pantala.testing.ports import free_port
from pantala.wire.machine import HTTPOptions, HTTPResponseOptions, Port

pytestmark = pytest.mark.anyio
HOST = "web.apps.test"
IP = "127.0.5.4"
TEXT = "".join(f"<li>line {n} of a page that repeats itself</li>\n" for n in range(2_000)).encode()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with running(tmp_path) as rig:
        yield rig


async def web(rig: Rig, port: int, **options: Any) -> None:
    options = {"compress": True, **options}
    ports = [Port(port=rig.ports.http, handlers=["http"], http_options=HTTPOptions(**options))]
    await rig.agent.rows(
        *app_rows("web", HOST), service_row(rig.ports, "web", port, ports=ports), machine_row("web", "m1", IP)
    )


async def says(rig: Rig, said: bytes, **options: Any) -> Backend:
    async def say(backend: Backend, request: Request) -> bytes:
        return said

    port = free_port()
    await web(rig, port, **options)
    return await rig.backend("one", IP, port, say)


async def raw(rig: Rig, accept_encoding: str, method: str = "GET", **headers: str) -> tuple[httpx2.Headers, bytes]:
    """The body as it came, decoded only from chunks."""
    url = f"http://{rig.address}:{rig.ports.http}/"
    sent = {"host": HOST, "accept-encoding": accept_encoding, **headers}
    async with (
        httpx2.AsyncClient(trust_env=False) as client,
        client.stream(method, url, headers=sent) as response,
    ):
        body = b"".join([part async for part in response.aiter_raw()])
        return response.headers, body


def unzstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


DECODERS: dict[str, Callable[[bytes], bytes]] = {"zstd": unzstd, "gzip": gzip.decompress, "deflate": zlib.decompress}


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip, deflate", "gzip"),
        ("deflate", "deflate"),
        ("zstd;q=.1, gzip", "gzip"),
    ],
)
async def test_the_best_that_the_client_takes(rig: Rig, accept: str, coding: str) -> None:
    await says(
        rig, answer(TEXT, "200 OK", "Content-Type: text/html", 'ETag: "v1"', "Accept-Ranges: bytes", "Vary: Cookie")
    )
    headers, body = await raw(rig, accept)
    assert headers["content-encoding"] == coding
    assert DECODERS[coding](body) == TEXT
    assert len(body) < len(TEXT) / 10
    assert headers["etag"] == 'W/"v1"'
    assert headers.get_list("vary") == ["Cookie", "Accept-Encoding"]
    assert "content-length" not in headers
    assert "accept-ranges" not in headers


async def test_brotli(rig: Rig) -> None:
    """What it says again is held in the proxy's own tests, which have a decoder."""
    await says(rig, answer(TEXT, "200 OK", "Content-Type: text/html"))
    headers, body = await raw(rig, "br, gzip")
    assert headers["content-encoding"] == "br"
    assert 100 < len(body) < len(TEXT) / 10


HTML = "Content-Type: text/html"


@pytest.mark.parametrize(
    ("said", "varies"),
    [
        pytest.param(answer(TEXT, "200 OK", HTML, "Content-Encoding: gzip"), False, id="encoded by the app"),
        pytest.param(answer(TEXT, "200 OK", "Content-Type: image/png"), False, id="no text"),
        pytest.param(answer(TEXT[:300], "200 OK", HTML), False, id="too small"),
        pytest.param(answer(TEXT, "206 Partial Content", HTML, "Content-Range: bytes 0-1/2"), False, id="a part"),
        pytest.param(answer(TEXT, "200 OK", HTML, "Cache-Control: no-transform"), False, id="no-transform"),
        pytest.param(answer(TEXT, "200 OK"), False, id="no type"),
        pytest.param(b'HTTP/1.1 304 Not Modified\r\nETag: "v1"\r\nContent-Type: text/html\r\n\r\n', False, id="304"),
        pytest.param(b"HTTP/1.1 204 No Content\r\nContent-Type: text/html\r\n\r\n", False, id="204"),
    ],
)
async def test_left_as_it_is(rig: Rig, said: bytes, varies: bool) -> None:
    await says(rig, said)
    headers, body = await raw(rig, "gzip")
    head, _, sent = said.partition(b"\r\n\r\n")
    assert body == sent
    assert headers.get("content-encoding") == ("gzip" if b"Content-Encoding: gzip" in head else None)
    assert ("vary" in headers) is varies
    assert headers.get("etag") == ('"v1"' if b"ETag" in head else None)


async def test_none_from_the_app_removes_itself(rig: Rig) -> None:
    await says(rig, answer(TEXT, "200 OK", HTML, "Content-Encoding: none"))
    headers, body = await raw(rig, "gzip")
    assert (headers.get("content-encoding"), body) == (None, TEXT)


async def test_a_client_that_takes_nothing_still_gets_vary(rig: Rig) -> None:
    await says(rig, answer(TEXT, "200 OK", HTML, 'ETag: "v1"'))
    headers, body = await raw(rig, "identity")
    assert (headers["vary"], headers["etag"], body) == ("Accept-Encoding", '"v1"', TEXT)


async def test_head_and_apps_that_did_not_ask_for_it(rig: Rig) -> None:
    await says(rig, f"HTTP/1.1 200 OK\r\nContent-Length: {len(TEXT)}\r\n{HTML}\r\n\r\n".encode())
    headers, body = await raw(rig, "gzip", method="HEAD")
    assert (headers["content-length"], body) == (str(len(TEXT)), b"")
    await web(rig, free_port(), compress=False)
    await says(rig, answer(TEXT, "200 OK", HTML), compress=None)
    headers, body = await raw(rig, "gzip")
    assert ("content-encoding" in headers, "vary" in headers, body) == (False, False, TEXT)


async def test_the_operator_s_headers_come_last(rig: Rig) -> None:
    response = HTTPResponseOptions(headers={"Vary": "X-One"})
    await says(rig, answer(TEXT, "200 OK", HTML), response=response)
    headers, body = await raw(rig, "gzip")
    assert (headers["vary"], gzip.decompress(body)) == ("X-One", TEXT)


async def test_what_is_written_goes_out_when_the_app_pauses(rig: Rig) -> None:
    more = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            writer.write(b"6\r\npart %d\r\n" % number)
            await writer.drain()
            await more.wait()
            more.clear()
        writer.write(b"0\r\n\r\n")
        await reader.read()
        writer.close()

    port = free_port()
    await web(rig, port)
    async with await asyncio.start_server(slow, IP, port), talk(rig.address, rig.ports.http) as client:
        await client.say(f"GET / HTTP/1.1\r\nHost: {HOST}\r\nAccept-Encoding: gzip\r\n\r\n".encode())
        assert b"content-encoding: gzip" in (await client.until(b"\r\n\r\n")).lower()
        decoder, text = zlib.decompressobj(wbits=31), b""
        for number in range(3):
            while not text.endswith(b"part %d" % number):
                size = int(await client.until(b"\r\n"), 16)
                text += decoder.decompress(await client.exactly(size))
                await client.exactly(2)
            more.set()
        while size := int(await client.until(b"\r\n"), 16):
            text += decoder.decompress(await client.exactly(size))
            await client.exactly(2)
        assert (text, decoder.eof) == (b"part 0part 1part 2", True)


async def test_trailers_follow_a_compressed_body(rig: Rig) -> None:
    async def trail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        writer.write(b"%x\r\n%b\r\n0\r\nx-sum: 7\r\n\r\n" % (len(TEXT), TEXT))
        await reader.read()
        writer.close()

    port = free_port()
    await web(rig, port)
    async with await asyncio.start_server(trail, IP, port), talk(rig.address, rig.ports.http) as client:
        ask = f"GET / HTTP/1.1\r\nHost: {HOST}\r\nAccept-Encoding: zstd\r\nTE: trailers\r\n\r\n"
        await client.say(ask.encode())
        await client.until(b"\r\n\r\n")
        body = b""
        while size := int(await client.until(b"\r\n"), 16):
            body += await client.exactly(size)
            await client.exactly(2)
        assert unzstd(body) == TEXT
        assert await client.until(b"\r\n\r\n") == b"x-sum: 7\r\n\r\n"
