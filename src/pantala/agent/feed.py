"""The feed server: one unix socket on which the host's proxy gets rows and asks for wakes (`wire/feed.py`).

While one proxy replaces another both are connected: all get the rows, each gets the answers to its own wakes, a drain
is over when every one of them says so. A proxy that does not keep up is disconnected; it comes back for a snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import msgspec
import structlog
from anyio.streams.buffered import BufferedByteReceiveStream

from pantala.agent.context import DrainResult
from pantala.errors import TransientError
from pantala.kit.clock import Clock
from pantala.wire import feed, node

log = structlog.get_logger()

FRAMES_WAITING_MAX = 4_096
ROWS_PER_FRAME = 500
LINE_BYTES_MAX = 4 * 1024 * 1024
WAKES_AT_ONCE_MAX = 256
LOAD_STALE_S = 5.0
TRACE_WITHIN_S = 2.0
TRACES_AT_ONCE_MAX = 4

WORST_FIRST: tuple[DrainResult, ...] = ("busy", "deadline", "no_proxy")

_PROXY_FRAME = msgspec.json.Decoder(feed.ProxyFrame)

OnWake = Callable[[str, float], Coroutine[Any, Any, feed.WakeResult]]
OnLog = Callable[[feed.ProxyLog], Coroutine[Any, Any, None]]
Snapshot = Callable[[], tuple[int, list[feed.FeedRow]]]


class _Connection:
    def __init__(self, number: int, stream: anyio.abc.ByteStream) -> None:
        self.number = number
        self.stream = stream
        self.outgoing, self.waiting = anyio.create_memory_object_stream[feed.AgentFrame](FRAMES_WAITING_MAX)
        self.loads: dict[str, feed.MachineLoad] = {}
        self.loads_at = -1e9
        self.drains: dict[int, _Drain] = {}
        self.traces: dict[int, _Trace] = {}
        self.scope = anyio.CancelScope()
        self.wakes = anyio.CapacityLimiter(WAKES_AT_ONCE_MAX)

    def send(self, frame: feed.AgentFrame) -> None:
        try:
            self.outgoing.send_nowait(frame)
        except anyio.WouldBlock:
            log.warning("proxy does not keep up; disconnecting it", connection=self.number)
            self.scope.cancel()
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            pass


class _Drain:
    def __init__(self) -> None:
        self.done = anyio.Event()
        self.result: DrainResult = "deadline"

    def finish(self, result: DrainResult) -> None:
        self.result = result
        self.done.set()


class _Trace:
    """The answer, None from a proxy that went away."""

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.answer: feed.Traced | None = None

    def finish(self, answer: feed.Traced | None) -> None:
        self.answer = answer
        self.done.set()


class Feed:
    """`snapshot` gives the revision and all rows; `push` is called with each change after it, in order."""

    def __init__(
        self, *, node: str, region: str, clock: Clock, snapshot: Snapshot, on_wake: OnWake, on_log: OnLog
    ) -> None:
        self._hello = feed.AgentHello(protocol=feed.FEED_PROTOCOL, node=node, region=region)
        self._clock = clock
        self._snapshot = snapshot
        self._on_wake = on_wake
        self._on_log = on_log
        self._connections: dict[int, _Connection] = {}
        self._numbers = 0
        self._drain_ids = 0
        self._trace_ids = 0
        self._traces = anyio.CapacityLimiter(TRACES_AT_ONCE_MAX)
        self.set_aside: set[str] = set()

    async def serve(self, path: Path, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Accept proxies until cancelled. A socket left by a dead agent is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        listener = await anyio.create_unix_listener(os.fspath(path), mode=0o600)
        try:
            async with listener:
                task_status.started()
                await listener.serve(self._serve_one)
        finally:
            path.unlink(missing_ok=True)

    def push(self, revision: int, rows: Sequence[feed.FeedRow]) -> None:
        frame = feed.Delta(revision=revision, rows=list(rows))
        for connection in self._connections.values():
            connection.send(frame)

    @property
    def connected(self) -> bool:
        return bool(self._connections)

    # -- ProxyLink -----------------------------------------------------------------------------------------------------

    async def drain(self, machine_id: str, *, deadline_s: float, load_seq: int | None = None) -> DrainResult:
        """`load_seq` is that of the newest proxy; what an older one still serves was counted by the caller."""
        connections = list(self._connections.values())
        if not connections:
            return "no_proxy"
        waits: list[tuple[_Connection, int, _Drain]] = []
        for connection in connections:
            self._drain_ids += 1
            drain = connection.drains[self._drain_ids] = _Drain()
            waits.append((connection, self._drain_ids, drain))
            newest = connection is connections[-1]
            connection.send(
                feed.Drain(
                    id=self._drain_ids,
                    machine=machine_id,
                    deadline_ms=int(deadline_s * 1000),
                    load_seq=load_seq if newest else None,
                )
            )
        try:
            with anyio.move_on_after(deadline_s + 2.0):
                for _, _, drain in waits:
                    await drain.done.wait()
        finally:
            for connection, number, _ in waits:
                connection.drains.pop(number, None)
        results = {drain.result for _, _, drain in waits}
        for worst in WORST_FIRST:
            if worst in results:
                return worst
        return "drained"

    async def undrain(self, machine_id: str) -> None:
        for connection in self._connections.values():
            connection.send(feed.Undrain(machine=machine_id))

    def load(self, machine_id: str) -> feed.MachineLoad | None:
        """What all proxies say together; None when one of them has not said anything lately."""
        now = self._clock.monotonic()
        if not self._connections or any(now - c.loads_at > LOAD_STALE_S for c in self._connections.values()):
            return None
        said = [c.loads[machine_id] for c in self._connections.values() if machine_id in c.loads]
        if not said:
            return feed.MachineLoad(machine=machine_id, in_flight=0, seq=0, idle_ms=1 << 40)
        newest = list(self._connections.values())[-1].loads.get(machine_id)
        return feed.MachineLoad(
            machine=machine_id,
            in_flight=sum(load.in_flight for load in said),
            seq=newest.seq if newest else 0,
            idle_ms=min(load.idle_ms for load in said),
        )

    async def trace(self, request: str) -> node.HostTrace:
        """What all proxies know of a request together. Raises TransientError when none of them answers."""
        async with self._traces:
            found = await self._ask_for(request)
        if not found:
            raise TransientError("the proxy of this host does not say what it knows of requests")
        records = [record for answer in found for record in answer.records]
        # While one proxy replaces another, each has the requests that it served.
        return node.HostTrace(since_ms=min(answer.since_ms for answer in found), records=records)

    async def _ask_for(self, request: str) -> list[feed.Traced]:
        waits: list[tuple[_Connection, int, _Trace]] = []
        for connection in self._connections.values():
            self._trace_ids += 1
            trace = connection.traces[self._trace_ids] = _Trace()
            waits.append((connection, self._trace_ids, trace))
            connection.send(feed.Trace(id=self._trace_ids, request=request))
        try:
            with anyio.move_on_after(TRACE_WITHIN_S):
                for _, _, trace in waits:
                    await trace.done.wait()
        finally:
            for connection, number, _ in waits:
                connection.traces.pop(number, None)
        return [trace.answer for _, _, trace in waits if trace.answer is not None]

    # -- one proxy -----------------------------------------------------------------------------------------------------

    async def _serve_one(self, stream: anyio.abc.ByteStream) -> None:
        self._numbers += 1
        connection = _Connection(self._numbers, stream)
        try:
            async with stream:
                with connection.scope:
                    async with anyio.create_task_group() as tasks:
                        # No await between the two lines below: what changes later queues up behind the snapshot.
                        self._send_snapshot(connection)
                        self._connections[connection.number] = connection
                        tasks.start_soon(self._write, connection)
                        await self._read(connection, tasks)
                        tasks.cancel_scope.cancel()
        except* (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
            pass
        finally:
            self._connections.pop(connection.number, None)
            for drain in connection.drains.values():
                drain.finish("no_proxy")
            for trace in connection.traces.values():
                trace.finish(None)
            connection.outgoing.close()
            connection.waiting.close()
            log.info("proxy disconnected", connection=connection.number)

    def _send_snapshot(self, connection: _Connection) -> None:
        connection.send(self._hello)
        revision, rows = self._snapshot()
        chunks = [rows[start : start + ROWS_PER_FRAME] for start in range(0, len(rows), ROWS_PER_FRAME)] or [[]]
        for number, chunk in enumerate(chunks, start=1):
            connection.send(feed.Snapshot(revision=revision, rows=chunk, last=number == len(chunks)))

    async def _write(self, connection: _Connection) -> None:
        try:
            async for frame in connection.waiting:
                await connection.stream.send(msgspec.json.encode(frame) + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            connection.scope.cancel()

    async def _read(self, connection: _Connection, tasks: anyio.abc.TaskGroup) -> None:
        lines = BufferedByteReceiveStream(connection.stream)
        while True:
            try:
                line = await lines.receive_until(b"\n", LINE_BYTES_MAX)
            except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
            except anyio.DelimiterNotFound:
                log.warning("proxy sent an endless line; disconnecting it", connection=connection.number)
                return
            try:
                frame = _PROXY_FRAME.decode(line)
            except msgspec.DecodeError as error:
                log.warning("proxy frame cannot be read; skipped", error=str(error))
                continue
            if not await self._take(connection, frame, tasks):
                return

    async def _take(self, connection: _Connection, frame: feed.ProxyFrame, tasks: anyio.abc.TaskGroup) -> bool:
        match frame:
            case feed.ProxyHello():
                if frame.protocol != feed.FEED_PROTOCOL:
                    log.error("proxy speaks another protocol", theirs=frame.protocol, ours=feed.FEED_PROTOCOL)
                    return False
                log.info("proxy connected", connection=connection.number, pid=frame.pid, version=frame.version)
            case feed.Applied():
                if fresh := set(frame.set_aside) - self.set_aside:
                    log.error("proxy set rows aside", keys=sorted(fresh)[:20], count=len(fresh))
                self.set_aside = set(frame.set_aside)
            case feed.Wake():
                tasks.start_soon(self._wake, connection, frame)
            case feed.Load():
                connection.loads = {load.machine: load for load in frame.machines}
                connection.loads_at = self._clock.monotonic()
            case feed.Drained():
                if (drain := connection.drains.pop(frame.id, None)) is not None:
                    drain.finish(frame.result)
            case feed.Traced():
                if (trace := connection.traces.pop(frame.id, None)) is not None:
                    trace.finish(frame)
            case feed.ProxyLog():
                tasks.start_soon(self._on_log, frame)
        return True

    async def _wake(self, connection: _Connection, frame: feed.Wake) -> None:
        async with connection.wakes:
            result = await self._on_wake(frame.machine, frame.deadline_ms / 1000)
        connection.send(msgspec.structs.replace(result, id=frame.id))
