"""Leases on every machine of a deploy, so that two deploys cannot mix; refreshed until it ends, however it ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import anyio

from pantala.client.api import ApiClient
from pantala.errors import LeaseHeld, NotFound, PantalaError

TTL_S = 13
REFRESH_EVERY_S = (TTL_S - 1) / 3
POLL_EVERY_S = 0.5


class Leases:
    """Nonces by machine id; an empty nonce for machines that are not leased (new ones)."""

    def __init__(self, client: ApiClient, app: str) -> None:
        self._client = client
        self._app = app
        self._nonces: dict[str, str] = {}
        self.lost: str | None = None

    def nonce(self, machine_id: str) -> str:
        return self._nonces.get(machine_id, "")

    def forget(self, machine_id: str) -> None:
        """The machine is gone, its lease with it."""
        self._nonces.pop(machine_id, None)

    async def acquire(self, machine_id: str, *, description: str, wait_s: float) -> None:
        """Waits at most `wait_s` for a lease that someone else holds. Raises LeaseHeld."""
        deadline = anyio.current_time() + wait_s
        while True:
            try:
                lease = await self._client.acquire_lease(self._app, machine_id, ttl_s=TTL_S, description=description)
            except LeaseHeld:
                if anyio.current_time() > deadline:
                    raise
                await anyio.sleep(POLL_EVERY_S)
            else:
                self._nonces[machine_id] = lease.nonce
                return

    async def refresh_for_ever(self) -> None:
        while True:
            await anyio.sleep(REFRESH_EVERY_S)
            await self.refresh()

    async def refresh(self) -> None:
        for machine_id, nonce in list(self._nonces.items()):
            try:
                await self._client.refresh_lease(self._app, machine_id, ttl_s=TTL_S, nonce=nonce)
            except NotFound:
                self.forget(machine_id)
            except PantalaError as error:
                self.lost = f"the lease on {machine_id} could not be refreshed: {error.message}"

    async def release_all(self) -> None:
        for machine_id, nonce in list(self._nonces.items()):
            try:
                await self._client.release_lease(self._app, machine_id, nonce=nonce)
            except PantalaError:  # it lapses by itself within TTL_S
                continue


@asynccontextmanager
async def hold(
    client: ApiClient, app: str, machine_ids: Sequence[str], *, description: str, wait_s: float
) -> AsyncGenerator[Leases]:
    leases = Leases(client, app)
    async with anyio.create_task_group() as tasks:
        try:
            for machine_id in machine_ids:
                await leases.acquire(machine_id, description=description, wait_s=wait_s)
            tasks.start_soon(leases.refresh_for_ever)
            yield leases
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await leases.release_all()
