"""Lines from a driver to the store and the bus: none lost, none twice, bounded."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pantala.kit.clock import SystemClock
from pantala.logs.collector import Collector, level_of, timestamp
from pantala.logs.store import Line, LogStore
from pantala.testing.bus import MemoryBus

pytestmark = pytest.mark.anyio


class Said(msgspec.Struct, frozen=True):
    timestamp_ns: int
    text: str
    position: int


class Ring:
    """A driver's log ring."""

    def __init__(self) -> None:
        self.records: list[Said] = []

    def say(self, *texts: str) -> None:
        for text in texts:
            self.records.append(Said(len(self.records) + 1_000, text, len(self.records) + 1))

    async def logs(self, machine_id: str, position: int) -> list[Said]:
        del machine_id
        return [record for record in self.records if record.position > position][:3]


def collector(store: LogStore, ring: Ring, bus: MemoryBus | None = None) -> Collector:
    return Collector(store, ring, bus or MemoryBus(), SystemClock(), node="n1", region="iad")


async def messages(store: LogStore, **given: Any) -> list[str]:
    wanted: dict[str, Any] = {"machine": None, "since_ns": 0, "limit": 100} | given
    return [line.message for line in await store.read("hello", **wanted)]


async def take(taker: Collector) -> int:
    return await taker.collect(app="hello", machine_id="m1", instance_id="i1")


async def test_lines_are_taken_over_once_also_by_the_next_agent(tmp_path: Path) -> None:
    ring = Ring()
    ring.say("one", "two", "three", "four")
    async with LogStore.open(tmp_path / "logs.db") as store:
        assert await take(collector(store, ring)) == 4
        ring.say("five")
        assert await take(collector(store, ring)) == 1
        assert await messages(store) == ["one", "two", "three", "four", "five"]


async def test_a_new_ring_is_read_from_its_beginning(tmp_path: Path) -> None:
    async with LogStore.open(tmp_path / "logs.db") as store:
        first = Ring()
        first.say("a", "b", "c")
        await take(collector(store, first))
        await collector(store, first).forget("m1", "i1")
        second = Ring()
        second.say("d")
        assert await take(collector(store, second)) == 1


async def test_reading_newest_and_continuing(tmp_path: Path) -> None:
    ring = Ring()
    ring.say(*(str(n) for n in range(10)))
    async with LogStore.open(tmp_path / "logs.db") as store:
        await take(collector(store, ring))
        assert await messages(store, limit=3) == ["7", "8", "9"]
        assert await messages(store, since_ns=1_004, limit=2) == ["5", "6"]
        assert await messages(store, machine="other") == []


async def test_the_store_is_bounded_by_lines_and_age(tmp_path: Path) -> None:
    def line(at_ns: int) -> Line:
        return Line(app="hello", machine="m", at_ns=at_ns, provider="app", level="info", message=str(at_ns))

    async with LogStore.open(tmp_path / "logs.db", lines_per_app_max=5, keep_s=100e-9) as store:
        await store.add([line(n) for n in range(1, 301)])
        await store.trim(now_ns=300)
        assert await messages(store, limit=1000) == ["296", "297", "298", "299", "300"]
        await store.trim(now_ns=398)
        assert await messages(store, limit=1000) == ["298", "299", "300"]


async def test_live_lines_have_the_form_that_log_readers_expect(tmp_path: Path) -> None:
    bus, heard = MemoryBus(), list[tuple[str, Any]]()

    async def hear(subject: str, payload: bytes) -> None:
        heard.append((subject, msgspec.json.decode(payload)))

    await bus.serve("logs.>", hear)
    ring = Ring()
    ring.say("ERROR it broke")
    async with LogStore.open(tmp_path / "logs.db") as store:
        taker = collector(store, ring, bus)
        await take(taker)
        await taker.platform_line(app="hello", machine_id="m1", message="stopped")
        await taker.proxy_line(app="hello", machine_id="", message="[PR01] none")
    assert [subject for subject, _ in heard] == ["logs.hello.iad.m1", "logs.hello.iad.m1", "logs.hello.iad.none"]
    assert heard[0][1] == {
        "event": {"provider": "app"},
        "fly": {"app": {"instance": "m1", "name": "hello"}, "region": "iad"},
        "host": "n1",
        "log": {"level": "error"},
        "message": "ERROR it broke",
        "timestamp": "1970-01-01T00:00:00.000001000Z",
    }
    assert [document["event"]["provider"] for _, document in heard] == ["app", "runner", "proxy"]


async def test_a_store_that_refuses_keeps_no_machine_up(tmp_path: Path) -> None:
    ring = Ring()
    ring.say("x")
    async with LogStore.open(tmp_path / "logs.db") as store:
        with contextlib.closing(sqlite3.connect(tmp_path / "logs.db")) as other:
            other.execute("DROP TABLE lines")
        assert await take(collector(store, ring)) == 0


@pytest.mark.parametrize(
    ("text", "level"),
    [("GET / 200", "info"), ("[WARN] slow", "warning"), ("2026 FATAL: no", "error"), ("debug: x", "debug")],
)
def test_levels(text: str, level: str) -> None:
    assert level_of(text) == level


def test_timestamps_have_nanoseconds() -> None:
    assert timestamp(1_795_000_000_123_456_789) == "2026-11-18T11:06:40.123456789Z"
