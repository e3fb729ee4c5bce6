"""What a fake driver runs machines in: state that outlives the driver, and scripts of how apps behave.

Nothing here runs by itself: a machine's end is a moment that is compared with the clock, so a world needs no task, and
killing its driver changes nothing, as with real machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import anyio
import msgspec

from pantala.drivers.protocol import LogRecord, Phase, PrepareSpec, Runtime
from pantala.kit.clock import Clock, SystemClock, unix_ms
from pantala.wire.guest import ExitRecord, Start

SIGKILL = 9
Operation = Literal["prepare", "start", "stop", "signal", "suspend", "resume", "inspect", "destroy"]


class FakeApp(msgspec.Struct, frozen=True, kw_only=True):
    """How an app behaves. `ends_after_s` None: it runs until it is stopped.

    `refusal`: it cannot be started, with this sentence and `exit_code`. `ignored`: signals that do not end it.
    `oom`: the kernel ends it for memory. `writes`: a line that it adds to its root; `tells_written`: it says those that
    are there.
    """

    exit_code: int = 0
    ends_after_s: float | None = None
    ends_by_signal: int = 0
    start_delay_s: float = 0.0
    stop_delay_s: float = 0.0
    ignored: tuple[int, ...] = ()
    stop_exit_code: int | None = None
    refusal: str = ""
    oom: bool = False
    output: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    writes: str = ""
    tells_written: bool = False


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """An end that will come at a moment of the monotonic clock."""

    at: float
    exit_code: int
    signal: int = 0
    oom: bool = False


class FakeRoot:
    """What a machine wrote to its root filesystem."""

    def __init__(self, instance_id: str, *, is_kept: bool) -> None:
        self.instance_id = instance_id
        self.is_kept = is_kept
        self.lines: list[str] = []


class FakeMachine:
    """One machine as the kernel would know it."""

    def __init__(self, spec: PrepareSpec, pid: int) -> None:
        self.spec = spec
        self.pid = pid
        self.is_prepared = False
        self.start: Start | None = None
        self.app: FakeApp | None = None
        self.started_at_ms = 0
        self.due: Due | None = None
        self.frozen_at: float | None = None
        self.end: ExitRecord | None = None
        self.has_ended = False
        self.oom_killed = False
        self.stop_requested = False
        self.cpu_used_us = 0
        self.cpu_throttled_us = 0
        self.cpu_quota_us: int | None = None
        self.memory_limit_mib = 0
        self.cpus: frozenset[int] = frozenset()
        self.records: list[LogRecord] = []
        self.watchers: set[anyio.Event] = set()

    def changed(self) -> None:
        for watcher in self.watchers:
            watcher.set()


class FakeWorld:
    """Machines by id, and the scripts: `apps` by command, `app_of` by machine, `failures` by operation.

    `failures` holds errors that the next calls of an operation raise, oldest first. `on_step` is called by name within
    operations; raising from it is a crash of the caller at that point.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.machines: dict[str, FakeMachine] = {}
        self.roots: dict[str, FakeRoot] = {}
        self.cpus = frozenset({0})
        self.apps: dict[tuple[str, ...], FakeApp] = {}
        self.app_of: dict[str, FakeApp] = {}
        self.failures: dict[Operation, list[Exception]] = {}
        self.prepare_delay_s = 0.0
        self.on_step: Callable[[str, str], None] = lambda step, machine_id: None
        self.started: list[str] = []
        self._pids = itertools.count(1000)

    def next_pid(self) -> int:
        return next(self._pids)

    def fail_next(self, operation: Operation, error: Exception) -> None:
        self.failures.setdefault(operation, []).append(error)

    def check(self, operation: Operation) -> None:
        if waiting := self.failures.get(operation):
            raise waiting.pop(0)

    def app_for(self, machine_id: str, start: Start) -> FakeApp:
        return self.app_of.get(machine_id) or self.apps.get(tuple(start.argv)) or FakeApp()

    def ensure_root(self, spec: PrepareSpec) -> None:
        """The one that was kept, if the machine goes on with it."""
        root = self.roots.get(spec.machine_id)
        fits = spec.root_kept == "always" or (root is not None and root.instance_id == spec.instance_id)
        if root is None or not root.is_kept or spec.root_kept == "never" or not fits:
            root = self.roots[spec.machine_id] = FakeRoot(spec.instance_id, is_kept=False)
        root.instance_id, root.is_kept = spec.instance_id, spec.root_kept != "never"

    # --- scripted events -------------------------------------------------------------------------------------------

    def exit(self, machine_id: str, *, exit_code: int = 0, signal: int = 0, oom: bool = False) -> None:
        """The app ends now, by itself."""
        code = 128 + signal if signal else exit_code
        self.finish(self.machines[machine_id], Due(at=0.0, exit_code=code, signal=signal, oom=oom))

    def vanish(self, machine_id: str) -> None:
        """PID 1 is gone without a record, as after a crash of the host."""
        machine = self.machines[machine_id]
        machine.has_ended = True
        machine.changed()

    def say(self, machine_id: str, text: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
        machine = self.machines[machine_id]
        last = machine.records[-1].position if machine.records else 0
        now_ns = unix_ms(self.clock.now()) * 1_000_000
        position = last + len(text.encode()) + 13
        machine.records.append(LogRecord(timestamp_ns=now_ns, stream=stream, text=text, position=position))

    # --- what the driver asks --------------------------------------------------------------------------------------

    def schedule(self, machine: FakeMachine, due: Due) -> None:
        """The machine ends then, unless it ends before."""
        if machine.due is None or due.at < machine.due.at:
            machine.due = due
        machine.changed()

    def freeze(self, machine: FakeMachine) -> None:
        """Its time stands still."""
        if machine.frozen_at is None:
            machine.frozen_at = self.clock.monotonic()
            machine.changed()

    def thaw(self, machine: FakeMachine) -> None:
        if machine.frozen_at is not None:
            slept_s, machine.frozen_at = self.clock.monotonic() - machine.frozen_at, None
            if machine.due is not None:
                machine.due = msgspec.structs.replace(machine.due, at=machine.due.at + slept_s)
            machine.changed()

    def finish(self, machine: FakeMachine, due: Due, *, reason: str = "") -> None:
        now_ms = unix_ms(self.clock.now())
        machine.oom_killed = machine.oom_killed or due.oom
        machine.end = ExitRecord(
            exit_code=due.exit_code,
            signal=due.signal,
            requested_stop=machine.stop_requested,
            started_at_ms=machine.started_at_ms or now_ms,
            exited_at_ms=now_ms,
            reason=reason,
        )
        machine.has_ended = True
        machine.changed()

    def runtime(self, machine: FakeMachine) -> Runtime | None:
        is_frozen = machine.frozen_at is not None
        due = machine.due
        if not machine.has_ended and not is_frozen and due is not None and self.clock.monotonic() >= due.at:
            self.finish(machine, due)
        if not machine.is_prepared:
            return None
        alive: Phase = "prepared" if machine.start is None else "suspended" if is_frozen else "running"
        return Runtime(
            machine_id=machine.spec.machine_id,
            instance_id=machine.spec.instance_id,
            phase="exited" if machine.has_ended else alive,
            pid=machine.pid,
            exit=machine.end if machine.has_ended else None,
            oom_killed=machine.oom_killed,
        )
