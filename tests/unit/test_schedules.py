"""Scheduled machines: when they run, and what becomes of runs that nobody could start. Virtual time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import msgspec
import pytest

from pantala.agent.overdue import Overdue
from pantala.agent.schedules import Schedules
from pantala.domain import schedule
from pantala.errors import InvalidRequest
from pantala.testing.agent import FAST, IMAGE, RunningAgent, World, config
from pantala.testing.clock import ManualClock
from pantala.testing.driver import Behaviour
from pantala.wire import node
from pantala.wire.machine import Guest, Machine, ScheduleStatus

ID = "d8d9510a295118"
ANCHOR = datetime(2026, 1, 31, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "after", "wanted"),
    [
        ("hourly", "2026-01-31T10:30", "2026-01-31T11:30"),
        ("hourly", "2026-02-02T11:29", "2026-02-02T11:30"),
        ("daily", "2026-01-31T10:31", "2026-02-01T10:30"),
        ("weekly", "2026-02-07T10:30", "2026-02-14T10:30"),
        ("monthly", "2026-01-31T10:30", "2026-02-28T10:30"),
        ("monthly", "2026-02-28T10:30", "2026-03-31T10:30"),
        ("*/5 * * * *", "2026-01-01T00:00", "2026-01-01T00:05"),
        ("0 4 * * *", "2026-01-01T04:00", "2026-01-02T04:00"),
        ("0 4 * * * Europe/Berlin", "2026-01-01T00:00", "2026-01-01T03:00"),
        ("0 4 * * * Europe/Berlin", "2026-07-01T00:00", "2026-07-01T02:00"),
        # 2:30 does not exist on that day in Berlin: it runs when the clocks change.
        ("30 2 * * * Europe/Berlin", "2026-03-28T12:00", "2026-03-29T01:00"),
        ("0 9 * * MON-FRI America/New_York", "2026-01-02T15:00", "2026-01-05T14:00"),
    ],
)
def test_the_next_run(expression: str, after: str, wanted: str) -> None:
    at = datetime.fromisoformat(after).replace(tzinfo=UTC)
    found = schedule.next_run(expression, anchor=ANCHOR, after=at)
    assert found == datetime.fromisoformat(wanted).replace(tzinfo=UTC)
    assert schedule.last_run(expression, anchor=ANCHOR, until=found) == found
    assert schedule.last_run(expression, anchor=ANCHOR, until=found - timedelta(seconds=1)) <= at


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("yearly", "one of hourly, daily, weekly, monthly"),
        ("@daily", "five cron fields"),
        ("61 * * * *", "bad minute"),
        ("0 4 * * * Europe/Atlantis", "'Europe/Atlantis' is not a time zone"),
        ("0 0 0 * * *", "is not a time zone"),
        ("0 0 30 2 *", "day"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(wrong: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        schedule.check(wrong)
    assert caught.value.field == "config.schedule"


# -- on a host -----------------------------------------------------------------------------------------------------


class Scheduled:
    def __init__(self, agent: RunningAgent, world: World, clock: ManualClock) -> None:
        self.agent, self.world, self.clock = agent, world, clock
        self.schedules = Schedules(agent.host, catch_up_s=3600)

    async def pass_time(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        await self.schedules.look()

    async def ends(self, code: int = 0) -> None:
        self.world.driver.crash(ID, exit_code=code)
        await self.agent.until(lambda m: m.state == "stopped")

    async def shown(self) -> tuple[str, list[tuple[str, str]]]:
        found = (await self.agent.get()).schedule
        assert isinstance(found, ScheduleStatus)
        return found.next_run, [(run.due_at[11:16], run.outcome) for run in found.runs]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def world(tmp_path: Path, clock: ManualClock) -> World:
    return World(tmp_path, clock=clock, pace=msgspec.structs.replace(FAST, log_poll_s=1e9, restart_scale=0.0))


@asynccontextmanager
async def scheduled(world: World, clock: ManualClock, expression: str = "hourly") -> AsyncGenerator[Scheduled]:
    """A machine that ran once, at midnight."""
    async with world.agent() as agent:
        made = Scheduled(agent, world, clock)
        await agent.create(config=config(services=[], schedule=expression))
        await agent.wait("started")
        await made.schedules.look()
        await made.ends()
        yield made


def history(machine: Machine) -> list[tuple[str, str]]:
    return [
        (event.status, (event.request.reason if event.request else "") or "")
        for event in reversed(machine.events)
        if event.type == "schedule"
    ]


@pytest.mark.anyio
async def test_it_runs_when_it_is_due_and_shows_how_it_went(world: World, clock: ManualClock) -> None:
    async with scheduled(world, clock) as hourly:
        await hourly.pass_time(3599)
        assert world.driver.starts[ID] == 1
        await hourly.pass_time(1)
        machine = await hourly.agent.until(lambda m: m.state == "started")
        assert world.driver.starts[ID] == 2
        assert ("start", "starting", "flyd") in [(e.type, e.status, e.source) for e in machine.events]
        await hourly.ends()
        assert await hourly.shown() == ("2026-01-01T02:00:00.000Z", [("01:00", "ended")])
        assert [status for status, _ in history(await hourly.agent.get())] == ["planned", "started"]


@pytest.mark.anyio
async def test_a_run_that_fails_is_retried_by_the_default_policy(world: World, clock: ManualClock) -> None:
    async with scheduled(world, clock) as hourly:
        world.driver.behaviour = Behaviour(exits_with=3)
        await hourly.pass_time(3600)
        await hourly.agent.until(lambda m: world.driver.starts[ID] == 12 and m.state == "stopped")
        found = (await hourly.agent.get()).schedule
        assert found is not None
        assert "after 10 restarts" in found.runs[0].reason


@pytest.mark.anyio
async def test_a_machine_that_still_runs_is_left_alone(world: World, clock: ManualClock) -> None:
    async with scheduled(world, clock) as hourly:
        await hourly.pass_time(3600)
        await hourly.agent.until(lambda m: m.state == "started")
        await hourly.pass_time(3600)
        assert await hourly.shown() == ("2026-01-01T03:00:00.000Z", [("02:00", "skipped"), ("01:00", "started")])
        assert world.driver.starts[ID] == 2
        assert history(await hourly.agent.get())[-1][1].endswith("the machine was still running")
        await hourly.ends()
        _, runs = await hourly.shown()
        assert runs == [("02:00", "skipped"), ("01:00", "ended")]


@pytest.mark.anyio
@pytest.mark.parametrize(("away_s", "starts"), [(3600 * 5 + 600, 2), (3600, 2)])
async def test_after_a_time_without_an_agent_one_run_is_caught_up(
    world: World, clock: ManualClock, away_s: int, starts: int
) -> None:
    async with scheduled(world, clock):
        pass
    await clock.advance(away_s)
    async with world.agent() as agent:
        again = Scheduled(agent, world, clock)
        await again.schedules.look()
        await agent.until(lambda m: m.state == "started")
        await again.schedules.look()
        assert world.driver.starts[ID] == starts
        missed = [why for status, why in history(await agent.get()) if status == "missed"]
        assert bool(missed) == (away_s > 7200)


@pytest.mark.anyio
async def test_a_run_that_is_too_old_is_missed(world: World, clock: ManualClock) -> None:
    async with scheduled(world, clock, "daily"):
        pass
    await clock.advance(24 * 3600 + 3601)
    async with world.agent() as agent:
        again = Scheduled(agent, world, clock)
        await again.schedules.look()
        assert await again.shown() == ("2026-01-03T00:00:00.000Z", [("00:00", "missed")])
        assert world.driver.starts[ID] == 1


@pytest.mark.anyio
async def test_a_run_waits_for_room_and_is_missed_without(world: World, clock: ManualClock) -> None:
    async with scheduled(world, clock, "daily") as daily:
        for number in range(4):
            await daily.agent.create(
                f"{number:014x}", config=config(services=[], guest=Guest(memory_mb=2048)), request_id=f"c{number}"
            )
            await daily.agent.wait("started", machine_id=f"{number:014x}")
        await daily.pass_time(24 * 3600)
        await daily.pass_time(1)
        assert [status for status, _ in history(await daily.agent.get())] == ["planned", "waiting"]
        await daily.pass_time(3600)
        assert (await daily.shown())[1] == [("00:00", "missed")]
        assert world.driver.starts[ID] == 1


@pytest.mark.anyio
async def test_another_schedule_begins_anew_and_none_ends_it(world: World, clock: ManualClock) -> None:
    async with scheduled(world, clock) as hourly:
        for expression, following in (("0 4 * * *", "2026-01-01T04:00:00.000Z"), (None, None)):
            changed = config(services=[], schedule=expression)
            made = await hourly.agent.do(node.UpdateMachine, config=changed, image=IMAGE)
            await hourly.agent.wait("stopped", version=made.instance_id)
            await hourly.schedules.look()
            found = (await hourly.agent.get()).schedule
            assert (found.next_run if found else None) == following


@pytest.mark.anyio
async def test_a_state_that_lasts_too_long_says_so_once(world: World, clock: ManualClock) -> None:
    world.images.hold = anyio.Event()
    async with world.agent() as agent:
        await agent.create()
        await agent.until(lambda m: m.state == "starting")
        overdue = Overdue(agent.host)
        await clock.advance(299)
        await overdue.look()
        assert not [e for e in (await agent.get()).events if e.type == "stuck"]
        await clock.advance(2)
        await overdue.look()
        await overdue.look()
        (stuck,) = [e for e in (await agent.get()).events if e.type == "stuck"]
        assert stuck.status == "starting"
        assert stuck.request is not None
        reason = stuck.request.reason or ""
        assert "more than 5 min on node-1, asked for by user: pulling registry.test/hello" in reason
        assert "it fails when its image has not come within 600 s" in reason


@pytest.mark.anyio
async def test_a_held_machine_says_until_when_and_why(world: World, clock: ManualClock) -> None:
    async with world.agent() as agent:
        await agent.create()
        await agent.host.hold(ID, 60, "transcoding")
        shown = (await agent.get()).hold
        assert shown is not None
        assert (shown.until, shown.reason) == ("2026-01-01T00:01:00.000Z", "transcoding")
        with pytest.raises(InvalidRequest, match="not between 0 and 86400"):
            await agent.host.hold(ID, 90_000, "x")
        with pytest.raises(InvalidRequest, match="say why"):
            await agent.host.hold(ID, 60, "")
        await agent.host.hold(ID, 0, "")
        assert (await agent.get()).hold is None
