"""Rows from owner to reader over a bus that loses, repeats, reorders, forges and truncates."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from pantala.catalogue import Publisher, Replica, View, frames
from pantala.catalogue.store import CatalogueStore
from pantala.kit.clock import SystemClock, unix_ms
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer
from pantala.testing.bus import MemoryBus
from pantala.testing.clock import ManualClock
from pantala.wire.catalogue import CatalogueFrame, OwnedRow, Signed

pytestmark = pytest.mark.anyio

SIGNERS = {"control": Signer(b"c" * 32), "n1": Signer(b"1" * 32), "n2": Signer(b"2" * 32)}
KEYS = {name: signer.verify_key for name, signer in SIGNERS.items()}


class HostileBus(MemoryBus):
    """Published messages suffer as the dice say; requests may be lost."""

    def __init__(self, dice: random.Random, badness: float) -> None:
        super().__init__()
        self.dice = dice
        self.badness = badness
        self.held: list[tuple[str, bytes]] = []

    async def publish(self, subject: str, payload: bytes) -> None:
        if self.dice.random() >= self.badness:
            await super().publish(subject, payload)
            return
        match self.dice.choice(["lose", "twice", "hold", "release", "cut", "flip", "forge"]):
            case "twice":
                await super().publish(subject, payload)
                await super().publish(subject, payload)
            case "hold":
                self.held.append((subject, payload))
            case "release":
                await super().publish(subject, payload)
                self.dice.shuffle(self.held)
                while self.held:
                    await super().publish(*self.held.pop())
            case "cut":
                await super().publish(subject, payload[: self.dice.randrange(len(payload))])
            case "flip":
                broken = bytearray(payload)
                broken[self.dice.randrange(len(broken))] ^= 1 << self.dice.randrange(8)
                await super().publish(subject, bytes(broken))
            case "forge":
                await super().publish(subject, forged(payload))
            case _:
                pass

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        answer = await super().request(subject, payload, timeout_s=timeout_s)
        return forged(answer) if self.dice.random() < self.badness / 2 else answer


def forged(payload: bytes) -> bytes:
    """Another node's words under this owner's name."""
    signed = msgspec.json.decode(payload, type=Signed)
    return msgspec.json.encode(msgspec.structs.replace(signed, signature=SIGNERS["n2"].sign(signed.payload)))


class Owner:
    def __init__(self, store: CatalogueStore, view: View, publisher: Publisher) -> None:
        self.store = store
        self.view = view
        self.publisher = publisher


@asynccontextmanager
async def owner(
    folder: Path, bus: MemoryBus, name: str, *, epoch: int = 1, silent: bool = False
) -> AsyncGenerator[Owner]:
    async with CatalogueStore.open(folder / f"{name}.db") as store:
        view = View(control="control")
        publisher = Publisher(store, view, bus, SIGNERS[name], SystemClock(), owner=name, epoch=epoch)
        await publisher.open()
        await bus.serve(frames.fetch_subject(name), publisher.answer)
        if publisher.silent and not silent:
            await publisher.replace_all([])
        yield Owner(store, view, publisher)


@asynccontextmanager
async def reader(folder: Path, bus: MemoryBus) -> AsyncGenerator[tuple[View, Replica]]:
    async with CatalogueStore.open(folder / "reader.db") as store:
        view = View(control="control")
        replica = Replica(store, view, bus, SystemClock(), KEYS.get)
        await replica.open()
        await bus.serve(frames.delta_subject("*"), replica.on_delta)
        await bus.serve(frames.beat_subject("*"), replica.on_beat)
        yield view, replica


def app_row(name: str, network: int = 1) -> Row:
    return Row("routes", f"app/{name}", {"app": name, "org": "personal", "network": network})


def machine_row(machine_id: str, node: str, *, generation: int = 1, state: str = "started") -> Row:
    value: dict[str, Any] = {
        "id": machine_id,
        "app": "hello",
        "region": "iad",
        "node": node,
        "instance_id": "01",
        "generation": generation,
        "state": state,
        "ip4": "172.19.0.2",
        "ip6": "fdaa::2",
        "services": [],
        "passing": [],
    }
    return Row("routes", f"m/{machine_id}", value)


def shown(view: View) -> dict[tuple[str, str], Any]:
    return {(row.stream, row.key): row.value for row in view.all()}


async def catch_up(publisher: Publisher, replica: Replica, bus: HostileBus) -> None:
    """The bus heals; one beat and what it makes the reader ask for."""
    bus.badness = 0.0
    await publisher.beat()
    for _ in range(3):
        await replica.catch_up("control")
        await publisher.beat()


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_the_bus_does_views_agree_once_it_heals(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    bus = HostileBus(dice, badness=dice.choice([0.1, 0.4, 0.9]))
    async with owner(tmp_path, bus, "control") as control, reader(tmp_path, bus) as (view, replica):
        for step in range(dice.randint(5, 60)):
            names = [f"a{dice.randrange(12)}" for _ in range(dice.randint(1, 4))]
            match dice.choice(["put", "put", "delete", "all", "beat", "fetch"]):
                case "put":
                    await control.publisher.put([app_row(name, step) for name in names])
                case "delete":
                    await control.publisher.put([Row("routes", f"app/{name}", None) for name in names])
                case "all":
                    await control.publisher.replace_all([app_row(name, step) for name in names])
                case "beat":
                    await control.publisher.beat()
                case _:
                    await replica.catch_up("control")
            for row in view.all():
                assert row.value is not None
                assert row.value["app"] == row.key.removeprefix("app/"), "nothing forged is ever shown"
        await catch_up(control.publisher, replica, bus)
        assert shown(view) == shown(control.view)


async def test_a_reader_that_starts_late_fetches_in_chunks(tmp_path: Path) -> None:
    bus = HostileBus(random.Random(0), 0.0)
    rows = [app_row(f"app-{n}") for n in range(3 * frames.FRAME_ROWS_MAX + 7)]
    async with owner(tmp_path, bus, "control") as control:
        await control.publisher.put(rows)
        async with reader(tmp_path, bus) as (view, replica):
            await control.publisher.beat()
            assert await replica.catch_up("control")
            assert len(shown(view)) == len(rows)


async def test_an_owner_that_comes_back_goes_on_and_a_new_epoch_replaces(tmp_path: Path) -> None:
    bus = HostileBus(random.Random(0), 0.0)
    async with reader(tmp_path, bus) as (view, replica):
        async with owner(tmp_path, bus, "control") as first:
            await first.publisher.put([app_row("old"), app_row("kept")])
            seq = first.publisher.seq
        bus._handlers = bus._handlers[:2]
        async with owner(tmp_path, bus, "control") as second:
            assert second.publisher.seq > seq, "sequences that may have been used are skipped"
            await second.publisher.put([Row("routes", "app/old", None)])
            await catch_up(second.publisher, replica, bus)
            assert set(shown(view)) == {("routes", "app/kept")}
        bus._handlers = bus._handlers[:2]
        async with owner(tmp_path, bus, "control", epoch=2) as third:
            await third.publisher.put([app_row("fresh")])
            await catch_up(third.publisher, replica, bus)
            assert set(shown(view)) == {("routes", "app/fresh")}


async def test_a_new_epoch_takes_nothing_away_before_it_has_said_everything(tmp_path: Path) -> None:
    bus = HostileBus(random.Random(0), 0.0)
    names = [f"a{number}" for number in range(frames.FRAME_ROWS_MAX + 1)]
    async with reader(tmp_path, bus) as (view, replica):
        async with owner(tmp_path, bus, "control") as first:
            await first.publisher.put([app_row(name) for name in names])
            await catch_up(first.publisher, replica, bus)
            before = shown(view)
            assert len(before) == len(names)
        bus._handlers = bus._handlers[:2]
        async with owner(tmp_path, bus, "control", epoch=2, silent=True) as second:
            lost: list[int] = []
            view_apply = view.apply

            def watched(*arguments: Any, **named: Any) -> None:
                view_apply(*arguments, **named)
                lost.append(len(before.keys() - shown(view).keys()))

            view.apply = watched
            await second.publisher.beat()
            await replica.catch_up("control")
            await second.publisher.put([app_row(names[0], 2)])
            await replica.catch_up("control")
            assert shown(view) == before
            await second.publisher.replace_all([app_row(name, 2) for name in names])
            await catch_up(second.publisher, replica, bus)
            assert {value["network"] for value in shown(view).values()} == {2}
            assert set(lost) == {0}


async def test_unchanged_rows_cost_nothing(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with owner(tmp_path, bus, "control") as control:
        seq = await control.publisher.put([app_row("a")])
        assert await control.publisher.put([app_row("a")]) == seq
        assert await control.publisher.replace_all([app_row("a")]) == seq


async def test_nobody_speaks_for_another(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with reader(tmp_path, bus) as (view, _), owner(tmp_path, bus, "n1") as node:
        await node.publisher.put(
            [
                machine_row("m1", "n1"),
                machine_row("m2", "n2"),
                app_row("stolen"),
                Row("routes", "m/m3", {"id": "m3", "app": 7}),
                Row("strange", "x/y", {}),
            ]
        )
        assert set(shown(view)) == {("routes", "m/m1")}
        assert len(view.set_aside) == 4


async def test_the_newest_generation_of_a_machine_wins(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with reader(tmp_path, bus) as (view, _):
        async with owner(tmp_path, bus, "n1") as old, owner(tmp_path, bus, "n2") as new:
            await new.publisher.put([machine_row("m1", "n2", generation=2)])
            await old.publisher.put([machine_row("m1", "n1", generation=1)])
            row = view.get("routes", "m/m1")
            assert row is not None
            assert row["node"] == "n2"


async def test_nothing_after_a_gap_is_shown_before_the_gap_is_filled(tmp_path: Path) -> None:
    bus = HostileBus(random.Random(0), 0.0)
    async with reader(tmp_path, bus) as (view, replica), owner(tmp_path, bus, "control") as control:
        await control.publisher.put([app_row("first")])
        bus.down = True
        await control.publisher.put([app_row("lost")])
        bus.down = False
        await control.publisher.put([app_row("after")])
        assert set(shown(view)) == {("routes", "app/first")}
        assert await replica.catch_up("control")
        assert shown(view) == shown(control.view)


async def test_a_replayed_frame_changes_nothing(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with reader(tmp_path, bus) as (view, replica), owner(tmp_path, bus, "control") as control:
        await control.publisher.put([app_row("a", 1)])
        old = frames.sign(
            SIGNERS["control"],
            CatalogueFrame(
                owner="control",
                epoch=1,
                after_seq=0,
                seq=1,
                rows=[OwnedRow(stream="routes", key="app/a", seq=1, value=None)],
            ),
        )
        await replica.on_delta("", old)
        assert ("routes", "app/a") in shown(view)


async def test_the_view_is_there_after_a_restart(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with owner(tmp_path, bus, "control") as control:
        async with reader(tmp_path, bus) as (view, _):
            await control.publisher.put([app_row("a"), app_row("b")])
            before = shown(view)
        async with reader(tmp_path, MemoryBus()) as (view, _):
            assert shown(view) == before


async def test_run_catches_up_by_itself(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with owner(tmp_path, bus, "control") as control, CatalogueStore.open(tmp_path / "r.db") as store:
        await control.publisher.put([app_row("a")])
        view = View(control="control")
        replica = Replica(store, view, bus, SystemClock(), KEYS.get)
        told = anyio.Event()
        view.listen(lambda revision, rows: told.set())
        async with anyio.create_task_group() as tasks:
            await tasks.start(replica.run)
            await control.publisher.beat()
            with anyio.fail_after(15):
                await told.wait()
            tasks.cancel_scope.cancel()
        assert set(shown(view)) == {("routes", "app/a")}


async def test_a_beat_says_what_its_owners_clock_shows(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with reader(tmp_path, bus) as (_, replica), owner(tmp_path, bus, "n1") as first:
        clock = SystemClock()
        earliest_ms = unix_ms(clock.now()) - int(clock.monotonic() * 1000)
        await first.publisher.beat()
        latest_ms = unix_ms(clock.now()) - int(clock.monotonic() * 1000)
        ahead_ms = replica.ahead_ms("n1")
        assert ahead_ms is not None
        assert earliest_ms - 2 <= ahead_ms <= latest_ms + 2
        assert replica.ahead_ms("n2") is None


async def test_a_busy_reader_does_not_take_its_own_lateness_for_a_slow_clock(tmp_path: Path) -> None:
    bus, theirs, ours = MemoryBus(), ManualClock(), ManualClock()
    async with (
        CatalogueStore.open(tmp_path / "n1.db") as store,
        CatalogueStore.open(tmp_path / "reader.db") as kept,
    ):
        publisher = Publisher(store, View(control="control"), bus, SIGNERS["n1"], theirs, owner="n1", epoch=1)
        await publisher.open()
        await publisher.replace_all([])
        replica = Replica(kept, View(control="control"), bus, ours, KEYS.get)
        said: list[bytes] = []

        async def late(subject: str, payload: bytes) -> None:
            said.append(payload)

        await bus.serve(frames.beat_subject("*"), late)

        async def beats(number: int, *, late_s: float = 0.0) -> None:
            for _ in range(number):
                await theirs.advance(1)
                await ours.advance(1)
                await publisher.beat()
                await ours.advance(late_s)
                await replica.on_beat("", said.pop())
                await theirs.advance(late_s)

        await beats(3)
        right = replica.ahead_ms("n1")
        await beats(3, late_s=7)
        assert replica.ahead_ms("n1") == right
        await theirs.advance(-3600)
        await beats(65)
        assert right is not None
        assert replica.ahead_ms("n1") == right - 3_600_000, "a clock that was set back"
