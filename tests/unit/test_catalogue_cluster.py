"""Several nodes that hold each other's rows: partitions, owners that are away, holders that lie, restored states."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from anyio.abc import TaskGroup, TaskStatus

from pantala.catalogue import Publisher, Replica, View, frames
from pantala.catalogue.store import CatalogueStore
from pantala.errors import NodeUnreachable
from pantala.kit.clock import unix_ms
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer
from pantala.testing.bus import MemoryBus
from pantala.testing.clock import ManualClock
from pantala.testing.poll import until
from pantala.wire.catalogue import CatalogueFrame, Fetch, HeldRows, OwnedRow

pytestmark = pytest.mark.anyio

NODES = ("n1", "n2", "n3")
OWNERS = ("control", *NODES)
SIGNERS = {name: Signer(name.encode().ljust(32, b"-")) for name in OWNERS}
KEYS = {name: signer.verify_key for name, signer in SIGNERS.items()}


class Network:
    """One bus with sides: what is published on one is not heard on the other."""

    def __init__(self) -> None:
        self.buses: dict[str, SideBus] = {}
        self.away: frozenset[str] = frozenset()
        self.requests: list[str] = []
        self.under_way = 0

    @contextmanager
    def busy(self) -> Generator[None]:
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def joined(self, one: str, other: str) -> bool:
        return one == other or ((one in self.away) == (other in self.away))

    def bus(self, name: str) -> SideBus:
        self.buses[name] = SideBus(self, name)
        return self.buses[name]


class SideBus(MemoryBus):
    """`taint` is what this node makes of its answers."""

    def __init__(self, network: Network, name: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.taint: Callable[[str, bytes], bytes] | None = None

    async def publish(self, subject: str, payload: bytes) -> None:
        with self.network.busy():
            for other in list(self.network.buses.values()):
                if self.network.joined(self.name, other.name):
                    await MemoryBus.publish(other, subject, payload)

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        self.network.requests.append(subject)
        with self.network.busy():
            return await self._ask(subject, payload, timeout_s)

    async def _ask(self, subject: str, payload: bytes, timeout_s: float) -> bytes:
        for other in list(self.network.buses.values()):
            if self.network.joined(self.name, other.name):
                try:
                    answer = await MemoryBus.request(other, subject, payload, timeout_s=timeout_s)
                except NodeUnreachable:
                    continue
                return other.taint(subject, answer) if other.taint else answer
        raise NodeUnreachable(f"nobody serves {subject}")


class SteppedClock(ManualClock):
    """`advance` lets what it woke finish its messages; waiting for every task of the process would take far longer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._network = network

    async def advance(self, seconds: float) -> None:
        target = self._elapsed_s + seconds
        while due := sorted((s for s in self._sleepers if s[0] <= target), key=lambda s: s[0]):
            self._sleepers.remove(due[0])
            self._elapsed_s, event = due[0]
            event.set()
            quiet = 0
            while quiet < 3:
                await anyio.sleep(0.0005)
                quiet = 0 if self._network.under_way else quiet + 1
        self._elapsed_s = target


class Node:
    def __init__(self, name: str, view: View, publisher: Publisher, replica: Replica | None) -> None:
        self.name = name
        self.view = view
        self.publisher = publisher
        self.replica = replica
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    def shown(self) -> dict[tuple[str, str], Any]:
        return {(row.stream, row.key): row.value for row in self.view.all()}


class Cluster:
    """Control and three nodes; time moves by `pass_s`."""

    def __init__(self, folder: Path, tasks: TaskGroup) -> None:
        self.folder = folder
        self.network = Network()
        self.clock = SteppedClock(self.network)
        self.nodes: dict[str, Node] = {}
        self._tasks = tasks

    async def start(
        self, name: str, *, epoch: int = 1, new_epoch: Callable[[int], Awaitable[int]] | None = None
    ) -> Node:
        """`control` reads nobody, as in the server."""
        opened: Node = await self._tasks.start(self._live, name, epoch, new_epoch)
        return opened

    async def _live(
        self,
        name: str,
        epoch: int,
        new_epoch: Callable[[int], Awaitable[int]] | None,
        *,
        task_status: TaskStatus[Node],
    ) -> None:
        bus, view, replica = self.network.bus(name), View(control="control"), None
        async with CatalogueStore.open(self.folder / f"{name}.db") as store:
            if name != "control":
                replica = Replica(
                    store, view, bus, self.clock, KEYS.get, own=name, holders=lambda: NODES, dice=random.Random(name)
                )
                await replica.open()
            publisher = Publisher(
                store, view, bus, SIGNERS[name], self.clock, owner=name, epoch=epoch, new_epoch=new_epoch,
                holders=lambda: NODES,
            )  # fmt: skip
            await publisher.open()
            node = self.nodes[name] = Node(name, view, publisher, replica)
            with node.scope:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(publisher.run)
                    if replica is not None:
                        await tasks.start(replica.run)
                    task_status.started(node)
        self.network.buses.pop(name, None)
        self.nodes.pop(name, None)
        node.ended.set()

    async def end(self, name: str) -> None:
        """As a kill would: nothing more is said."""
        node = self.nodes[name]
        node.scope.cancel()
        await node.ended.wait()

    async def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            await self.clock.advance(0.1)

    async def agree_within(self, seconds: float, wanted: Callable[[Node], bool]) -> None:
        """No more than `seconds` of the cluster's time; what the machine still computes then is given its time."""
        await self.pass_s(seconds)
        nodes = [node for node in self.nodes.values() if node.replica is not None]
        await until(self._views(nodes), lambda _: all(wanted(node) for node in nodes), within_s=20)

    @staticmethod
    def _views(nodes: list[Node]) -> Callable[[], Awaitable[list[Any]]]:
        async def look() -> list[Any]:
            return [(node.name, node.shown()) for node in nodes]

        return look


@asynccontextmanager
async def cluster(folder: Path) -> AsyncGenerator[Cluster]:
    async with anyio.create_task_group() as tasks:
        made = Cluster(folder, tasks)
        for name in OWNERS:
            node = await made.start(name)
            await node.publisher.replace_all([])
        yield made
        tasks.cancel_scope.cancel()


def app_row(name: str, network: int = 1) -> Row:
    return Row("routes", f"app/{name}", {"app": name, "org": "personal", "network": network})


def machine_row(machine_id: str, node: str, state: str = "started") -> Row:
    value: dict[str, Any] = {
        "id": machine_id, "app": "hello", "region": "iad", "node": node, "instance_id": "01", "generation": 1,
        "state": state, "ip4": "172.19.0.2", "ip6": "fdaa::2", "services": [], "passing": [],
    }  # fmt: skip
    return Row("routes", f"m/{machine_id}", value)


def has(*keys: str) -> Callable[[Node], bool]:
    return lambda node: {key for _, key in node.shown()} == set(keys)


@pytest.mark.parametrize("seed", range(8))
async def test_both_sides_of_a_partition_agree_within_two_seconds_of_its_end(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    async with cluster(tmp_path) as made:
        nodes = made.nodes
        made.network.away = frozenset(dice.sample(OWNERS, dice.choice([1, 2])))
        truth: dict[str, dict[str, Row]] = {name: {} for name in OWNERS}
        for step in range(30):
            name = dice.choice(OWNERS)
            key = f"{name}-{dice.randrange(4)}"
            row = (
                app_row(key, step) if name == "control" else machine_row(key, name, dice.choice(["started", "stopped"]))
            )
            if dice.random() < 0.3:
                row = Row(row.stream, row.key, None)
            truth[name][row.key] = row
            await nodes[name].publisher.put([row])
            await made.pass_s(1.0)
        made.network.away = frozenset()
        wanted = {row.key: row.value for rows in truth.values() for row in rows.values() if row.value is not None}
        await made.agree_within(2.0, lambda node: {key: value for (_, key), value in node.shown().items()} == wanted)


async def test_the_words_of_an_owner_that_is_away_come_from_who_heard_them(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.nodes["control"].publisher.put([app_row("before"), app_row("gone")])
        await made.agree_within(1.0, has("app/before", "app/gone"))
        made.network.away = frozenset({"n3"})
        await made.nodes["control"].publisher.put([app_row("after"), Row("routes", "app/gone", None)])
        await made.end("control")
        made.network.away = frozenset()
        await made.agree_within(5.0, has("app/before", "app/after"))


async def test_an_owner_that_is_not_there_yet_is_asked_for_less_and_less_often_and_known_when_it_comes(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path) as made:
        await made.end("n3")
        for name in ("n1", "n2"):
            replica = made.nodes[name].replica
            assert replica is not None
            await replica.forget("n3")
            replica.expect("n3")
        made.network.requests.clear()
        await made.pass_s(30.0)
        asked = made.network.requests.count(frames.fetch_subject("n3"))
        assert 2 * 3 <= asked <= 2 * 12
        late = await made.start("n3")
        await late.publisher.replace_all([machine_row("late", "n3")])
        await made.agree_within(1.0, has("m/late"))


async def test_a_node_that_joins_while_control_is_off_learns_all_from_the_others(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.end("n3")
        (tmp_path / "n3.db").unlink()
        await made.nodes["control"].publisher.put([app_row(f"a{number}") for number in range(50)])
        await made.pass_s(1.5)
        await made.end("control")
        await made.start("n3")
        await made.agree_within(5.0, lambda node: len(node.shown()) == 50)


def leave_out(subject: str, answer: bytes) -> bytes:
    if not subject.endswith(".rows"):
        return answer
    held = msgspec.json.decode(answer, type=HeldRows)
    return msgspec.json.encode(msgspec.structs.replace(held, rows=held.rows[1:]))


def invent(subject: str, answer: bytes) -> bytes:
    if not subject.endswith(".rows"):
        return answer
    held = msgspec.json.decode(answer, type=HeldRows)
    row = OwnedRow(stream="routes", key="app/mine", seq=held.seq, value={"app": "mine", "org": "x", "network": 9})
    mine = frames.sign_row(SIGNERS["n1"], held.owner, held.epoch, row)
    return msgspec.json.encode(msgspec.structs.replace(held, rows=[*held.rows, mine]))


@pytest.mark.parametrize("lie", [leave_out, invent])
async def test_a_holder_that_lies_is_not_believed(tmp_path: Path, lie: Callable[[str, bytes], bytes]) -> None:
    async with cluster(tmp_path) as made:
        await made.end("n3")
        (tmp_path / "n3.db").unlink()
        await made.nodes["control"].publisher.put([app_row("a"), app_row("b")])
        await made.pass_s(1.5)
        await made.end("control")
        made.network.buses["n1"].taint = lie
        await made.end("n2")
        node = await made.start("n3")
        await made.pass_s(5.0)
        assert node.shown() == {}, "half of the truth is none"
        await made.start("n2")
        await made.agree_within(5.0, has("app/a", "app/b"))


async def test_an_owner_whose_state_was_restored_starts_over_in_a_new_epoch(tmp_path: Path) -> None:
    asked: list[int] = []

    async def new_epoch(above: int) -> int:
        asked.append(above)
        return above + 1

    async with cluster(tmp_path) as made:
        await made.nodes["n1"].publisher.put([machine_row("old", "n1"), machine_row("kept", "n1")])
        await made.agree_within(1.0, has("m/old", "m/kept"))
        await made.end("n1")
        shutil.copy(tmp_path / "n1.db", tmp_path / "backup.db")
        node = await made.start("n1")
        await node.publisher.put([Row("routes", "m/old", None), machine_row("new", "n1")])
        await made.agree_within(1.0, has("m/kept", "m/new"))
        await made.end("n1")
        shutil.copy(tmp_path / "backup.db", tmp_path / "n1.db")
        node = await made.start("n1", new_epoch=new_epoch)
        await node.publisher.replace_all([machine_row("old", "n1"), machine_row("kept", "n1")])
        await made.agree_within(5.0, has("m/old", "m/kept"))
        assert asked == [1]
        assert node.publisher.epoch == 2
        await made.end("n1")
        again = await made.start("n1")
        assert again.publisher.epoch == 2, "settings that know only the first epoch do not bring it back"


async def test_many_rows_come_in_few_chunks(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.end("n3")
        await made.nodes["control"].publisher.put([app_row(f"a{number:05}") for number in range(12_000)])
        made.network.requests.clear()
        node = await made.start("n3")

        async def count() -> int:
            await made.pass_s(0.5)
            return len(node.shown())

        await until(count, lambda number: number == 12_000, within_s=60)
        asked = [subject for subject in made.network.requests if subject == frames.fetch_subject("control")]
        assert len(asked) <= 3


async def test_rows_of_an_older_version_are_taken_from_their_owner_only(tmp_path: Path) -> None:
    """It signs frames, not rows, and tells no digest with them."""
    async with cluster(tmp_path) as made:
        await made.end("control")
        await made.pass_s(1.0)
        row = OwnedRow(stream="routes", key="app/old", seq=1, value={"app": "old", "org": "x", "network": 1, "new": 2})
        frame = CatalogueFrame(owner="control", epoch=2, after_seq=0, seq=1, rows=[row])
        document = msgspec.to_builtins(frame) | {"field_of_a_later_version": True}
        for name in ("count", "digest"):
            del document[name]
        payload = msgspec.json.encode(document)
        data = msgspec.json.encode(
            {"owner": "control", "payload": payload, "signature": SIGNERS["control"].sign(payload)}
        )
        reader = made.nodes["n1"]
        assert reader.replica is not None
        await reader.replica.on_delta("", data)
        assert reader.shown()["routes", "app/old"]["new"] == 2, "fields that nobody knows yet are kept"
        await made.pass_s(3.0)
        assert made.nodes["n2"].shown() == {}
        wanted = msgspec.json.encode(Fetch(owner="control", epoch=0, after_seq=0))
        answer = await made.network.buses["n2"].request(frames.rows_subject("n1"), wanted, timeout_s=1)
        assert msgspec.json.decode(answer, type=HeldRows).proof == b""


async def test_a_reader_that_was_away_longer_than_deletions_are_kept_still_agrees(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.nodes["n1"].publisher.put([machine_row("gone", "n1"), machine_row("kept", "n1")])
        await made.agree_within(1.0, has("m/gone", "m/kept"))
        made.network.away = frozenset({"n3"})
        await made.nodes["n1"].publisher.put([Row("routes", "m/gone", None)])
        await made.end("n1")
        async with CatalogueStore.open(tmp_path / "n1.db") as store:
            await store.forget_tombstones(unix_ms(made.clock.now()) + 1)
        await made.start("n1")
        await made.pass_s(1.0)
        made.network.away = frozenset()
        await made.agree_within(3.0, has("m/kept"))
