"""The sweep: brings to an end what a request left unfinished, because a node did not answer or the process died.

One cycle: destroy machines whose placement is on its way out, deliver secrets that nodes lack, forget old idempotency
keys and entries of the audit log. Every step may run twice.
"""

from __future__ import annotations

import structlog
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.control.secrets import Secrets
from pantala.errors import NotFound, PantalaError
from pantala.store import hosts, ledger, machines
from pantala.wire.node import DestroyMachine

log = structlog.get_logger()

EVERY_S = 5.0
IDEMPOTENCY_KEPT_MS = 24 * 3600 * 1000
CALL_TIMEOUT_S = 5.0
AUDIT_FORGOTTEN_MAX = 1000


class Sweep:
    def __init__(self, context: Context, secrets: Secrets) -> None:
        self._context = context
        self._secrets = secrets

    async def run(self) -> None:
        while True:
            try:
                await self.cycle()
            except PantalaError:
                log.exception("sweep cycle failed")
            await self._context.clock.sleep(EVERY_S)

    async def cycle(self) -> None:
        destroyed, left = await self._destroy()
        undelivered = await self._secrets.deliver()
        forgotten = await self._context.db.write(self._forget)
        if destroyed or left or undelivered or forgotten:
            log.info(
                "swept", destroyed=destroyed, destroys_left=left, secrets_left=undelivered, keys_forgotten=forgotten
            )

    def _forget(self, connection: Connection) -> int:
        """How many idempotency keys."""
        now_ms = self._context.now_ms()
        audit_from_ms = now_ms - int(self._context.settings.audit_kept_s * 1000)
        ledger.forget_audit(connection, before_ms=audit_from_ms, most=AUDIT_FORGOTTEN_MAX)
        return ledger.forget_old_keys(connection, before_ms=now_ms - IDEMPOTENCY_KEPT_MS)

    async def _destroy(self) -> tuple[int, int]:
        """How many were destroyed, and how many could not be because their node did not answer or refused."""
        boot = self._context.boot
        unfinished, members = await self._context.db.read(
            lambda c: (machines.list_unfinished(c, boot=boot), {node.id for node in hosts.list_nodes(c)})
        )
        done = 0
        silent: set[str] = set()
        for placement in unfinished:
            if placement.node in silent:
                continue
            if placement.node not in members:  # what it had went with it
                await self._bury(placement.machine_id)
                done += 1
                continue
            call = DestroyMachine(
                request_id=f"sweep-{placement.machine_id}-{self._context.now_ms()}",
                machine_id=placement.machine_id,
                force=True,
            )
            try:
                await self._context.nodes.call(placement.node, call, timeout_s=CALL_TIMEOUT_S)
            except NotFound:
                pass  # it never got there, or is gone already
            except PantalaError as error:
                log.warning("machine not swept", machine=placement.machine_id, node=placement.node, error=error.message)
                if error.http_code >= 500:
                    silent.add(placement.node)
                continue
            await self._bury(placement.machine_id)
            done += 1
        return done, len(unfinished) - done

    async def _bury(self, machine_id: str) -> None:
        now_ms = self._context.now_ms()
        await self._context.db.write(
            lambda c: machines.move_phase(
                c, machine_id, before=("placing", "destroying"), after="destroyed", now_ms=now_ms
            )
        )
