"""Carries out scale plans over the public API: first the new machines, each watched until it is well, then the old ones
go. All or nothing: what was made is destroyed again when one of it does not come up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
import msgspec

from pantala.client.api import ApiClient
from pantala.deploys.health import HealthWatch
from pantala.errors import InvalidRequest, NotFound, PantalaError
from pantala.kit.tasks import first_error, to_the_end
from pantala.planner.scale import ScalePlan
from pantala.wire.api import LaunchMachineRequest
from pantala.wire.machine import Machine, MachineConfig

T = TypeVar("T")

AT_ONCE = 8
WELL_WITHIN_S = 300.0


class Scaling:
    def __init__(self, client: ApiClient, app: str, *, say: Callable[[str], None]) -> None:
        self._client = client
        self._app = app
        self._say = say
        self._health = HealthWatch(client, app)
        self._made: list[str] = []

    async def run(self, plans: Sequence[ScalePlan]) -> None:
        """Raises what the API refuses, or Unhealthy; then nothing has changed."""
        done = False
        try:
            await self._each([(_clone(plan), region) for plan in plans for region in plan.add], self._create)
            done = True
        finally:
            if not done:
                with anyio.CancelScope(shield=True), anyio.move_on_after(30):
                    await self._take_back()
        await self._each([machine_id for plan in plans for machine_id in plan.remove], self._destroy)

    async def _create(self, wanted: tuple[MachineConfig, str]) -> None:
        config, region = wanted
        request = LaunchMachineRequest(config=config, region=region)
        # waited for whatever happens to its siblings, so that it can be taken back
        machine = await to_the_end(self._client.create_machine(self._app, request))
        self._made.append(machine.id)
        self._say(f"  created {machine.id} in {machine.region}")
        await self._until_well(machine)

    async def _until_well(self, machine: Machine) -> None:
        await self._health.until_well(machine.id, version=machine.instance_id, since_ms=0, timeout_s=WELL_WITHIN_S)

    async def _destroy(self, machine_id: str) -> None:
        try:
            await self._client.destroy(self._app, machine_id, force=True)
        except NotFound:
            return  # it went by itself
        self._say(f"  destroyed {machine_id}")

    async def _take_back(self) -> None:
        for machine_id in self._made:
            try:
                await self._destroy(machine_id)
            except PantalaError as error:
                self._say(f"  {machine_id} could not be destroyed again: {error.message}")

    async def _each(self, items: Sequence[T], act: Callable[[T], Awaitable[None]]) -> None:
        limiter = anyio.CapacityLimiter(AT_ONCE)

        async def one(item: T) -> None:
            async with limiter:
                await act(item)

        async with first_error(), anyio.create_task_group() as tasks:
            for item in items:
                tasks.start_soon(one, item)


def _clone(plan: ScalePlan) -> MachineConfig:
    if plan.model.config is None:
        raise InvalidRequest("the machine to clone is not in reach", field="count")
    return msgspec.structs.replace(plan.model.config, mounts=None)
