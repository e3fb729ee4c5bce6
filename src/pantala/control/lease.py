"""The lease of the single publisher of control's rows. Each taking gives a new epoch, so rows of an earlier life lose."""

from __future__ import annotations

import structlog

from pantala.control.context import Context
from pantala.errors import InternalError
from pantala.store import ledger

log = structlog.get_logger()

NAME = "catalogue"
TTL_S = 30.0
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
            now_ms = self._context.now_ms()
            epoch = await self._context.db.write(
                lambda c: ledger.acquire_lease(
                    c, name=NAME, holder=self._holder, ttl_ms=int(TTL_S * 1000), now_ms=now_ms
                )
            )
            if epoch is not None:
                self.epoch = epoch
                return epoch
            log.info("another server publishes; waiting", holder=self._holder)
            await self._context.clock.sleep(RETRY_S)
        raise InternalError("another server keeps the publisher's lease")

    async def keep(self) -> None:
        """Renews for ever; raises when the lease was lost, which ends the process: it must not publish any more."""
        while True:
            await self._context.clock.sleep(TTL_S / 3)
            now_ms = self._context.now_ms()
            if not await self._context.db.write(
                lambda c: ledger.renew_lease(
                    c, name=NAME, holder=self._holder, epoch=self.epoch, ttl_ms=int(TTL_S * 1000), now_ms=now_ms
                )
            ):
                raise InternalError("the publisher's lease was taken by another server")
