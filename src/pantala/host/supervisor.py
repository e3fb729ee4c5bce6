"""Keeps the processes of a host, or of all hosts of a box, running: `python -m pantala.host.supervisor STATE_DIR`.

Started by `pantala up` (and ended by `down`) or by `pantala host run`. Starts the processes of `processes.json` side by
side, each when those it names are ready and a few at a time, restarts what ends (with back-off), and writes what it
sees to `status.json`. Children have sessions of their own and no pipe to the supervisor, so its death ends nothing:
`down` finds them by pid and start time. Those that `held.json` names are kept down until it names them no more.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import anyio
import msgspec
import structlog
from anyio.abc import Process as Child
from anyio.abc import TaskGroup

from pantala.errors import Conflict
from pantala.host.replacing import Outcome, Wanted, listener_pid, take_wanted, want
from pantala.telemetry import configure

log = structlog.get_logger()

READY_WITHIN_S = 60.0
STOP_WITHIN_S = 10.0
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
STAYS_UP_S = 2.0
"""Ready for so long, a process is taken for sound: it is restarted at once however often it was killed before."""
LOG_BYTES_MAX = 64 * 1024 * 1024
LOOK_AT_FILES_EVERY_S = 1.0
LOOK_AT_HELD_EVERY_S = 0.1
PROBE_WITHIN_S = 0.5
REPLACED_WITHIN_S = 90.0


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One program. `ready`: `tcp:ADDRESS:PORT`, `unix:PATH`, `file:PATH`, or empty (ready when started). `after`:
    names of those that are ready before it starts, and that end after it. `reload_on`: files; it gets SIGHUP when one
    changes. `replace`: the socket over which a new process (with `--replace`) takes the place of a running one; empty
    where none can."""

    name: str
    command: list[str]
    netns: str
    env: dict[str, str]
    log: str
    ready: str = ""
    after: list[str] = []
    reload_on: list[str] = []
    replace: str = ""


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`started`: the kernel's start time of the pid, so that a reused pid is not mistaken for it. `beside`: the same
    two of processes that were replaced and serve what they began, and of one that is to replace it. `outcome`: of the
    last replacement."""

    name: str
    state: Literal["waiting", "starting", "ready", "restarting", "stopped"]
    pid: int = 0
    started: int = 0
    restarts: int = 0
    beside: list[tuple[int, int]] = []
    outcome: Outcome = Outcome()


class Status(msgspec.Struct, frozen=True, kw_only=True):
    supervisor: int
    processes: list[ProcessStatus]
    trouble: str = ""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """Processes that somebody wants down, as `pantala box stop` leaves them; with `kill` they end by SIGKILL."""

    names: list[str] = []
    kill: bool = False


class Supervisor:
    def __init__(self, state_dir: Path, processes: list[Process]) -> None:
        self._path = state_dir / "status.json"
        self._state_dir = state_dir
        self._held: frozenset[str] = frozenset()
        self._released = anyio.Event()
        self._processes = processes
        self._status = {p.name: ProcessStatus(name=p.name, state="waiting") for p in processes}
        self._ready = {p.name: anyio.Event() for p in processes}
        self._ended = {p.name: anyio.Event() for p in processes}
        self._starting = {p.name: anyio.Lock() for p in processes}
        self._side_by_side = anyio.Semaphore(max(4, 2 * (os.cpu_count() or 1)))
        self._running: dict[str, Child] = {}
        self._beside: dict[str, list[Child]] = {p.name: [] for p in processes}
        self._adopted = {p.name: anyio.Event() for p in processes}
        self._trouble = ""
        self._stopping = False

    async def run(self) -> None:
        """Until SIGTERM or SIGINT; the processes end first."""
        self._write()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._until_told_to_stop, tasks)
            tasks.start_soon(self._trim_logs)
            tasks.start_soon(self._reload)
            tasks.start_soon(self._follow_held)
            tasks.start_soon(self._follow_wanted, tasks)
            for process in self._processes:
                tasks.start_soon(self._bring_up, process, tasks)

    async def _bring_up(self, process: Process, tasks: TaskGroup) -> None:
        for name in process.after:
            await self._ready[name].wait()
        async with self._side_by_side:
            tasks.start_soon(self._keep, process)
            with anyio.move_on_after(READY_WITHIN_S) as scope:
                await self._ready[process.name].wait()
        if scope.cancelled_caught:
            self._trouble = f"{process.name} is not ready after {READY_WITHIN_S:g} s; see {process.log}"
            log.error("process not ready", name=process.name)
            self._write()

    async def _keep(self, process: Process) -> None:
        """One process for as long as the host or the box runs."""
        restarts = 0
        while True:
            async with self._starting[process.name]:
                if self._stopping:
                    break
                with anyio.CancelScope(shield=True):  # whatever was started is known
                    self._running[process.name] = await start(process)
            child = self._running[process.name]
            self._set(process.name, state="starting", pid=child.pid, started=start_time(child.pid), restarts=restarts)
            up = _Up()
            async with anyio.create_task_group() as watch:
                watch.start_soon(self._mark_ready, process, up)
                child = await self._until_ended(process.name)
                watch.cancel_scope.cancel()
            if self._stopping:
                break
            if process.name in self._held:
                await self._until_released(process)
                restarts = 0
                continue
            log.warning("process ended", name=process.name, code=child.returncode)
            restarts = 1 if up.stayed(anyio.current_time()) else restarts + 1
            self._set(process.name, state="restarting", restarts=restarts)
            await anyio.sleep(BACKOFF_S[min(restarts, len(BACKOFF_S)) - 1])

    async def _until_ended(self, name: str) -> Child:
        """The process that ended, unless another one had taken its place."""
        while True:
            child, adopted = self._running[name], self._adopted[name]
            async with anyio.create_task_group() as wait:
                wait.start_soon(_wait_and_cancel, child, wait.cancel_scope)
                await adopted.wait()
                wait.cancel_scope.cancel()
            async with self._starting[
                name
            ]:  # an old one may be empty, and end, before its replacement is known to serve
                if self._running[name] is child:
                    return child

    async def _follow_wanted(self, tasks: TaskGroup) -> None:
        while True:
            if (wanted := take_wanted(self._state_dir)) is not None:
                for process in self._processes:
                    if process.name in wanted.names:
                        tasks.start_soon(self._replace, process, wanted.id)
            await anyio.sleep(LOOK_AT_HELD_EVERY_S)

    async def _replace(self, process: Process, wish: str) -> None:
        """A new process serves instead of the running one, which ends by itself; or nothing changes."""
        name = process.name
        async with self._starting[name]:
            old = self._running.get(name)
            if not process.replace or old is None or self._status[name].state != "ready" or self._stopping:
                error = f"{name} is {self._status[name].state}" if process.replace else f"{name} cannot be replaced"
                return self._set(name, outcome=Outcome(id=wish, error=error))
            new = await self._start_beside(process)
            serves, gone = False, False
            with anyio.move_on_after(READY_WITHIN_S):
                while not (serves or gone or self._stopping):
                    await anyio.sleep(0.05)
                    gone = new.returncode is not None
                    serves = listener_pid(Path(process.replace)) == new.pid
            # One that served and died at once: the old one accepts no more, so it counts as replaced and is restarted.
            served = serves or (gone and listener_pid(Path(process.replace)) != old.pid)
            error = f"the new process failed; see {process.log}" if gone else ""
            if not served:
                with contextlib.suppress(ProcessLookupError):
                    new.kill()
                log.warning("process not replaced", name=name, code=new.returncode)
                return self._set(
                    name, outcome=Outcome(id=wish, error=error or f"the new process does not serve; see {process.log}")
                )
            self._beside[name].remove(new)
            self._run_beside(name, old)
            self._running[name] = new
            adopted, self._adopted[name] = self._adopted[name], anyio.Event()
            self._set(name, pid=new.pid, started=start_time(new.pid), outcome=Outcome(id=wish, error=error))
            adopted.set()
            log.info("process replaced", name=name, pid=new.pid, before=old.pid)

    async def _start_beside(self, process: Process) -> Child:
        with anyio.CancelScope(shield=True):  # whatever was started is known
            child = await start(msgspec.structs.replace(process, command=[*process.command, "--replace"]))
            self._run_beside(process.name, child)
        return self._beside[process.name][-1]

    def _run_beside(self, name: str, child: Child) -> None:
        self._beside[name] = [one for one in self._beside[name] if one.returncode is None] + [child]
        self._set(name, beside=[(one.pid, start_time(one.pid)) for one in self._beside[name]])

    async def _until_released(self, process: Process) -> None:
        self._set(process.name, state="stopped", pid=0, restarts=0)
        while process.name in self._held:
            await self._released.wait()

    async def _follow_held(self) -> None:
        kill_at: dict[str, float] = {}
        while True:
            held, now = read_held(self._state_dir), anyio.current_time()
            before, self._held = self._held, frozenset(held.names)
            if before - self._held:
                self._released.set()
                self._released = anyio.Event()
            for name in self._held:
                child = self._running.get(name)
                if name not in before:
                    await self._end_beside(name)
                    log.info("process is held down", name=name)
                    kill_at[name] = now if held.kill else now + STOP_WITHIN_S
                    if child is not None and child.returncode is None and not held.kill:
                        child.terminate()
                if child is not None and child.returncode is None and now >= kill_at[name]:
                    child.kill()
            await anyio.sleep(LOOK_AT_HELD_EVERY_S)

    async def _mark_ready(self, process: Process, up: _Up) -> None:
        while True:
            if await is_ready(process.ready):
                break
            await anyio.sleep(0.05)
        up.since = anyio.current_time()
        self._set(process.name, state="ready")
        self._ready[process.name].set()

    async def _until_told_to_stop(self, tasks: TaskGroup) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                break
        self._stopping = True
        async with anyio.create_task_group() as ending:
            for process in self._processes:
                ending.start_soon(self._end, process)
        tasks.cancel_scope.cancel()

    async def _end(self, process: Process) -> None:
        """Once those that started after it have ended."""
        for other in self._processes:
            if process.name in other.after:
                await self._ended[other.name].wait()
        async with self._starting[process.name]:
            child = self._running.get(process.name)
        if child is not None and child.returncode is None:
            child.terminate()
            with anyio.move_on_after(STOP_WITHIN_S):
                await child.wait()
            if child.returncode is None:
                child.kill()
                await child.wait()
        await self._end_beside(process.name)
        self._set(process.name, state="stopped", pid=0)
        self._ended[process.name].set()

    async def _end_beside(self, name: str) -> None:
        for child in self._beside.get(name, []):
            if child.returncode is None:
                child.kill()
                await child.wait()

    async def _reload(self) -> None:
        """SIGHUP for those whose files (certificates, users of the bus) were renewed."""
        watched = [process for process in self._processes if process.reload_on]
        seen = {process.name: _versions(process.reload_on) for process in watched}
        while watched:
            await anyio.sleep(LOOK_AT_FILES_EVERY_S)
            for process in watched:
                now = _versions(process.reload_on)
                if now != seen[process.name]:
                    seen[process.name] = now
                    child = self._running.get(process.name)
                    if child is not None and child.returncode is None:
                        log.info("process reads its files again", name=process.name)
                        child.send_signal(signal.SIGHUP)

    async def _trim_logs(self) -> None:
        while True:
            await anyio.sleep(30)
            for process in self._processes:
                path = Path(process.log)
                if path.is_file() and path.stat().st_size > LOG_BYTES_MAX:
                    os.truncate(path, 0)

    def _set(self, name: str, **changes: object) -> None:
        self._status[name] = msgspec.structs.replace(self._status[name], **changes)
        self._write()

    def _write(self) -> None:
        status = Status(supervisor=os.getpid(), processes=list(self._status.values()), trouble=self._trouble)
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.json.encode(status))
            fresh.rename(self._path)
        except OSError as error:  # a full disk: what runs goes on, the next change is written again
            log.warning("status not written", error=str(error))


class _Up:
    """Since when one run of a process has been ready."""

    def __init__(self) -> None:
        self.since: float | None = None

    def stayed(self, now: float) -> bool:
        return self.since is not None and now - self.since >= STAYS_UP_S


async def _wait_and_cancel(child: Child, scope: anyio.CancelScope) -> None:
    await child.wait()
    scope.cancel()


async def start(process: Process) -> Child:
    """In its namespace (none: this one), with a session and a log of its own."""
    command = (
        ["nsenter", f"--net=/run/netns/{process.netns}", "--", *process.command] if process.netns else process.command
    )
    with Path(process.log).open("ab") as output:  # noqa: ASYNC230 - a descriptor for the child
        return await anyio.open_process(
            command,
            env=process.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )


async def is_ready(what: str) -> bool:
    kind, _, rest = what.partition(":")
    if kind == "tcp":
        address, _, port = rest.rpartition(":")
        with anyio.move_on_after(PROBE_WITHIN_S):
            try:
                stream = await anyio.connect_tcp(address, int(port))
            except OSError:
                return False
            await stream.aclose()
            return True
        return False
    if kind == "unix":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.2)
            return probe.connect_ex(rest) == 0
    return Path(rest).exists() if kind == "file" else True


def _versions(paths: list[str]) -> list[int]:
    """When each file was last written; 0 for one that is not there."""
    return [Path(path).stat().st_mtime_ns if Path(path).is_file() else 0 for path in paths]


def read_held(state_dir: Path) -> Held:
    try:
        return msgspec.json.decode((state_dir / "held.json").read_bytes(), type=Held)
    except (FileNotFoundError, msgspec.DecodeError):
        return Held()


def write_held(state_dir: Path, held: Held) -> None:
    fresh = state_dir / "held.new"
    fresh.write_bytes(msgspec.json.encode(held))
    fresh.rename(state_dir / "held.json")


def start_time(pid: int) -> int:
    """Clock ticks since boot at which a pid began; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[19])


def read_status(state_dir: Path) -> Status | None:
    try:
        return msgspec.json.decode((state_dir / "status.json").read_bytes(), type=Status)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def keep_running(state_dir: Path) -> None:
    """In the foreground, until SIGTERM or SIGINT."""
    processes = msgspec.json.decode((state_dir / "processes.json").read_bytes(), type=list[Process])
    anyio.run(Supervisor(state_dir, processes).run)


def replace_running(state_dir: Path, names: list[str]) -> None:
    """Asks the supervisor there and waits. Raises Conflict with the reason of each process that was not replaced."""
    wanted = Wanted(id=secrets.token_hex(8), names=names)
    want(state_dir, wanted)
    deadline, outcomes = time.monotonic() + REPLACED_WITHIN_S, dict[str, Outcome]()
    while len(outcomes) < len(names) and time.monotonic() < deadline:
        seen = read_status(state_dir)
        mine = [process for process in seen.processes if process.outcome.id == wanted.id] if seen else []
        outcomes = {process.name: process.outcome for process in mine}
        time.sleep(0.05)
    left = [name for name in names if name not in outcomes]
    errors = [outcome.error for outcome in outcomes.values() if outcome.error]
    if left or errors:
        raise Conflict("; ".join([*errors, *(f"{name} was not replaced in time" for name in left)]))


def save_processes(state_dir: Path, processes: list[Process]) -> None:
    """What the next supervisor of this folder runs."""
    path = state_dir / "processes.json"
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(processes))
    for name in ("status.json", "held.json", "replace.json"):
        (state_dir / name).unlink(missing_ok=True)


def is_supervisor(pid: int) -> bool:
    try:
        return b"pantala.host.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _stay(number: int, frame: object) -> None:
    """A hangup concerns the children alone."""


def main(arguments: list[str]) -> int:
    configure(program="supervisor")
    # Started under nohup this signal would be ignored by all children too, who read their files again by it.
    signal.signal(signal.SIGHUP, _stay)
    keep_running(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
