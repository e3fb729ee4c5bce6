"""The lease of the single publisher of control's rows.

Each taking gives a new epoch, so rows of an earlier life lose.
"""

from __future__ import annotations

import structlog
from sqlalchemy import Connection

from pantala.control.context import Context
from pantala.errors import InternalError, TransientError
from pantala.store import ledger

log = structlog.get_logger()

NAME = "catalogue"
TTL_MS = 30_000
RENEW_S = TTL_MS / 3000
RETRY_S = 1.0
ATTEMPTS_MAX = 60


class PublisherLease:
    """`holder` names this server (not this life of it), so that it takes its own lease back at once after a crash."""

    def __init__(self, context: Context, holder: str) -> None:
        self._context = context
        self._holder = holder
        self.epoch = 0

    async def acquire(self) -> int:
        """The epoch to publish with. Waits while another server holds the lease, at most twice its life."""
        for _ in range(ATTEMPTS_MAX):
            epoch = await self._context.db.write(self._acquire)
            if epoch is not None:
                self.epoch = epoch
                return epoch
            log.info("another server publishes; waiting", holder=self._holder)
            await self._context.clock.sleep(RETRY_S)
        raise InternalError("another server keeps the publisher's lease")

    async def keep(self) -> None:
        """Renews for ever; raises when the lease was lost, which ends the process: it must not publish any more."""
        wait_s = RENEW_S
        while True:
            await self._context.clock.sleep(wait_s)
            try:
                kept = await self._context.db.write(self._renew)
            except TransientError as error:
                # Whoever takes the lease meanwhile gets a newer epoch: our rows lose, and the next renewal says so.
                log.warning("the publisher's lease was not renewed", error=error.message)
                wait_s = RETRY_S
                continue
            wait_s = RENEW_S
            if not kept:
                raise InternalError("the publisher's lease was taken by another server")

    def _acquire(self, connection: Connection) -> int | None:
        return ledger.acquire_lease(
            connection, name=NAME, holder=self._holder, ttl_ms=TTL_MS, now_ms=self._context.now_ms()
        )

    def _renew(self, connection: Connection) -> bool:
        return ledger.renew_lease(
            connection,
            name=NAME,
            holder=self._holder,
            epoch=self.epoch,
            ttl_ms=TTL_MS,
            now_ms=self._context.now_ms(),
        )
