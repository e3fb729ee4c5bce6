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
from pantala.agent.subset import Subset
from pantala.domain import validate
from pantala.domain.machine import State, Verb
from pantala.domain.process import process_group
from pantala.errors import Conflict, PantalaError
from pantala.journal import Desired, MachineRecord
from pantala.kit.clock import rfc3339_ms, unix_ms
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
        self._started = Subset(host, lambda record: record.state is State.STARTED)

    async def run(self, tasks: TaskGroup) -> None:
        while True:
            await self._host.context.clock.tick(self._pass_every_s)
            for choice in self.choose():
                if choice.machine not in self._sleeping:
                    self._sleeping.add(choice.machine)
                    tasks.start_soon(self._put_to_sleep, choice)

    def choose(self) -> list[autostop.Candidate]:
        """Which machines may sleep now. None while no proxy says what it serves."""
        groups: defaultdict[tuple[str, str], list[tuple[MachineTask, autostop.Candidate]]] = defaultdict(list)
        for task in self._started.tasks():
            if (candidate := self._awake(task)) is not None:
                groups[task.record.app.name, _group(task.record)].append((task, candidate))
        chosen: list[autostop.Candidate] = []
        for members in groups.values():
            chosen += autostop.plan([candidate for _, candidate in members], self._rules([task for task, _ in members]))
        return chosen

    def why_awake(self, machine_id: str) -> list[str]:
        """Sentences for people; none for a machine that is not started."""
        task = self._host.machines.get(machine_id)
        if task is None or task.record.state is not State.STARTED:
            return []
        record, now_ms = task.record, unix_ms(self._host.context.clock.now())
        if view.autostop(record.version.config) == "off":
            return [_why_off(record)]
        if task.record.queued():
            return ["something else was asked of it and comes first"]
        if task.keeper.health is not None and task.keeper.health.is_asking:
            return ["its new version has not answered a request yet"]
        one = self._awake(task)
        if one is None:
            return ["no proxy has said yet how busy it is"]
        details: dict[str, str] = {}
        if hold := holds.current(record, now_ms):
            details["it holds itself awake"] = f" until {rfc3339_ms(hold.until_ms)}: {hold.reason}"
        if lease := leases.current(record, now_ms):
            about = f": {lease.description}" if lease.description else ""
            details["somebody holds a lease of it"] = f", {lease.owner}, until {rfc3339_ms(lease.expires_at_ms)}{about}"
        peers = [
            other
            for other in self._host.machines.values()
            if (other.record.app.name, _group(other.record)) == (record.app.name, _group(record))
        ]
        awake = {peer.record.id: candidate for peer in peers if (candidate := self._awake(peer)) is not None}
        rules = self._rules([peer for peer in peers if peer.record.id in awake])
        return [why + details.get(why, "") for why in autostop.why_awake(one, list(awake.values()), rules)]

    def _awake(self, task: MachineTask) -> autostop.Candidate | None:
        record = task.record
        return (
            self._candidate(task) if record.state is State.STARTED and not (record.queued() or record.hidden) else None
        )

    def _rules(self, members: list[MachineTask]) -> autostop.Rules:
        floor = max(_floor(task.record, self._host.context.region) for task in members)
        return autostop.Rules(idle_window_ms=self._window_ms, floor=floor, mode=self._mode)

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


def _why_off(record: MachineRecord) -> str:
    services = record.version.config.services or []
    if not services:
        return "it has no services, so no request could wake it: it runs until it ends or is stopped"
    ports = [str(service.internal_port) for service in services if validate.autostop(service) == "off"]
    return f"auto_stop_machines is off for port {', '.join(ports)}"


def _group(record: MachineRecord) -> str:
    """Machines with the same services sleep by the same rules: those of one process group."""
    return process_group(record.version.config.metadata)


def _floor(record: MachineRecord, region: str) -> int:
    """`min_machines_running` holds in the primary region only; an app that names none has one region."""
    config = record.version.config
    if (config.env or {}).get("PRIMARY_REGION", region) != region:
        return 0
    return max((service.min_machines_running or 0 for service in config.services or []), default=0)
