"""The database: migrations make the schema that statements use, guards hold, writers are one at a time."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path

import anyio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from pantala.errors import NameTaken
from pantala.store import accounts, apps, hosts, ledger, machines, secrets
from pantala.store.database import Database, open_database
from pantala.store.records import NodeRecord
from pantala.store.schema import metadata

pytestmark = pytest.mark.anyio

NODE = NodeRecord(
    id="n",
    region="iad",
    zone="",
    status="active",
    address="10.0.0.1",
    edge=True,
    sealing_key="",
    verify_key="",
    bus_key="",
    epoch=1,
    certificate_until_ms=0,
    created_at_ms=1,
)


@pytest.fixture
def db(tmp_path: Path) -> Generator[Database]:
    made = open_database(tmp_path / "control.db")
    yield made
    made.close()


async def test_migrations_make_exactly_the_schema(db: Database) -> None:
    def compare(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    assert await db.read(compare) == []


async def test_an_acknowledged_write_is_on_disk(db: Database, tmp_path: Path) -> None:
    assert await db.read(lambda c: c.execute(text("PRAGMA journal_mode")).scalar()) == "wal"
    assert await db.read(lambda c: c.execute(text("PRAGMA synchronous")).scalar()) == 2
    assert (tmp_path / "control.db").stat().st_mode & 0o777 == 0o600


async def test_a_failed_transaction_changes_nothing(db: Database) -> None:
    def half(connection: Connection) -> None:
        accounts.insert_org(connection, slug="acme", name="acme", now_ms=1)
        raise NameTaken("no")

    with pytest.raises(NameTaken):
        await db.write(half)
    assert await db.read(lambda c: accounts.find_org(c, "acme")) is None


async def test_concurrent_writers_all_succeed(db: Database) -> None:
    def insert(slug: str, connection: Connection) -> int:
        return accounts.insert_org(connection, slug=slug, name="x", now_ms=1)

    async with anyio.create_task_group() as tasks:
        for n in range(20):
            tasks.start_soon(db.write, partial(insert, f"o{n}"))
    assert len(await db.read(lambda c: accounts.list_orgs(c, list(range(100))))) == 20


async def org_and_app(db: Database) -> int:
    org = await db.write(lambda c: accounts.insert_org(c, slug="acme", name="acme", now_ms=1))
    network = await db.write(lambda c: apps.ensure_network(c, org_id=org, name="default"))
    await db.write(lambda c: apps.insert_app(c, name="web", org_id=org, network_id=network, role="", now_ms=1))
    app = await db.read(lambda c: apps.find_app(c, "web"))
    assert app is not None
    return app.id


async def test_a_placement_moves_only_from_the_phase_that_was_judged(db: Database) -> None:
    app = await org_and_app(db)
    await db.write(lambda c: hosts.insert_node(c, NODE))
    await db.write(
        lambda c: machines.insert_placement(
            c, machine_id="m", app_id=app, name="x", node="n", region="iad", boot="b", config="{}", now_ms=1
        )
    )
    move = machines.move_phase
    assert await db.write(lambda c: move(c, "m", before=("placing",), after="placed", now_ms=2))
    assert not await db.write(lambda c: move(c, "m", before=("placing",), after="destroyed", now_ms=3))
    assert await db.read(lambda c: machines.list_unfinished(c, boot="b")) == []


async def test_a_creation_of_an_earlier_life_is_unfinished_and_one_of_this_life_is_not(db: Database) -> None:
    app = await org_and_app(db)
    await db.write(lambda c: hosts.insert_node(c, NODE))
    await db.write(
        lambda c: machines.insert_placement(
            c, machine_id="m", app_id=app, name="x", node="n", region="iad", boot="old", config="{}", now_ms=1
        )
    )
    assert await db.read(lambda c: machines.list_unfinished(c, boot="old")) == []
    found = await db.read(lambda c: machines.list_unfinished(c, boot="new"))
    assert [placement.machine_id for placement in found] == ["m"]


async def test_a_host_token_is_used_once(db: Database) -> None:
    await db.write(lambda c: hosts.insert_node(c, NODE))
    await db.write(
        lambda c: hosts.insert_token(c, token_id="t", digest="d", region="", made_by="ada", now_ms=1, expires_at_ms=2)
    )
    assert await db.write(lambda c: hosts.use_token(c, "t", node="n", now_ms=1))
    assert not await db.write(lambda c: hosts.use_token(c, "t", node="n", now_ms=1))


async def test_a_delivery_that_ends_late_does_not_go_back(db: Database) -> None:
    app = await org_and_app(db)
    await db.write(lambda c: hosts.insert_node(c, NODE))
    for version in (3, 2):
        await db.write(lambda c, v=version: secrets.record_delivery(c, app_id=app, node="n", version=v))
    kept = await db.read(lambda c: c.execute(text("SELECT version FROM secret_deliveries")).scalar())
    assert kept == 3


async def test_each_taking_of_the_publisher_s_lease_is_a_new_epoch(db: Database) -> None:
    async def acquire(holder: str, now_ms: int) -> int | None:
        return await db.write(
            lambda c: ledger.acquire_lease(c, name="catalogue", holder=holder, ttl_ms=100, now_ms=now_ms)
        )

    async def renew(holder: str, epoch: int, now_ms: int) -> bool:
        return await db.write(
            lambda c: ledger.renew_lease(c, name="catalogue", holder=holder, epoch=epoch, ttl_ms=100, now_ms=now_ms)
        )

    assert await acquire("a", 0) == 1
    assert await acquire("b", 50) is None
    assert await renew("a", 1, 50)
    assert await acquire("a", 60) == 2
    assert not await renew("a", 1, 70)
    assert await acquire("b", 200) == 3
    assert not await renew("a", 2, 210)
