"""The escape suite of a host: a machine made like any other tries to get out, and what became of it is kept.

The attempts are `pantala-init escape` (`crates/pantala-init/src/escape/mod.rs`). First it is asked on the host, with
the host's rights, what there is to aim at; then it runs as the app of a machine with an address, a firewall and ids of
its own, in a network that no app has. Its image has one file, and the host has a file that anybody on it may read: a
machine that reads the second or changes the first is out. The machine is gone afterwards, whatever happened; after a
kill the next agent removes it like all leftovers.

The outcome is a file, shown with each machine's isolation together with what has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import structlog

from pantala.agent import addresses
from pantala.agent.host import Host
from pantala.domain import process
from pantala.domain.machine import State
from pantala.domain.runtime import ImageConfig, Limits, NetworkPlan, UnpackedImage
from pantala.drivers.protocol import PrepareSpec
from pantala.errors import Conflict, DriverError, PantalaError, TransientError
from pantala.kit import binaries
from pantala.kit.clock import rfc3339_ms, unix_ms
from pantala.kit.files import write_private
from pantala.kit.ids import ulid
from pantala.net import sixpn
from pantala.wire.escape import EscapeAttempt, EscapeReport, EscapeSuite
from pantala.wire.guest import Start
from pantala.wire.machine import Isolation

log = structlog.get_logger()

NETWORK = (1 << 32) - 1
"""No app's: control counts them from 1."""
WITHIN_S, CLEARED_WITHIN_S = 40.0, 10.0
NEIGHBOURS_MAX = 4
LIMITS = Limits(cpus=1, shared_cpu=True, memory_mib=128, pids=64, disk_mib=64)
PROGRAM = "/proc/self/exe"
"""As PID 1 sees it, which begins the app: itself."""
IMAGE_FILE = "image-file"
IMAGE_TEXT = "as the image has it\n"
_WORDS = {
    "driver": "driver",
    "boundary": "boundary",
    "kernel": "kernel",
    "seccomp": "seccomp filter",
    "capabilities": "capabilities",
    "no_new_privileges": "new privileges",
    "runtime": "runtime",
    "init": "init",
}
"""Facts of the isolation that a suite speaks of; ids are each machine's own."""


class _Said(msgspec.Struct, frozen=True):
    """A line of `pantala-init escape`."""

    name: str
    outcome: str
    detail: str


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    suite: EscapeSuite
    isolation: Isolation
    attempts: list[EscapeAttempt]


class EscapeSuites:
    """`addresses`: of the host, where machines must not get. `after_s`: see `AgentSettings`."""

    def __init__(
        self, host: Host, *, state_dir: Path, pool4: str, addresses: Sequence[str] = (), after_s: float = 0.0
    ) -> None:
        self._host = host
        self._context = host.context
        self._pool4 = pool4
        self._addresses = list(addresses)
        self._after_s = after_s
        self._file, self._journal = state_dir / "escape-suite.json", state_dir / "journal.db"
        self._running = running_file(state_dir)
        self._folder = state_dir / "escape"
        self._is_running = False
        self._kept = _read(self._file)

    # -- what is known ------------------------------------------------------------------------------------------------

    def last(self, now: Isolation) -> EscapeSuite | None:
        """The last suite, beside what machines are made with now."""
        if self._kept is None:
            return None
        changed = [
            word for field, word in _WORDS.items() if getattr(self._kept.isolation, field) != getattr(now, field)
        ]
        return msgspec.structs.replace(self._kept.suite, outdated=changed)

    def report(self) -> EscapeReport:
        suite = self.last(self._context.driver.isolated(0))
        attempts = self._kept.attempts if self._kept is not None else []
        return EscapeReport(host=self._context.node, suite=suite, attempts=attempts)

    # -- running ------------------------------------------------------------------------------------------------------

    async def run_when_due(self) -> None:
        """Once, some time after the start, where this driver with this init was never tried."""
        if not self._after_s or self._context.driver.isolation != "container":
            return
        await self._context.clock.sleep(self._after_s)
        # In a thread: reads programs from disk, once.
        now = await anyio.to_thread.run_sync(self._context.driver.isolated, 0)
        known = self.last(now)
        if known is not None and not known.outdated:
            return
        try:
            await self.run()
        except PantalaError as error:
            log.warning("the escape suite did not run", error=error.message)

    async def run(self) -> EscapeReport:
        """Raises Conflict where there is nothing to try or one runs already, DriverError where no machine comes up."""
        if self._context.driver.isolation != "container":
            raise Conflict(
                f"the driver of {self._context.node} is {self._context.driver.name}, whose machines are no containers",
                hint="the escape suite is made for containers",
            )
        if self._is_running:
            raise Conflict(f"the escape suite runs on {self._context.node} already")
        self._is_running = True
        try:
            with anyio.move_on_after(WITHIN_S) as scope:
                try:
                    return await self._keep(await self._attempts())
                except OSError as error:
                    raise DriverError(f"the files of the escape suite cannot be written: {error.strerror}") from error
            assert scope.cancelled_caught
            raise TransientError(f"the escape suite did not end within {WITHIN_S:g} s")
        finally:
            self._is_running = False

    async def _attempts(self) -> list[EscapeAttempt]:
        machine_id = f"escape-{secrets.token_hex(4)}"
        self._running.write_text(machine_id)
        chosen = addresses.choose(
            used=[task.record.slot for task in self._host.machines.values()],
            machine_id=machine_id,
            network=NETWORK,
            node=self._context.node,
            pool4=self._pool4,
            last=True,
        )
        async with self._traps() as (layer, canary, secret):
            aims: dict[str, Any] = {
                "canary": str(canary),
                "secret": secret,
                "image_file": f"/{IMAGE_FILE}",
                "files": [str(path) for path in (self._journal, self._file) if path.exists()],
                "pid": os.getpid(),
                "host": [chosen.gateway4, *self._addresses],
                "open": [f"[{self._context.nameserver}]:{port}" for port in (53, sixpn.API_PORT)],
                "neighbours": self._neighbours(),
            }
            aims["survey"] = await _survey(aims)
            try:
                said = await self._attack(machine_id, chosen, layer, aims)
            finally:
                with anyio.CancelScope(shield=True), anyio.move_on_after(CLEARED_WITHIN_S):
                    await self._clear(machine_id)
            return [_judged(one, layer) for one in said]

    @asynccontextmanager
    async def _traps(self) -> AsyncGenerator[tuple[Path, Path, str]]:
        """A layer with a file that must not change, and a file of the host that must not be read."""
        layer, secret = self._folder / "layer", secrets.token_hex(16)
        layer.mkdir(parents=True, exist_ok=True)
        file = layer / IMAGE_FILE
        file.unlink(missing_ok=True)
        file.write_text(IMAGE_TEXT)
        file.chmod(0o644)
        canary = _canary(self._running.parent)
        canary.unlink(missing_ok=True)
        descriptor = os.open(canary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            with os.fdopen(descriptor, "w") as opened:
                opened.write(secret)
            canary.chmod(0o644)
            yield layer, canary, secret
        finally:
            canary.unlink(missing_ok=True)
            self._running.unlink(missing_ok=True)

    def _neighbours(self) -> list[str]:
        awake = [task.record for task in self._host.machines.values() if task.record.state is State.STARTED]
        return [address for record in awake[:NEIGHBOURS_MAX] for address in (record.ip4, record.ip6)]

    async def _attack(
        self, machine_id: str, chosen: addresses.Addresses, layer: Path, aims: dict[str, Any]
    ) -> list[_Said]:
        driver = self._context.driver
        network = await self._context.network.ensure(
            NetworkPlan(
                machine_id=machine_id,
                slot=chosen.slot,
                network=NETWORK,
                ip4=chosen.ip4,
                gateway4=chosen.gateway4,
                ip6=chosen.ip6,
                uid_base=chosen.uid_base,
            )
        )
        await driver.prepare(
            PrepareSpec(
                machine_id=machine_id,
                instance_id=ulid(),
                image=UnpackedImage(digest="", layers=(layer,), config=ImageConfig()),
                network=network,
                limits=LIMITS,
                uid_base=chosen.uid_base,
                hostname=machine_id,
                hosts=process.hosts_file(machine_id, ip4=chosen.ip4, private_ip=chosen.ip6, host=machine_id),
                resolv_conf=process.resolv_conf(self._context.nameserver, []),
            )
        )
        await driver.start(machine_id, Start(argv=[PROGRAM, "escape", msgspec.json.encode(aims).decode()], env={}))
        ended = await driver.wait(machine_id)
        records = await driver.logs(machine_id, 0)
        if ended.exit is None or ended.exit.exit_code != 0 or not records:
            words = "; ".join(record.text for record in records if record.stream == "stderr")[-300:]
            raise DriverError(f"the attempts did not come to an end: {ended.exit}, {words or 'it said nothing'}")
        try:
            return [msgspec.json.decode(record.text, type=_Said) for record in records if record.stream == "stdout"]
        except msgspec.MsgspecError as error:
            raise DriverError(f"what the attempts said cannot be read: {error}") from error

    async def _clear(self, machine_id: str) -> None:
        try:
            await self._context.driver.destroy(machine_id)
        finally:
            await self._context.network.remove(machine_id)

    async def _keep(self, attempts: list[EscapeAttempt]) -> EscapeReport:
        names: dict[str, list[str]] = {}
        for attempt in attempts:
            names.setdefault(attempt.outcome, []).append(attempt.name)
        suite = EscapeSuite(
            ran_at=rfc3339_ms(unix_ms(self._context.clock.now())),
            version=metadata.version("pantala"),
            attempts=len(attempts),
            held=len(names.get("held", [])),
            not_applicable=len(names.get("not_applicable", [])),
            through=names.get("through", []),
            unclear=names.get("unclear", []),
            outdated=[],
        )
        self._kept = _Kept(suite=suite, isolation=self._context.driver.isolated(0), attempts=attempts)
        await anyio.to_thread.run_sync(write_private, self._file, msgspec.json.encode(self._kept))
        told = log.error if suite.through else log.info
        told("escape suite ran", held=suite.held, through=suite.through, unclear=suite.unclear)
        return self.report()


def running_file(state_dir: Path) -> Path:
    return state_dir / "escape-running"


def _canary(state_dir: Path) -> Path:
    mark = hashlib.sha256(str(state_dir).encode()).hexdigest()[:16]
    return Path("/var/tmp") / f"pantala-escape-{mark}"  # noqa: S108 - made anew for each suite, by nobody else


def remove_traps(state_dir: Path) -> None:
    """What a suite leaves that was killed."""
    for path in (_canary(state_dir), running_file(state_dir)):
        path.unlink(missing_ok=True)


def running(state_dir: Path) -> set[str]:
    """The machine in which a suite runs now: it is in no journal and belongs here all the same."""
    with contextlib.suppress(FileNotFoundError):
        return {running_file(state_dir).read_text()}
    return set()


async def _survey(aims: dict[str, Any]) -> dict[str, Any]:
    """What this host has that attempts could aim at, asked where the agent lives."""
    command = [str(binaries.find("pantala-init")), "escape", "--survey", msgspec.json.encode(aims).decode()]
    done = await anyio.run_process(command, check=False)
    try:
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=dict[str, Any])
        raise DriverError(f"the host could not be surveyed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    except msgspec.MsgspecError as error:
        raise DriverError(f"the survey of the host cannot be read: {error}") from error


def _judged(said: _Said, layer: Path) -> EscapeAttempt:
    """What only the host can see is looked at here: whether the image is as it was."""
    outcome, detail = said.outcome, said.detail
    if outcome == "host_sees":
        file = layer / IMAGE_FILE
        there = file.stat()
        is_same = file.read_text() == IMAGE_TEXT and (there.st_uid, there.st_mode & 0o7777) == (os.getuid(), 0o644)
        outcome = "held" if is_same else "through"
        detail += "; the image's layer is as it was" if is_same else "; so is the image's layer on the host"
    return msgspec.convert({"name": said.name, "outcome": outcome, "detail": detail}, type=EscapeAttempt)


def _read(file: Path) -> _Kept | None:
    """None also where an agent of another version wrote something else: then it counts as never run."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None
