"""What the agent knows of the containers of a running machine: asked of PID 1 again and again, told where it changes.

PID 1 starts, restarts and stops them by itself; nothing here decides. Lives beside `health` in the machine's task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from pantala.agent.context import Context
from pantala.domain import containers
from pantala.errors import PantalaError
from pantala.journal import MachineRecord
from pantala.kit.clock import rfc3339_ms, unix_ms
from pantala.wire.guest import ContainerState
from pantala.wire.machine import CheckStatus

Tell = Callable[[str, str], Awaitable[None]]


class Contained:
    """`changed` is awaited after each change, `tell` with each entry for the machine's history."""

    def __init__(
        self, context: Context, record: MachineRecord, *, changed: Callable[[], Awaitable[None]], tell: Tell
    ) -> None:
        self._context = context
        self._record = record
        self._changed = changed
        self._tell = tell
        self._since: dict[tuple[str, str], int] = {}
        self.states: list[ContainerState] = []

    @property
    def are_there(self) -> bool:
        return bool(self._record.version.config.containers)

    async def watch(self) -> None:
        """Until the machine ends; of a PID 1 that does not answer nothing is known."""
        while True:
            try:
                states = await self._context.driver.containers(self._record.id)
            except PantalaError:
                states = self.states
            if states != self.states:
                before, self.states = {one.name: one for one in self.states}, states
                for one in states:
                    self._note(before.get(one.name), one)
                    for word, sentence in containers.told(before.get(one.name), one):
                        await self._tell(word, sentence)
                await self._changed()
            await self._context.clock.sleep(self._context.pace.log_poll_s)

    def _note(self, before: ContainerState | None, now: ContainerState) -> None:
        was = {check.name: check.passing for check in before.checks} if before is not None else {}
        for check in now.checks:
            if was.get(check.name) != check.passing:
                self._since[now.name, check.name] = unix_ms(self._context.clock.now())

    def checks(self) -> list[CheckStatus]:
        """One for each health check, `container-NAME-CHECK`."""
        return [
            CheckStatus(
                name=check_name(one.name, check.name),
                status="passing" if check.passing else "critical",
                output=check.output,
                updated_at=rfc3339_ms(self._since.get((one.name, check.name), 0)),
            )
            for one in self.states
            for check in one.checks
        ]


def check_name(container: str, check: str) -> str:
    """Of a container's health check among the checks of its machine."""
    return f"container-{container}-{check}"
