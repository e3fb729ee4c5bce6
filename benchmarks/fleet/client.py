"""Open-loop HTTP load: requests leave at their time whether others were answered or not, and count from that time."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence

import anyio
import msgspec
from anyio.abc import SocketStream

LIMIT_S = 10.0
"""A client that waits longer counts as one that got no answer."""
IDLE_MAX = 512
IDLE_S = 2.0
"""A server may end a connection that was quiet for longer."""

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`code` 0: none within `LIMIT_S`. `late_ms`: since the time at which it should have left."""

    kind: str
    code: int
    late_ms: float
    retry_after: bool = False
    body: bytes = b""


class Client:
    """HTTP/1.1 over kept connections to one address, as cheap as may be: it shares the machine with the server."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._host = host
        self._port = port
        self._head = f"Host: api.pantala.test\r\nAuthorization: Bearer {token}\r\n"
        self._idle: list[tuple[float, SocketStream]] = []

    async def ask(self, kind: str, method: str, path: str, body: bytes = b"", *, due: float | None = None) -> Answer:
        due = time.monotonic() if due is None else due
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        code, headers, text = 0, b"", b""
        with anyio.move_on_after(LIMIT_S):
            try:
                code, headers, text = await self._exchange(head.encode() + body)
            except (OSError, anyio.BrokenResourceError, anyio.EndOfStream):
                code = 0
        late_ms = (time.monotonic() - due) * 1000
        return Answer(kind=kind, code=code, late_ms=late_ms, retry_after=bool(_RETRY.search(headers)), body=text)

    async def close(self) -> None:
        for _, stream in self._idle:
            await stream.aclose()

    async def _exchange(self, request: bytes) -> tuple[int, bytes, bytes]:
        stream = await self._connected()
        done = False
        try:
            await stream.send(request)
            received = b""
            while (end := received.find(b"\r\n\r\n")) < 0:
                received += await stream.receive()
            headers = received[:end]
            found = _LENGTH.search(headers)
            parts, have, size = [received[end + 4 :]], len(received) - end - 4, int(found[1]) if found else 0
            while have < size:
                parts.append(await stream.receive())
                have += len(parts[-1])
            done = True
            return int(headers[9:12]), headers, b"".join(parts)
        finally:
            if done and len(self._idle) < IDLE_MAX:
                self._idle.append((time.monotonic(), stream))
            else:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()

    async def _connected(self) -> SocketStream:
        while self._idle:
            since, stream = self._idle.pop()
            if time.monotonic() - since < IDLE_S:
                return stream
            await stream.aclose()
        return await anyio.connect_tcp(self._host, self._port)


async def at_rate(per_s: float, seconds: float, ask: Callable[[int, float], Awaitable[Answer]]) -> Sequence[Answer]:
    """`ask(number, due)` for each request of so many seconds."""
    answers: list[Answer] = []
    begun = time.monotonic() + 0.1

    async def one(number: int, due: float) -> None:
        answers.append(await ask(number, due))

    async with anyio.create_task_group() as tasks:
        for number in range(round(per_s * seconds)):
            due = begun + number / per_s
            await anyio.sleep(max(due - time.monotonic(), 0))
            tasks.start_soon(one, number, due)
    return answers
