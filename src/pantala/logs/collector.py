"""From a driver's ring to the store and to the bus. The agent's machine tasks call `collect`; the feed hands in what
the proxy reports.

Live lines go to `logs.<app>.<region>.<machine>` as the documents that log readers of the original expect.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import anyio
import msgspec
import structlog

from pantala.errors import PantalaError
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock
from pantala.logs.store import Line, LogStore

log = structlog.get_logger()

MESSAGE_MAX = 16 * 1024
_LEVEL = re.compile(r"\b(debug|info|warn(?:ing)?|error|fatal|critical)\b", re.IGNORECASE)
_LEVELS = {"warning": "warning", "warn": "warning", "fatal": "error", "critical": "error"}


class Record(Protocol):
    """A line as a driver hands it out."""

    @property
    def timestamp_ns(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def position(self) -> int: ...


class Source(Protocol):
    """The part of a driver that is read here."""

    async def logs(self, machine_id: str, position: int) -> Sequence[Record]: ...


class Collector:
    def __init__(self, store: LogStore, source: Source, bus: Bus, clock: Clock, *, node: str, region: str) -> None:
        self._store = store
        self._source = source
        self._bus = bus
        self._clock = clock
        self._node = node
        self._region = region
        self._turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._positions: dict[tuple[str, str], int] = {}

    async def collect(self, *, app: str, machine_id: str, instance_id: str) -> int:
        """Take over what the driver kept since the last time. Troubles are logged, never raised: a machine must not
        stay up because its words cannot be kept."""
        total = 0
        try:
            async with self._turns[machine_id]:
                key = (machine_id, instance_id)
                if key not in self._positions:
                    self._positions[key] = await self._store.position(*key)
                while records := await self._source.logs(machine_id, self._positions[key]):
                    lines = [self._line(app, machine_id, record) for record in records]
                    await self._store.add(lines, position=(*key, records[-1].position))
                    self._positions[key] = records[-1].position
                    await self._publish(lines)
                    total += len(lines)
        except PantalaError as error:
            log.warning("log lines were not taken over", machine=machine_id, error=str(error))
        return total

    async def forget(self, machine_id: str, instance_id: str) -> None:
        """The runtime whose ring was read is gone; its next one counts from the beginning."""
        self._positions.pop((machine_id, instance_id), None)
        if not any(key[0] == machine_id for key in self._positions):
            self._turns.pop(machine_id, None)
        try:
            await self._store.forget_position(machine_id, instance_id)
        except PantalaError as error:
            log.warning("log position was not forgotten", machine=machine_id, error=str(error))

    async def platform_line(self, *, app: str, machine_id: str, message: str, level: str = "info") -> None:
        await self._own(app, machine_id, "runner", message, level)

    async def proxy_line(self, *, app: str, machine_id: str, message: str) -> None:
        await self._own(app, machine_id, "proxy", message, "error")

    async def _own(self, app: str, machine_id: str, provider: str, message: str, level: str) -> None:
        line = Line(
            app=app,
            machine=machine_id,
            at_ns=int(self._clock.now().timestamp() * 1e9),
            provider=provider,
            level=level,
            message=message[:MESSAGE_MAX],
        )
        try:
            await self._store.add([line])
            await self._publish([line])
        except PantalaError as error:
            log.warning("log line was not kept", machine=machine_id, error=str(error))

    def _line(self, app: str, machine_id: str, record: Record) -> Line:
        return Line(
            app=app,
            machine=machine_id,
            at_ns=record.timestamp_ns,
            provider="app",
            level=level_of(record.text),
            message=record.text[:MESSAGE_MAX],
        )

    async def _publish(self, lines: Sequence[Line]) -> None:
        for line in lines:
            document = {
                "event": {"provider": line.provider},
                "fly": {"app": {"instance": line.machine, "name": line.app}, "region": self._region},
                "host": self._node,
                "log": {"level": line.level},
                "message": line.message,
                "timestamp": timestamp(line.at_ns),
            }
            subject = f"logs.{line.app}.{self._region}.{line.machine or 'none'}"
            try:
                await self._bus.publish(subject, msgspec.json.encode(document))
            except PantalaError:
                return  # nobody can hear it now; it is in the store


def level_of(text: str) -> str:
    """The level a line names itself within its first words, else info."""
    found = _LEVEL.search(text[:80])
    word = found[1].lower() if found else "info"
    return _LEVELS.get(word, word)


def timestamp(at_ns: int) -> str:
    """RFC 3339 with nanoseconds."""
    whole, rest = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
