"""An app with machines of version 1 behind the real API and a fake agent, and deploys of version 2."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from pantala.client.api import ApiClient
from pantala.deploys.executor import Executor, Settings
from pantala.errors import PantalaError
from pantala.planner.deploy import Plan, ReleaseCommand, Wanted, plan_deploy
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.platform import TestPlatform
from pantala.wire import node
from pantala.wire.api import CreateReleaseRequest, LaunchMachineRequest, Release
from pantala.wire.machine import Machine, MachineConfig, Port, Service

METADATA = {"fly_platform_version": "v2", "fly_process_group": "app"}


def config(version: int, *, group: str = "app", served: bool = False, http: bool = False) -> MachineConfig:
    ports = [Port(port=443, handlers=["tls", "http"])] if http else None
    services = [Service(protocol="tcp", internal_port=8080, ports=ports)] if served or http else None
    return MachineConfig(
        image=f"registry.pantala.test/web:v{version}",
        metadata=METADATA | {"fly_process_group": group, "fly_release_version": str(version)},
        services=services,
    )


class Deploying:
    """The app `web` with machines of version 1, and deploys of version 2."""

    def __init__(self, client: ApiClient, platform: TestPlatform) -> None:
        self.client = client
        self.platform = platform
        self.agent: FakeAgent = platform.agents["node-1"]
        self.said: list[str] = []

    async def machines(self, count: int, *, asleep: int = 0) -> list[Machine]:
        made = [await self.client.create_machine("web", LaunchMachineRequest(config=config(1))) for _ in range(count)]
        for machine in made[:asleep]:
            await self.client.stop("web", machine.id)
        self.agent.calls.clear()
        return await self.client.machines("web")

    def plan(
        self,
        machines: list[Machine],
        *,
        strategy: str = "rolling",
        served: bool = False,
        http: bool = False,
        group: str = "app",
        command: ReleaseCommand | None = None,
    ) -> Plan:
        return plan_deploy(
            machines=machines,
            wanted=[Wanted(group=group, config=config(2, group=group, served=served, http=http))],
            primary_region="iad",
            strategy=strategy,
            max_unavailable=0.34,
            high_availability=True,
            release_command=command,
        )

    async def run(self, plan: Plan, machines: list[Machine], **settings: float | bool) -> Release:
        release = await self.client.create_release("web", CreateReleaseRequest(image="registry.pantala.test/web:v2"))
        known = Settings(**({"smoke_checks": False, "wait_timeout_s": 10, "lease_wait_s": 0.5} | settings))  # pyright: ignore[reportArgumentType]
        await Executor(self.client, "web", release, settings=known, say=self.said.append).run(plan, machines)
        return await self.release()

    async def failing(self, plan: Plan, machines: list[Machine], **settings: float | bool) -> PantalaError:
        with pytest.raises(PantalaError) as raised:
            await self.run(plan, machines, **settings)
        return raised.value

    async def release(self) -> Release:
        return (await self.client.releases("web"))[0]

    def versions(self) -> dict[str, str]:
        """Images of the machines that are not destroyed."""
        return {
            machine.id: (machine.config.image or "").rpartition(":")[2]
            for machine in self.agent.machines.values()
            if machine.state.value != "destroyed"
        }

    def mutations(self) -> list[tuple[str, str]]:
        """What the host was asked to do, in order."""
        names: dict[type, str] = {
            node.CreateMachine: "create",
            node.UpdateMachine: "update",
            node.StartMachine: "start",
            node.StopMachine: "stop",
            node.DestroyMachine: "destroy",
        }
        return [
            (names[type(call)], getattr(call, "machine_id", "")) for call in self.agent.calls if type(call) in names
        ]


def looks_at(deploying: Deploying, machine_id: str) -> Callable[[], Awaitable[int]]:
    async def look() -> int:
        return sum(
            isinstance(call, node.GetMachine) and call.machine_id == machine_id for call in deploying.agent.calls
        )

    return look


def tries_of(deploying: Deploying, machine_id: str) -> Callable[[], Awaitable[int]]:
    async def look() -> int:
        return sum(
            isinstance(call, node.AcquireLease) and call.machine_id == machine_id for call in deploying.agent.calls
        )

    return look
