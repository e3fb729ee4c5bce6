"""What the steps of one machine share: its record, its body, its proxy, and the waits that a new request ends.

The story is in `agent/machine.py`; the steps are in `starting.py`, `stopping.py`, `suspending.py`, `updating.py` and
`destroying.py`.
Each is a function of a `Work` and returns the seconds after which the task looks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from pantala.agent.body import Body
from pantala.agent.context import Callers, Context, ProxyLink
from pantala.agent.keeper import Keeper
from pantala.agent.watching import Watch
from pantala.domain.machine import Verb
from pantala.domain.runtime import UnpackedImage
from pantala.journal import MachineRecord, Version

AT_ONCE = 0.0
WHEN_NUDGED = math.inf


class Work:
    def __init__(
        self,
        context: Context,
        keeper: Keeper,
        proxy: ProxyLink,
        tasks: TaskGroup,
        *,
        callers: Callers,
        nudge: Callable[[], None],
    ) -> None:
        self.context = context
        self.keeper = keeper
        self.proxy = proxy
        self.body = Body(context, keeper.record.id)
        self.watch = Watch(context, keeper, self.body, tasks, callers=callers, nudge=nudge)
        self.images: dict[str, UnpackedImage] = {}
        self.prepare_again_at = 0.0
        self._interruptible: anyio.CancelScope | None = None
        self._start_interrupts = False

    @property
    def record(self) -> MachineRecord:
        return self.keeper.record

    def accepted(self, verb: Verb) -> None:
        """A request was admitted: whatever waits for an image, a drain, an end or its turn looks again."""
        if self._interruptible is not None and (verb is not Verb.START or self._start_interrupts):
            self._interruptible.cancel()

    @contextmanager
    def interruptibly(self, *, by_start: bool = False) -> Generator[anyio.CancelScope]:
        """A wait that a newly admitted request ends, so that the machine looks again; a start only where it says so."""
        with anyio.CancelScope() as scope:
            self._interruptible, self._start_interrupts = scope, by_start
            try:
                yield scope
            finally:
                self._interruptible = None

    async def pull(self, version: Version | None = None) -> UnpackedImage | None:
        """The image; None when another request interrupted the wait for it."""
        version = version or self.record.version
        known = self.images.get(version.instance_id)
        if known is None:
            with self.interruptibly():
                known = await self.body.pull(version)
                self.images = {version.instance_id: known}
        return known

    @property
    def is_prepared(self) -> bool:
        record = self.record
        return record.runtime == "prepared" and record.runtime_instance == record.version.instance_id

    async def prepare(self, image: UnpackedImage) -> None:
        """Written in haste: what a power cut undoes here it undoes together with what was made."""
        await self.keeper.change(lambda r: replace(r, network=True, runtime="none"), begin="prepare", in_haste=True)
        await self.body.prepare(self.record, image)
        await self.keeper.change(
            lambda r: replace(r, runtime="prepared", runtime_instance=r.version.instance_id),
            end=("prepare",),
            in_haste=True,
        )

    async def drain(self) -> None:
        with self.interruptibly():
            await self.proxy.drain(self.record.id, deadline_s=self.context.pace.drain_s)

    async def say(self, message: str, level: str) -> None:
        await self.context.logs.platform_line(
            app=self.record.app.name, machine_id=self.record.id, message=message, level=level
        )
