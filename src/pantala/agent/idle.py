"""Puts idle machines to sleep: once a second the pure planner is asked about each app of this host."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import structlog
from anyio.abc import TaskGroup
from msgspec.structs import replace

from pantala.agent import holds, leases, view
from pantala.agent.feed import Feed
from pantala.agent.host import Host
from pantala.agent.machine import MachineTask
from pantala.domain.machine import State, Verb
from pantala.domain.process import process_group
from pantala.errors import Conflict, PantalaError
from pantala.journal import Desired, MachineRecord
from pantala.kit.clock import unix_ms
from pantala.planner import autostop

log = structlog.get_logger()

PASS_EVERY_S = 1.0
DRAIN_S = 10.0


class Idle:
    def __init__(
        self,
        host: Host,
        feed: Feed,
        *,
        idle_window_s: float,
        mode: Literal["all_idle", "one_per_pass"] = "all_idle",
        pass_every_s: float = PASS_EVERY_S,
    ) -> None:
        self._host = host
        self._feed = feed
        self._window_ms = int(idle_window_s * 1000)
        self._mode: Literal["all_idle", "one_per_pass"] = mode
        self._pass_every_s = pass_every_s
        self._sleeping: set[str] = set()

    async def run(self, tasks: TaskGroup) -> None:
        while True:
            await self._host.context.clock.sleep(self._pass_every_s)
            for choice in self.choose():
                if choice.machine not in self._sleeping:
                    self._sleeping.add(choice.machine)
                    tasks.start_soon(self._put_to_sleep, choice)

    def choose(self) -> list[autostop.Candidate]:
        """Which machines may sleep now. None while no proxy says what it serves."""
        groups: defaultdict[tuple[str, str], list[tuple[MachineTask, autostop.Candidate]]] = defaultdict(list)
        for task in self._host.machines.values():
            record = task.keeper.record
            if record.state is State.STARTED and not record.queued() and not record.hidden:
                candidate = self._candidate(task)
                if candidate is not None:
                    groups[record.app.name, _group(record)].append((task, candidate))
        chosen: list[autostop.Candidate] = []
        for members in groups.values():
            floor = max(_floor(task.record, self._host.context.region) for task, _ in members)
            rules = autostop.Rules(idle_window_ms=self._window_ms, floor=floor, mode=self._mode)
            chosen += autostop.plan([candidate for _, candidate in members], rules)
        return chosen

    def _candidate(self, task: MachineTask) -> autostop.Candidate | None:
        record = task.record
        load = self._feed.load(record.id)
        if load is None or (task.keeper.health and task.keeper.health.is_asking):
            return None
        now_ms = unix_ms(self._host.context.clock.now())
        since_start_ms = now_ms - max(record.started_at_ms, task.keeper.health.ready_at_ms if task.keeper.health else 0)
        setting = view.autostop(record.version.config)
        services = record.version.config.services or []
        soft = [s.concurrency.soft_limit for s in services if s.concurrency and s.concurrency.soft_limit]
        return autostop.Candidate(
            machine=record.id,
            in_flight=load.in_flight,
            seq=load.seq,
            idle_ms=0 if load.in_flight else max(min(load.idle_ms, since_start_ms), 0),
            autostop=setting,
            soft_limit=min(soft, default=0),
            leased=leases.current(record, now_ms) is not None,
            held=holds.current(record, now_ms) is not None,
        )

    async def _put_to_sleep(self, choice: autostop.Candidate) -> None:
        """Drain, then stop or suspend, unless a request, a lease or another version came in between."""
        try:
            task = self._host.machines.get(choice.machine)
            if task is None:
                return
            instance_id = task.record.version.instance_id
            result = await self._feed.drain(choice.machine, deadline_s=DRAIN_S, load_seq=choice.seq)
            if result != "drained":
                if result == "deadline":
                    await self._feed.undrain(choice.machine)
                return
            try:
                sleeps = choice.autostop == "suspend"
                wanted = Desired(goal="suspended" if sleeps else "stopped", source="proxy")
                await task.keeper.admit(
                    Verb.SUSPEND if sleeps else Verb.STOP,
                    lambda record: replace(record, desired=wanted),
                    source="proxy",
                    guard=lambda record: self._still(record, instance_id),
                )
            except PantalaError as error:
                await self._feed.undrain(choice.machine)
                log.debug("idle machine stays up", machine=choice.machine, why=error.message)
        finally:
            self._sleeping.discard(choice.machine)

    def _still(self, record: MachineRecord, instance_id: str) -> None:
        if record.version.instance_id != instance_id or record.state is not State.STARTED or record.queued():
            raise Conflict("something else was asked of the machine")
        now_ms = unix_ms(self._host.context.clock.now())
        if leases.current(record, now_ms) is not None:
            raise Conflict("the machine is leased")
        if holds.current(record, now_ms) is not None:
            raise Conflict("the machine holds itself awake")


def _group(record: MachineRecord) -> str:
    """Machines with the same services sleep by the same rules: those of one process group."""
    return process_group(record.version.config.metadata)


def _floor(record: MachineRecord, region: str) -> int:
    """`min_machines_running` holds in the primary region only; an app that names none has one region."""
    config = record.version.config
    if (config.env or {}).get("PRIMARY_REGION", region) != region:
        return 0
    return max((service.min_machines_running or 0 for service in config.services or []), default=0)
