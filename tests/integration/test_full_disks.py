"""A full disk under images, journal and databases: one clear refusal, nothing half done, and all is well with room."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
from sqlalchemy import text

from pantala.errors import DiskFull
from pantala.images.reference import parse
from pantala.images.store import FileImageStore
from pantala.journal import Change, Journal
from pantala.kit.sqlite import SqliteFile
from pantala.store.database import open_database
from pantala.testing.disk import fill, small_folder
from pantala.testing.registry import NAME, Registry, layer, running_registry

pytestmark = [pytest.mark.anyio, pytest.mark.root]

BIG, SMALL = parse(f"{NAME}/app:big"), parse(f"{NAME}/app:small")
DISK_MIB = 24


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncGenerator[Registry]:
    async with running_registry(tmp_path) as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    with small_folder(tmp_path / "disk", size_mib=DISK_MIB) as found:
        yield found


def noise(mib: int) -> str:
    """Content that no compression makes smaller."""
    return os.urandom(mib << 19).hex()


@pytest.mark.parametrize("content", ["noise", "zeros"])
async def test_an_image_without_room_is_refused_and_leaves_nothing(
    registry: Registry, disk: Path, content: str
) -> None:
    """Noise fills the disk while it is fetched or unpacked, zeros are small until they are unpacked."""
    big = noise(16) if content == "noise" else "0" * (64 << 20)
    await registry.push(f"{NAME}/app:big", [layer(base="base"), layer(big=big)])
    small = await registry.push(f"{NAME}/app:small", [layer(app="small")])
    store = FileImageStore(disk, registry.client)
    with pytest.raises(
        DiskFull, match=rf"no room for the image {NAME}/app:big: the disk of .* is full, .* MiB are free"
    ):
        await store.ensure(BIG, pull_token="")
    for folder in ("layers", "images", "tmp", "marks"):
        assert list((disk / folder).iterdir()) == [], folder
    found = await store.ensure(SMALL, pull_token="")
    assert found.digest == small
    assert (found.layers[0] / "app").read_text() == "small"


async def test_images_leave_room_for_databases_on_the_same_disk(registry: Registry, disk: Path) -> None:
    await registry.push(f"{NAME}/app:big", [layer(big="0" * (64 << 20))])
    store = FileImageStore(disk, registry.client)
    filler = fill(disk, leave_mib=1)
    with pytest.raises(DiskFull, match="must stay free"):
        await store.ensure(BIG, pull_token="")
    filler.unlink()


async def test_a_journal_without_room_refuses_and_keeps_what_it_has(disk: Path) -> None:
    async with Journal.open(disk / "journal.db") as journal:
        await journal.commit(Change(outcome=("before", b"kept"), at_ms=1))
        filler = fill(disk)
        with pytest.raises(DiskFull, match=r"no room for the journal of this host: the disk of .* is full, 0 bytes"):
            await journal.commit(Change(outcome=("meanwhile", bytes(1 << 20)), at_ms=2))
        assert await journal.outcome("before") == b"kept"
        assert await journal.outcome("meanwhile") is None
        filler.unlink()
        await journal.commit(Change(outcome=("after", b"taken"), at_ms=3))
    filler = fill(disk)
    with pytest.raises(DiskFull, match="no room for the journal"):
        async with Journal.open(disk / "journal.db"):
            pass
    filler.unlink()
    async with Journal.open(disk / "journal.db") as journal:
        assert [await journal.outcome(name) for name in ("before", "meanwhile", "after")] == [b"kept", None, b"taken"]


async def test_the_platforms_database_without_room_refuses_and_keeps_what_it_has(disk: Path) -> None:
    database = open_database(disk / "pantala.db")
    try:
        await database.write(lambda c: c.execute(text("CREATE TABLE tried (what BLOB)")))
        filler = fill(disk)
        with pytest.raises(DiskFull, match="no room for the platform's database; nothing was changed") as refused:
            await database.write(lambda c: c.execute(text("INSERT INTO tried VALUES (zeroblob(1048576))")))
        assert refused.value.http_code == 507
        assert await database.read(lambda c: c.execute(text("SELECT count(*) FROM tried")).scalar()) == 0
        filler.unlink()
        await database.write(lambda c: c.execute(text("INSERT INTO tried VALUES (zeroblob(1048576))")))
    finally:
        database.close()


async def test_a_spared_database_without_room_says_so(disk: Path) -> None:
    async with SqliteFile.open(disk / "logs.db", schema="CREATE TABLE IF NOT EXISTS t (b)", name="the logs") as file:
        filler = fill(disk)
        with pytest.raises(DiskFull, match="no room for the logs"):
            await file.run(lambda c: c.execute("INSERT INTO t VALUES (zeroblob(1048576))"))
        filler.unlink()
        await file.run(lambda c: c.execute("INSERT INTO t VALUES (zeroblob(1048576))"))
