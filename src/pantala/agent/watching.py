"""Follows a running app: its end, health, words and calls. One watch per machine, begun anew with each start."""

from __future__ import annotations

from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from pantala.agent.body import Body
from pantala.agent.context import Callers, Context
from pantala.agent.events import event
from pantala.agent.health import Health
from pantala.agent.keeper import Keeper
from pantala.domain.machine import State
from pantala.drivers.protocol import Runtime

LOG_POLL_GROWTH = 1.25
"""From 0.2 s to 1 s in the four seconds after its last line."""


class Watch:
    """`is_gone` is set once PID 1 is; `gone` is then what the driver knows of its end."""

    def __init__(
        self,
        context: Context,
        keeper: Keeper,
        body: Body,
        tasks: TaskGroup,
        *,
        callers: Callers,
        nudge: Callable[[], None],
    ) -> None:
        self._context = context
        self._keeper = keeper
        self._body = body
        self._tasks = tasks
        self._callers = callers
        self._nudge = nudge
        self._scope: anyio.CancelScope | None = None
        self._awake = anyio.CancelScope()
        self.gone: Runtime | None = None
        self.is_gone = anyio.Event()

    @property
    def is_on(self) -> bool:
        return self._scope is not None

    def begin(self, *, asleep: bool = False) -> None:
        """Of an app that is `asleep` only the end: it answers nobody and says nothing."""
        self.end()
        self.is_gone = anyio.Event()
        self._scope = anyio.CancelScope()
        self._awake = anyio.CancelScope()
        health = None
        if not asleep:
            health = self._keeper.health = Health(
                self._context,
                self._keeper.record,
                changed=self._health_changed,
                became_ready=self._tell_ready,
                answered=self._tell_answered,
                explain=self._explain_address,
                tell=self._tell_contained,
            )
        self._tasks.start_soon(self._follow, self._scope, self._awake, self.is_gone, health)

    def doze(self) -> None:
        """It was put to sleep."""
        self._awake.cancel()
        self._keeper.health = None

    def end(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None
        self._keeper.health = None

    async def _follow(
        self, scope: anyio.CancelScope, awake: anyio.CancelScope, is_gone: anyio.Event, health: Health | None
    ) -> None:
        with scope:
            async with anyio.create_task_group() as tasks:
                if health is not None:
                    tasks.start_soon(self._attend, awake, health)
                self.gone = await self._body.gone()
                is_gone.set()
                self._nudge()
                tasks.cancel_scope.cancel()

    async def _attend(self, awake: anyio.CancelScope, health: Health) -> None:
        with awake:
            async with anyio.create_task_group() as tasks:
                health.start(tasks)
                tasks.start_soon(self._listen)
                record = self._keeper.record
                await self._callers.serve(record, self._context.driver.calls(record.id))

    async def _listen(self) -> None:
        """Often while it speaks, more and more rarely while it does not."""
        record, pace = self._keeper.record, self._context.pace
        pause_s = pace.log_poll_s
        while True:
            await self._context.clock.sleep(pause_s)  # first: a request may wait for what else begins now
            lines = await self._context.logs.collect(
                app=record.app.name, machine_id=record.id, instance_id=record.version.instance_id
            )
            pause_s = pace.log_poll_s if lines else min(pause_s * LOG_POLL_GROWTH, pace.log_poll_most_s)

    async def _health_changed(self) -> None:
        """What was resumed and is not journaled as started yet has no news for its row, and a request that waits."""
        if self._keeper.record.state is State.STARTED:
            await self._keeper.publish()
        self._keeper.announce()

    async def _tell_ready(self, at_ms: int) -> None:
        """For those who watch a deploy; no request waits for this write."""
        await self._keeper.change(lambda r: r, events=(event("ready", "started", "flyd", at_ms),))

    async def _tell_answered(self, sentence: str) -> None:
        at_ms, instance_id = self._keeper.now_ms(), self._keeper.record.version.instance_id
        await self._keeper.change(
            lambda r: replace(r, answered_instance=instance_id),
            events=(event("answer", "answered", "flyd", at_ms, reason=sentence),),
        )

    async def _tell_contained(self, word: str, sentence: str) -> None:
        at_ms = self._keeper.now_ms()
        await self._keeper.change(lambda r: r, events=(event(word, "started", "flyd", at_ms, reason=sentence),))

    async def _explain_address(self, sentence: str) -> None:
        at_ms, record = self._keeper.now_ms(), self._keeper.record
        await self._keeper.change(
            lambda r: replace(r, reason=sentence) if r.state is State.STARTED else r,
            events=(event("listen", "wrong_address", "flyd", at_ms, reason=sentence),),
        )
        await self._context.logs.platform_line(
            app=record.app.name, machine_id=record.id, message=sentence, level="warning"
        )
