"""A journal at which the agent dies: at a chosen commit, before or after it reached the disk."""

from __future__ import annotations

from typing import Any

import anyio

from pantala.journal import Change, Journal


class KillingJournal:
    """Passes everything to `journal`; the commit number `at` never returns and sets `dead`."""

    def __init__(self, journal: Journal, *, at: int, after_write: bool) -> None:
        self.dead = anyio.Event()
        self.count = 0
        self._journal = journal
        self._at = at
        self._after_write = after_write

    def stop_at(self, count: int) -> None:
        """The commit with that number is the last one that begins."""
        self._at = count

    async def commit(self, change: Change) -> None:
        self.count += 1
        if self.dead.is_set():
            await anyio.sleep_forever()
        if self.count == self._at:
            if self._after_write:
                await self._journal.commit(change)
            self.dead.set()
            await anyio.sleep_forever()
        await self._journal.commit(change)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)
