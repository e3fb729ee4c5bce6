"""The journal: what commit returned for is on disk, groups do not spoil each other, old things are forgotten."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from msgspec.structs import replace

from pantala.agent.events import event
from pantala.domain.machine import State
from pantala.errors import InternalError
from pantala.journal import Change, Desired, Journal, MachineRecord, Step, Version
from pantala.testing.agent import APP, IMAGE, config
from pantala.wire.node import SealedSecrets

pytestmark = pytest.mark.anyio


def record(machine_id: str = "m1", slot: int = 0) -> MachineRecord:
    return MachineRecord(
        id=machine_id,
        app=APP,
        name="n",
        region="iad",
        generation=1,
        version=Version(instance_id="01A", config=config(), image=IMAGE, created_at_ms=1),
        desired=Desired(goal="started"),
        state=State.CREATED,
        slot=slot,
        ip4="172.19.0.2",
        gateway4="172.19.0.1",
        ip6="fdaa::2",
        uid_base=1 << 20,
        created_at_ms=1,
        updated_at_ms=1,
    )


async def test_a_change_is_there_after_a_restart(tmp_path: Path) -> None:
    made = record()
    async with Journal.open(tmp_path / "j.db") as journal:
        await journal.commit(
            Change(
                machine=made,
                events=(event("launch", "created", "user", 1), event("start", "starting", "user", 2)),
                begin=Step("m1", "start"),
                outcome=("r1", b"answer"),
                secrets=SealedSecrets(app="hello", version=2, sealed="S"),
                at_ms=5,
            )
        )
    async with Journal.open(tmp_path / "j.db") as journal:
        assert await journal.live() == [made]
        assert [e.type for e in await journal.events("m1")] == ["start", "launch"]
        assert await journal.open_steps() == [Step("m1", "start")]
        assert await journal.outcome("r1") == b"answer"
        assert await journal.secrets("hello") == SealedSecrets(app="hello", version=2, sealed="S")
        await journal.commit(Change(end=(Step("m1", "start"),)))
        assert await journal.open_steps() == []


async def test_a_change_in_haste_is_written_when_it_returns_and_the_next_one_waits_for_the_disk(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db") as journal:
        for in_haste in (True, False):
            told: list[str] = []
            journal._connection.set_trace_callback(told.append)  # pyright: ignore[reportPrivateUsage]
            await journal.commit(Change(machine=record(), begin=Step("m1", f"s{in_haste}"), in_haste=in_haste, at_ms=1))
            journal._connection.set_trace_callback(None)  # pyright: ignore[reportPrivateUsage]
            modes = [line for line in told[: told.index("COMMIT")] if "synchronous" in line]
            assert modes == (["PRAGMA synchronous = NORMAL"] if in_haste else [])
            assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # pyright: ignore[reportPrivateUsage]
            with sqlite3.connect(tmp_path / "j.db") as other:
                assert other.execute("SELECT count(*) FROM machines").fetchone() == (1,)
            other.close()


async def test_concurrent_changes_share_commits(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db") as journal:
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(journal.commit, Change(machine=record(f"m{number}", number)))
        assert len(await journal.live()) == 100
        assert journal.commits < 20


async def test_a_refused_change_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    refused: list[str] = []

    async def commit(journal: Journal, machine: MachineRecord) -> None:
        try:
            await journal.commit(Change(machine=machine, outcome=(f"r-{machine.id}", b"x")))
        except InternalError:
            refused.append(machine.id)

    async with Journal.open(tmp_path / "j.db") as journal:
        async with anyio.create_task_group() as tasks:
            for machine in (record("a", 1), record("b", 1), record("c", 2)):
                tasks.start_soon(commit, journal, machine)
        assert len(refused) == 1, "two machines cannot have one slot"
        assert {machine.id for machine in await journal.live()} == {"a", "b", "c"} - set(refused)
        assert await journal.outcome(f"r-{refused[0]}") is None


@pytest.mark.parametrize("steps", range(6))
async def test_a_writer_that_is_cancelled_takes_nobody_elses_change_along(tmp_path: Path, steps: int) -> None:
    """It may be writing for others: what `commit` returned for is on disk."""
    async with Journal.open(tmp_path / "j.db") as journal:
        given_up = anyio.CancelScope()

        async def first() -> None:
            with given_up:
                await journal.commit(Change(outcome=("first", b"1")))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            tasks.start_soon(journal.commit, Change(outcome=("second", b"2")))
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            given_up.cancel()
        assert await journal.outcome("second") == b"2"


async def test_the_last_versions_are_kept_and_forgotten_with_their_machine(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db") as journal:
        for number in range(60):
            version = replace(record().version, instance_id=f"{number:02}", pull_token="sealed")
            await journal.commit(Change(machine=record(), versions=(version,)))
        kept = await journal.versions("m1")
        assert [version.instance_id for version in kept] == [f"{number:02}" for number in range(59, 9, -1)]
        assert not any(version.pull_token for version in kept)
        await journal.commit(Change(machine=replace(record(), state=State.DESTROYED, destroyed_at_ms=5)))
        await journal.forget(outcomes_before_ms=0, destroyed_before_ms=10)
        assert await journal.versions("m1") == []


async def test_older_secrets_do_not_replace_newer_ones(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db") as journal:
        for version in (3, 2):
            await journal.commit(Change(secrets=SealedSecrets(app="hello", version=version, sealed=str(version))))
        kept = await journal.secrets("hello")
        assert kept is not None
        assert kept.version == 3


async def test_secrets_that_were_read_are_read_anew_when_newer_ones_came(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db") as journal:
        assert await journal.secrets("hello") is None
        for version in (1, 2):
            await journal.commit(Change(secrets=SealedSecrets(app="hello", version=version, sealed=f"{version}")))
            for _ in range(2):
                found = await journal.secrets("hello")
                assert found is not None
                assert found.version == version


async def test_destroyed_machines_are_readable_for_a_time_and_give_their_slot_back(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db") as journal:
        gone = replace(record("old"), state=State.DESTROYED, destroyed_at_ms=100)
        await journal.commit(Change(machine=gone, events=(event("destroy", "destroyed", "user", 1),)))
        await journal.commit(Change(machine=record("new"), outcome=("r", b"x"), at_ms=100))
        assert await journal.find("old") == gone
        assert [machine.id for machine in await journal.live()] == ["new"]
        await journal.forget(outcomes_before_ms=50, destroyed_before_ms=50)
        assert await journal.outcome("r") is not None
        await journal.forget(outcomes_before_ms=101, destroyed_before_ms=101)
        assert await journal.find("old") is None
        assert await journal.events("old") == []
        assert await journal.outcome("r") is None


async def test_a_newer_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "j.db") as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(InternalError, match="newer Pantala"):
        async with Journal.open(tmp_path / "j.db"):
            pass


async def test_nobody_else_can_read_the_file(tmp_path: Path) -> None:
    async with Journal.open(tmp_path / "j.db"):
        assert (tmp_path / "j.db").stat().st_mode & 0o077 == 0
