"""Stops and continues every process of a machine at once: the freezer of control groups, version 1 or 2.

What is frozen keeps its memory, its sockets and its open files, and gets no CPU. The state is the kernel's, so it
outlives whoever asked for it, and is read back rather than remembered.
"""

from __future__ import annotations

from pathlib import Path

from pantala.errors import DriverError
from pantala.kit.clock import Clock

FROZEN_WITHIN_S = 5.0
FIRST_LOOK_S = 0.0005
LAST_LOOK_S = 0.02
AGAIN_S = 0.1


class Freezer:
    """`folder`: the machine's group of the freezer (version 1), or its only one (version 2, `unified`)."""

    def __init__(self, folder: Path, *, unified: bool, clock: Clock) -> None:
        self._clock = clock
        self._unified = unified
        self._control = folder / ("cgroup.freeze" if unified else "freezer.state")
        self._events = folder / "cgroup.events"

    def is_asked(self) -> bool:
        """Frozen, or on its way there. False where there is no group."""
        try:
            said = self._control.read_text().strip()
        except OSError:
            return False
        return said == "1" if self._unified else said in ("FROZEN", "FREEZING")

    async def freeze(self) -> None:
        """Returns once nothing of it runs. What cannot be frozen in time goes on, and DriverError says so."""
        self._write("1" if self._unified else "FROZEN")
        deadline = self._clock.monotonic() + FROZEN_WITHIN_S
        again_at = self._clock.monotonic() + AGAIN_S
        pause_s = FIRST_LOOK_S
        while not self._is_frozen():
            if self._clock.monotonic() > deadline:
                self.thaw()
                raise DriverError(f"the processes could not be frozen within {FROZEN_WITHIN_S:g} s")
            if self._clock.monotonic() > again_at:
                # One of them waits for PID 1, which is frozen and cannot answer (it reads /proc/meminfo): let both.
                self.thaw()
                await self._clock.sleep(LAST_LOOK_S)
                self._write("1" if self._unified else "FROZEN")
                again_at, pause_s = self._clock.monotonic() + AGAIN_S, FIRST_LOOK_S
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, LAST_LOOK_S)
            if not self._unified:
                self._write("FROZEN")  # version 1 looks at tasks that were not ready only when it is asked again

    def thaw(self) -> None:
        self._write("0" if self._unified else "THAWED")

    def _is_frozen(self) -> bool:
        try:
            if self._unified:
                return "frozen 1" in self._events.read_text().splitlines()
            return self._control.read_text().strip() == "FROZEN"
        except OSError as error:
            raise DriverError(f"the freezer of the machine cannot be read: {error.strerror}") from error

    def _write(self, value: str) -> None:
        try:
            self._control.write_text(value)
        except OSError as error:
            raise DriverError(f"the freezer of the machine took no {value}: {error.strerror}") from error
