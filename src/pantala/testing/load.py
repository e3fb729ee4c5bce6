"""A client that loads an app and counts every failure; end-to-end tests run it inside the client namespace.

Commands come on standard input, one a line, and each is answered by one line of JSON: `burst N` sends N requests at
once, `start RATE` begins requests at a fixed rate (a slow answer delays none of those after it), `stop` ends them.
Every second request goes over a kept connection, the others over new ones. Nothing is sent a second time: a reset, a
time-out and any status but 200 is a failure. Own HTTP over raw streams, since libraries retry on their own account.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
import sys
import time
from collections import Counter, deque
from urllib.parse import urlsplit

import msgspec

TIMEOUT_S = 20.0
KEPT_FOR_S = 20.0
IN_FLIGHT_MAX = 2_000
DETAILS_MAX = 20
VERSION_HEADER = "x-version"


class Report(msgspec.Struct, kw_only=True):
    """`versions` counts the answers by their `X-Version`; `failures` by what went wrong. `failing_s`: from the first
    request that failed to the last one, each at its beginning."""

    sent: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    on_kept: int = 0
    on_new: int = 0
    versions: dict[str, int] = {}
    failures: dict[str, int] = {}
    details: list[str] = []
    failing_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


class BadAnswer(Exception):
    """The answer was read, and it is not the app's."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.idle_since = time.monotonic()
        self.closing = False

    def usable(self) -> bool:
        """Nobody told us that it ends, and nothing came that would be taken for the next answer."""
        ended = self.reader.at_eof() or self.writer.is_closing()
        return not (ended or self.closing) and time.monotonic() - self.idle_since < KEPT_FOR_S

    async def exchange(self, host: str, path: str, *, keep: bool) -> str:
        """The version in the answer. Raises BadAnswer, OSError, EOFError."""
        connection = "keep-alive" if keep else "close"
        text = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\nUser-Agent: pantala-load\r\n\r\n"
        self.writer.write(text.encode())
        await self.writer.drain()
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if length := int(headers.get("content-length", "0")):
            body = await self.reader.readexactly(length)
        self.closing = headers.get("connection", "").lower() == "close"
        self.idle_since = time.monotonic()
        if first.split(" ")[1:2] != ["200"]:
            said = body.decode(errors="replace").replace("\n", " ")[:400]
            raise BadAnswer(f"{first.removeprefix('HTTP/1.1 ')}: {said}")
        return headers.get(VERSION_HEADER, "")


class Load:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path or "/"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._kept: deque[_Connection] = deque()
        self._turns = itertools.count()
        self._report = Report()
        self._took_ms: list[float] = []
        self._failing: list[float] = []
        self._begun = time.monotonic()

    async def burst(self, count: int) -> Report:
        self._fresh()
        await asyncio.gather(*(self._one() for _ in range(count)))
        return self._finished()

    async def steady(self, rate: float, stop: asyncio.Event) -> Report:
        """Each request has its moment, whether or not earlier ones were answered."""
        self._fresh()
        under_way: set[asyncio.Task[None]] = set()
        for number in itertools.count():
            pause_s = self._begun + number / rate - time.monotonic()
            if pause_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause_s)
            if stop.is_set():
                break
            if len(under_way) >= IN_FLIGHT_MAX:
                self._failed("too many unanswered", "this client stopped waiting for its oldest requests")
                break
            task = asyncio.create_task(self._one())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(under_way)
        return self._finished()

    async def close(self) -> None:
        for connection in self._kept:
            connection.writer.close()

    def _fresh(self) -> None:
        self._report = Report(versions={}, failures={}, details=[])
        self._took_ms, self._failing = [], []
        self._begun = time.monotonic()

    def _finished(self) -> Report:
        report, took = self._report, sorted(self._took_ms)
        report.seconds = round(time.monotonic() - self._begun, 2)
        report.rate = round(report.sent / max(report.seconds, 0.001), 1)
        if self._failing:
            report.failing_s = round(max(self._failing) - min(self._failing), 3)
        if took:
            report.p50_ms, report.max_ms = round(took[len(took) // 2], 1), round(took[-1], 1)
            report.p99_ms = round(took[min(len(took) * 99 // 100, len(took) - 1)], 1)
        return report

    async def _one(self) -> None:
        keep = next(self._turns) % 2 == 0
        begun = time.monotonic()
        self._report.sent += 1
        connection: _Connection | None = None
        reused = False
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection, reused = await self._connected(keep=keep)
                version = await connection.exchange(self._host, self._path, keep=keep)
        except (BadAnswer, OSError, EOFError, TimeoutError, asyncio.LimitOverrunError, ValueError) as error:
            kind = str(error)[:3] if isinstance(error, BadAnswer) else type(error).__name__
            after_ms = round((time.monotonic() - begun) * 1000)
            on = "a kept" if reused else "a new"
            self._failing.append(begun)
            self._failed(kind, f"+{begun - self._begun:.2f} s, after {after_ms} ms on {on} connection: {error}")
            if connection is not None:
                connection.writer.transport.abort()
            return
        self._took_ms.append((time.monotonic() - begun) * 1000)
        self._report.versions[version] = self._report.versions.get(version, 0) + 1
        if reused:
            self._report.on_kept += 1
        else:
            self._report.on_new += 1
        if keep and connection.usable():
            self._kept.append(connection)
        else:
            connection.writer.close()

    async def _connected(self, *, keep: bool) -> tuple[_Connection, bool]:
        while keep and self._kept:
            connection = self._kept.popleft()
            if connection.usable():
                return connection, True
            connection.writer.close()
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        return _Connection(reader, writer), False

    def _failed(self, kind: str, detail: str) -> None:
        counted = Counter(self._report.failures)
        counted[kind] += 1
        self._report.failures = dict(counted)
        if len(self._report.details) < DETAILS_MAX:
            self._report.details.append(f"{kind}: {detail}")


async def serve(url: str) -> None:
    """Obey commands until standard input ends."""
    load = Load(url)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    stop, steady = asyncio.Event(), None
    while line := (await reader.readline()).decode().split():
        match line:
            case ["burst", count]:
                _say(await load.burst(int(count)))
            case ["start", rate]:
                stop = asyncio.Event()
                steady = asyncio.create_task(load.steady(float(rate), stop))
            case ["stop"] if steady is not None:
                stop.set()
                _say(await steady)
            case _:
                raise SystemExit(f"unknown command: {' '.join(line)}")
    await load.close()


def _say(report: Report) -> None:
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
