"""An agent on fakes: what outlives it (driver, network, images, journal file) and a way to start one after another."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec

from pantala.agent.api import NodeApi
from pantala.agent.context import Context, DrainResult, Pace
from pantala.agent.host import Capacity, Host
from pantala.agent.policies import Policies
from pantala.agent.queries import Queries
from pantala.journal import Journal
from pantala.kit.clock import Clock, SystemClock
from pantala.kit.sealing import Opener
from pantala.testing.driver import ScriptedDriver
from pantala.testing.host import FakeImages, FakeNetwork, FakeProber, RowList
from pantala.testing.poll import until
from pantala.wire import node
from pantala.wire.api import LogLine
from pantala.wire.machine import ImageRef, Machine, MachineConfig, Service

FAST = Pace(
    restart_scale=0.001,
    secrets_s=0.1,
    secrets_poll_s=0.01,
    stop_extra_s=1.0,
    drain_s=0.05,
    hand_over_s=0.01,
    retry_prepare_s=0.05,
    explain_after_s=0.05,
    explain_nothing_s=0.1,
    ready_first_s=0.001,
    ready_most_s=0.01,
    log_poll_s=0.02,
    log_poll_most_s=0.02,
    answer_after_wake_s=0.01,
    answer_again_s=0.01,
    held_s=0.1,
)
APP = node.AppRef(id="app_1", name="hello", org="personal", network=0x18)
IMAGE = ImageRef(registry="registry.test", repository="hello", tag="deployment-1", digest="sha256:" + "1" * 64)


def service(**changes: Any) -> Service:
    return msgspec.structs.replace(
        Service(protocol="tcp", internal_port=8080, autostart=True, autostop="stop"), **changes
    )


def config(**changes: Any) -> MachineConfig:
    return msgspec.structs.replace(
        MachineConfig(image="registry.test/hello:deployment-1", services=[service()]), **changes
    )


class NodeFailure(Exception):
    """The error of a node call, as its caller would see it."""

    def __init__(self, error: node.NodeError) -> None:
        super().__init__(error.message)
        self.error = error


class FakeProxy:
    """Drains at once unless told otherwise."""

    def __init__(self) -> None:
        self.result: DrainResult = "drained"
        self.drains: list[tuple[str, int | None]] = []

    async def drain(self, machine_id: str, *, deadline_s: float, load_seq: int | None = None) -> DrainResult:
        del deadline_s
        self.drains.append((machine_id, load_seq))
        return self.result

    async def undrain(self, machine_id: str) -> None:
        del machine_id


class LogList:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    async def platform_line(self, *, app: str, machine_id: str, message: str, level: str = "info") -> None:
        del app, level
        self.lines.append((machine_id, message))

    async def collect(self, *, app: str, machine_id: str, instance_id: str) -> int:
        del app, machine_id, instance_id
        return 0

    async def forget(self, machine_id: str, instance_id: str) -> None:
        del machine_id, instance_id


class World:
    """What is there whether an agent runs or not."""

    def __init__(self, folder: Path, *, pace: Pace = FAST, clock: Clock | None = None) -> None:
        self.folder = folder
        self.driver = ScriptedDriver()
        self.network = FakeNetwork(self.driver)
        self.images = FakeImages()
        self.prober = FakeProber(self.driver, self.network)
        self.rows = RowList()
        self.logs = LogList()
        self.proxy = FakeProxy()
        self.policies = Policies(retry_s=0.01)
        self.clock = clock or SystemClock()
        self.pace = pace
        self.node_key = Opener(b"k" * 32)
        self.capacity = Capacity(cpus=8, memory_mib=8192)
        self.elsewhere: dict[str, int] = {}
        """Generations that other hosts show of machines."""

    @asynccontextmanager
    async def agent(self, wrap: Callable[[Journal], Any] = lambda journal: journal) -> AsyncGenerator[RunningAgent]:
        """One agent on this world, adopted and serving; cancelled without ceremony at the end, as if it were killed."""
        async with Journal.open(self.folder / "journal.db") as own:
            context = Context(
                node="node-1",
                region="iad",
                journal=wrap(own),
                driver=self.driver,
                network=self.network,
                images=self.images,
                prober=self.prober,
                rows=self.rows,
                logs=self.logs,
                clock=self.clock,
                node_key=self.node_key,
                pace=self.pace,
                policies=self.policies,
                preparing=anyio.Semaphore(1),
            )
            async with anyio.create_task_group() as tasks:
                host = Host(
                    context,
                    tasks,
                    self.proxy,
                    capacity=self.capacity,
                    pool4="10.213.0.0/16",
                    newest=lambda machine_id: self.elsewhere.get(machine_id, 0),
                )
                await host.adopt()
                tasks.start_soon(self.policies.run, self.network, self.clock, lambda: list(host.machines.values()))

                async def no_lines(request: node.ReadLogs) -> list[LogLine]:
                    del request
                    return []

                async def no_trace(request: str) -> node.HostTrace:
                    del request
                    return node.HostTrace(since_ms=0, records=[])

                queries = Queries(host, read_logs=no_lines, trace=no_trace, state_dir=self.folder, zone="z1")
                yield RunningAgent(host, NodeApi(host, queries))
                tasks.cancel_scope.cancel()


class RunningAgent:
    """Node calls, typed; a refusal is raised as NodeFailure."""

    _ids = itertools.count(1)

    def __init__(self, host: Host, api: NodeApi) -> None:
        self.host = host
        self.api = api

    async def call(self, request: Any) -> Any:
        payload = msgspec.json.encode(request)
        reply = msgspec.json.decode(await self.api.call("pantala.node.node-1.call", payload), type=node.NodeReply)
        if reply.error is not None:
            raise NodeFailure(reply.error)
        wanted = node.RESULTS[type(request)]
        return msgspec.convert(reply.result, wanted) if wanted is not None else None

    def request_id(self) -> str:
        return f"r{next(self._ids)}"

    async def create(self, machine_id: str = "d8d9510a295118", **changes: Any) -> Machine:
        wanted: dict[str, Any] = {
            "request_id": self.request_id(),
            "machine_id": machine_id,
            "generation": 1,
            "app": APP,
            "name": "quiet-moon-1",
            "region": "iad",
            "config": config(),
            "image": IMAGE,
        } | changes
        return await self.call(node.CreateMachine(**wanted))

    async def get(self, machine_id: str = "d8d9510a295118") -> Machine:
        return await self.call(node.GetMachine(machine_id=machine_id))

    async def do(self, kind: Any, machine_id: str = "d8d9510a295118", **fields: Any) -> Any:
        return await self.call(kind(request_id=self.request_id(), machine_id=machine_id, **fields))

    async def wait(
        self, *states: str, machine_id: str = "d8d9510a295118", timeout_s: float = 10.0, **more: Any
    ) -> None:
        await self.call(node.WaitMachine(machine_id=machine_id, states=list(states), timeout_s=timeout_s, **more))

    async def until(
        self, wanted: Callable[[Machine], bool], machine_id: str = "d8d9510a295118", within_s: float = 10.0
    ) -> Machine:
        return await until(lambda: self.get(machine_id), wanted, within_s=within_s, every_s=0.005)
