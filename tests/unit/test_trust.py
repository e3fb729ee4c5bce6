"""Nodes are believed while control calls them members: rows come with the member row and go with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from pantala.catalogue import Publisher, Replica, Trust, View, frames
from pantala.catalogue.store import CatalogueStore
from pantala.kit.clock import SystemClock
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer
from pantala.testing.bus import MemoryBus
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

CONTROL, NODE, THIEF = Signer(b"c" * 32), Signer(b"1" * 32), Signer(b"t" * 32)


def member(node: str, signer: Signer) -> Row:
    value = {
        "id": node,
        "region": "iad",
        "zone": "",
        "address": "10.0.0.1",
        "verify_key": signer.verify_key,
        "sealing_key": "",
        "edge": True,
    }
    return Row("nodes", f"member/{node}", value)


def machine(node: str, number: int) -> Row:
    value = {
        "id": f"m{number}",
        "app": "web",
        "region": "iad",
        "node": node,
        "instance_id": "i",
        "generation": 1,
        "state": "started",
        "ip4": "",
        "ip6": "",
        "services": [],
        "passing": [],
    }
    return Row("routes", f"m/m{number}", value)


class Cluster:
    """Control and nodes that publish over a bus in memory, and readers of them."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.bus = MemoryBus()
        self.clock = SystemClock()

    async def publisher(self, owner: str, signer: Signer, *, epoch: int = 1) -> Publisher:
        path = self.folder / f"{owner}-{signer.verify_key[:4].encode().hex()}.db"
        store = await self.stack.enter_async_context(CatalogueStore.open(path))
        made = Publisher(store, View(control="control"), self.bus, signer, self.clock, owner=owner, epoch=epoch)
        await made.open()
        await self.bus.serve(frames.fetch_subject(owner), made.answer)
        return made

    @asynccontextmanager
    async def reader(self, name: str = "reader") -> AsyncGenerator[tuple[Replica, View]]:
        path = self.folder / f"{name}.db"
        async with CatalogueStore.open(path) as store, anyio.create_task_group() as tasks:
            view = View(control="control")
            trust = Trust(view, {"control": CONTROL.verify_key})
            replica = Replica(store, view, self.bus, self.clock, trust.key_of)
            await replica.open()
            with self.bus.connection():
                await tasks.start(replica.run)
                tasks.start_soon(trust.follow, replica)
                yield replica, view
            tasks.cancel_scope.cancel()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncGenerator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(tmp_path, stack)


def shown(view: View) -> set[str]:
    return {row.key for row in view.all()}


async def sees(view: View, wanted: set[str]) -> None:
    async def look() -> set[str]:
        return shown(view)

    await until(look, lambda seen: seen == wanted, within_s=10, every_s=0.005)


async def test_a_node_is_believed_once_control_calls_it_a_member(cluster: Cluster) -> None:
    control, node = await cluster.publisher("control", CONTROL), await cluster.publisher("n1", NODE)
    await node.replace_all([machine("n1", 1)])
    async with cluster.reader() as (replica, view):
        await node.put([machine("n1", 2)])
        assert (shown(view), replica.refused) == (set(), 1)
        await control.replace_all([member("n1", NODE)])
        await sees(view, {"member/n1", "m/m1", "m/m2"})
        await node.put([machine("n1", 3)])
        await sees(view, {"member/n1", "m/m1", "m/m2", "m/m3"})


async def test_a_node_that_is_no_member_any_more_has_said_nothing(cluster: Cluster) -> None:
    control, node = await cluster.publisher("control", CONTROL), await cluster.publisher("n1", NODE)
    other = await cluster.publisher("n2", THIEF)
    await control.replace_all([member("n1", NODE), member("n2", THIEF)])
    await node.replace_all([machine("n1", 1)])
    await other.replace_all([machine("n2", 9)])
    async with cluster.reader() as (replica, view):
        await control.beat()
        await sees(view, {"member/n1", "member/n2", "m/m1", "m/m9"})
        told: list[Any] = []
        view.listen(lambda revision, rows: told.extend((row.key, row.value) for row in rows))
        await control.put([Row("nodes", "member/n1", None)])
        await sees(view, {"member/n2", "m/m9"})
        assert ("m/m1", None) in told  # a proxy hears that the machine is gone
        refused = replica.refused
        await node.put([machine("n1", 2)])
        await node.beat()
        assert (shown(view), replica.refused) == ({"member/n2", "m/m9"}, refused + 2)
    async with cluster.reader() as (_, again):
        assert shown(again) == {"member/n2", "m/m9"}  # nor does the disk remember it


async def test_what_was_kept_of_a_node_is_not_shown_without_its_member_row(cluster: Cluster) -> None:
    """A reader that was away while a node left: its file still has the rows, control's newest word comes first."""
    control, node = await cluster.publisher("control", CONTROL), await cluster.publisher("n1", NODE)
    await control.replace_all([member("n1", NODE)])
    await node.replace_all([machine("n1", 1)])
    async with cluster.reader() as (_, view):
        await control.beat()
        await sees(view, {"member/n1", "m/m1"})
    await control.put([Row("nodes", "member/n1", None)])
    async with cluster.reader() as (_, view):
        await control.beat()
        await sees(view, set())


async def test_another_key_voids_what_was_said_with_the_first(cluster: Cluster) -> None:
    control, node = await cluster.publisher("control", CONTROL), await cluster.publisher("n1", NODE)
    await control.replace_all([member("n1", NODE)])
    await node.replace_all([machine("n1", 1)])
    async with cluster.reader() as (_, view):
        await control.beat()
        await sees(view, {"member/n1", "m/m1"})
        await control.put([member("n1", THIEF)])
        await sees(view, {"member/n1"})


async def test_a_change_of_status_takes_nothing_away(cluster: Cluster) -> None:
    control, node = await cluster.publisher("control", CONTROL), await cluster.publisher("n1", NODE)
    row = member("n1", NODE)
    await control.replace_all([row])
    await node.replace_all([machine("n1", 1)])
    async with cluster.reader() as (_, view):
        await control.beat()
        await sees(view, {"member/n1", "m/m1"})
        gone: list[str] = []
        view.listen(lambda revision, rows: gone.extend(r.key for r in rows if r.value is None))
        await control.put([Row(row.stream, row.key, (row.value or {}) | {"status": "draining"})])
        await node.put([machine("n1", 2)])
        await sees(view, {"member/n1", "m/m1", "m/m2"})
        assert gone == []


async def test_a_node_cannot_make_itself_a_member(cluster: Cluster) -> None:
    await cluster.publisher("control", CONTROL)
    false_control = await cluster.publisher("control", THIEF, epoch=9)
    async with cluster.reader() as (replica, view):
        await false_control.replace_all([member("n1", THIEF)])
        assert (shown(view), replica.refused) == (set(), 1)
