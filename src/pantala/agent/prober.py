"""Asks machines' ports over the network; implements `Prober`. Standard library streams, so that nothing is pooled."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import anyio
import anyio.abc

HEAD_BYTES_MAX = 16 * 1024


class SocketProber:
    async def tcp(self, address: str, port: int, *, timeout_s: float) -> str:
        try:
            with anyio.fail_after(timeout_s):
                await _connect(address, port)
        except TimeoutError:
            return f"no answer from {address}:{port} within {timeout_s:g} s"
        except OSError:
            return f"connection refused by {address}:{port}"
        return ""

    async def http(
        self,
        address: str,
        port: int,
        *,
        method: str,
        path: str,
        headers: dict[str, str],
        tls: bool,
        tls_verify: bool,
        timeout_s: float,
    ) -> tuple[int, str]:
        try:
            with anyio.fail_after(timeout_s):
                return await _exchange(address, port, _request(address, port, method, path, headers), tls, tls_verify)
        except TimeoutError:
            return 0, f"no answer from {address}:{port} within {timeout_s:g} s"
        except (OSError, ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream):
            return 0, f"connection refused by {address}:{port}"

    async def answer(self, address: str, port: int, *, timeout_s: float) -> int:
        try:
            with anyio.fail_after(timeout_s):
                async with await anyio.connect_tcp(address, port) as stream:
                    await stream.send(_request(address, port, "GET", "/", {}))
                    line = b""
                    while b"\n" not in line and len(line) < HEAD_BYTES_MAX:
                        line += await stream.receive()
        except (TimeoutError, OSError, anyio.BrokenResourceError, anyio.EndOfStream):
            return 0
        return _read(line)[0]


async def _connect(address: str, port: int) -> None:
    """Without streams: a request that woke the machine waits for this. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        code = connection.connect_ex((address, port))
        if code == errno.EINPROGRESS:
            await anyio.wait_writable(connection)
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _request(address: str, port: int, method: str, path: str, headers: dict[str, str]) -> bytes:
    given = {name.lower(): value for name, value in headers.items()}
    lines = {"host": f"{address}:{port}", "user-agent": "pantala-check", "accept": "*/*"} | given
    lines["connection"] = "close"
    text = "".join(f"{_clean(name)}: {_clean(value)}\r\n" for name, value in lines.items())
    return f"{_clean(method)} {_clean(path)} HTTP/1.1\r\n{text}\r\n".encode()


def _clean(text: str) -> str:
    return text.replace("\r", "").replace("\n", "")


async def _exchange(address: str, port: int, request: bytes, tls: bool, tls_verify: bool) -> tuple[int, str]:
    stream: anyio.abc.ByteStream
    if tls:
        settings = ssl.create_default_context()
        if not tls_verify:
            settings.check_hostname = False
            settings.verify_mode = ssl.CERT_NONE
        stream = await anyio.connect_tcp(address, port, ssl_context=settings)
    else:
        stream = await anyio.connect_tcp(address, port)
    async with stream:
        await stream.send(request)
        answer = b""
        while len(answer) < HEAD_BYTES_MAX:
            try:
                answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                break
    return _read(answer)


def _read(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return 0, "the answer is not HTTP"
    return int(words[1]), body.decode("utf-8", "replace")
