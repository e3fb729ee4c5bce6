"""What a power cut may have taken is never used: layers on a real disk that is cut off at a moment of our choice."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import anyio
import pytest

from pantala.images.reference import parse
from pantala.images.store import FileImageStore
from pantala.testing.clock import ManualClock
from pantala.testing.disk import CutDisk
from pantala.testing.poll import until
from pantala.testing.registry import NAME, Registry, layer, running_registry

pytestmark = [pytest.mark.anyio, pytest.mark.root]

ONE, TWO = parse(f"{NAME}/app:1"), parse(f"{NAME}/app:2")
CONTENT = "content " * 100_000


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncGenerator[Registry]:
    async with running_registry(tmp_path) as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> CutDisk:
    return CutDisk(tmp_path)


@pytest.fixture
def root(disk: CutDisk) -> Generator[Path]:
    with disk.mounted() as found:
        yield found


def content(layers: tuple[Path, ...]) -> list[str]:
    return [file.read_text() for layer in layers for file in sorted(layer.iterdir())]


def names_reach_the_disk(root: Path) -> None:
    """What any other program's fsync may cause at any time: ext4 writes names out, the content of files later."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def test_what_was_not_settled_is_pulled_again_after_a_power_cut(
    registry: Registry, disk: CutDisk, root: Path
) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(base=CONTENT)])
    store = FileImageStore(root, registry.client)
    assert content((await store.ensure(ONE, pull_token="")).layers) == [CONTENT]
    names_reach_the_disk(root)
    with disk.cut("cut.img").mounted() as left:
        assert content(tuple((left / "layers").iterdir())) == [""], "the cut is meant to take the content"
        after = FileImageStore(left, registry.client, boot="the next one")
        assert await after.find(digest) is None
        assert list((left / "layers").iterdir()) == []
        assert content((await after.ensure(ONE, pull_token="")).layers) == [CONTENT]


async def test_what_was_settled_outlives_a_power_cut(registry: Registry, disk: CutDisk, root: Path) -> None:
    base = layer(base=CONTENT)
    first = await registry.push(f"{NAME}/app:1", [base, layer(app="one")])
    second = await registry.push(f"{NAME}/app:2", [base, layer(app="two")])
    store = FileImageStore(root, registry.client)
    await store.ensure(ONE, pull_token="")
    await store.settle()
    await store.ensure(TWO, pull_token="")
    names_reach_the_disk(root)
    with disk.cut("cut.img").mounted() as left:
        after = FileImageStore(left, registry.client, boot="the next one")
        found = await after.find(first)
        assert found is not None, "it had been settled"
        assert content(found.layers) == [CONTENT, "one"]
        assert await after.find(second) is None, "its second layer had not"


async def test_a_new_agent_of_the_same_boot_keeps_all_and_settles_the_rest(
    registry: Registry, disk: CutDisk, root: Path
) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(base=CONTENT)])
    await FileImageStore(root, registry.client).ensure(ONE, pull_token="")
    again = FileImageStore(root, registry.client)
    assert await again.find(digest) is not None
    await again.settle()
    assert await FileImageStore(root, registry.client, boot="the next one").find(digest) is not None


async def test_a_lost_mark_costs_a_pull(registry: Registry, root: Path) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(base=CONTENT)])
    store = FileImageStore(root, registry.client)
    await store.ensure(ONE, pull_token="")
    await store.settle()
    for mark in (root / "marks").iterdir():
        mark.write_text("")
    assert await FileImageStore(root, registry.client).find(digest) is None


async def test_layers_from_before_there_were_marks_stay(registry: Registry, root: Path) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(base=CONTENT)])
    await FileImageStore(root, registry.client).ensure(ONE, pull_token="")
    for mark in (root / "marks").iterdir():
        mark.unlink()
    (root / "marks").rmdir()
    assert await FileImageStore(root, registry.client, boot="the next one").find(digest) is not None


async def test_settling_goes_on_in_the_background(registry: Registry, root: Path) -> None:
    digest = await registry.push(f"{NAME}/app:1", [layer(base=CONTENT), layer(app="one")])
    store, clock = FileImageStore(root, registry.client), ManualClock()

    async def settled() -> set[str]:
        await clock.advance(60)
        return {mark.read_text() for mark in (root / "marks").iterdir()}

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.run, clock)
        await store.ensure(ONE, pull_token="")
        await until(settled, lambda found: found == {"on disk"}, within_s=30)
        tasks.cancel_scope.cancel()
    assert await FileImageStore(root, registry.client, boot="the next one").find(digest) is not None
