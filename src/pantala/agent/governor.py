"""Holds back machines with shared CPUs whose balance is empty, and lets them go on (`domain/burst.py` counts).

One task for the host. It reads what the kernel counted only of machines that are awake, and of those only as often as
their balance could have run out or filled: a machine with much saved is looked at every `LOOK_MOST_S`, one about to be
held back ten times a second. A quota is written when it changes. Machines with CPUs of their own are none of its
business, and sleeping ones cost it nothing.

Balances live in a file of `run_dir`, saved every `SAVE_EVERY_S`. The next agent settles what happened since from the
kernel's count and the time, so nothing is lost between two saves; a new start begins with a new balance, and a machine
that was suspended keeps the one it had. Without the file (a reboot ends the machines as well) balances begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import anyio.to_thread
import msgspec
import structlog

from pantala.domain import burst, guests
from pantala.domain.runtime import CPUUsage
from pantala.drivers.protocol import Driver
from pantala.errors import PantalaError
from pantala.kit.boot import boot_id
from pantala.kit.clock import Clock
from pantala.wire.machine import MachineConfig, MachineCPU

log = structlog.get_logger()

LOOK_MOST_S = 10.0
LOOK_LEAST_S = 0.1
SEEN_WITHIN_S = 1.0
"""A machine that starts is noticed by then."""
SETTLED_AT_ONCE = 64
"""Some milliseconds: an agent that comes back to hundreds of machines answers wakes in between."""
SAVE_EVERY_S = 10.0
CENTISECOND_US = 10_000


class Subject(msgspec.Struct, frozen=True):
    """A machine that runs, or that is suspended and will go on where it was."""

    machine_id: str
    instance_id: str
    config: MachineConfig
    awake: bool


class Ledger(msgspec.Struct, kw_only=True):
    """One start of one machine; `at_us` of the monotonic clock is when `balance_us` was true."""

    instance_id: str
    run: str
    cpus: int
    shared: bool
    balance_us: int
    used_us: int
    at_us: int
    throttled: bool = False
    awake: bool = True
    look_at_us: int = 0


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    boot: str
    ledgers: dict[str, Ledger]


class Governor:
    """`subjects` are asked for at each look; `file` is where balances outlive this process."""

    def __init__(
        self, driver: Driver, clock: Clock, *, subjects: Callable[[], Iterable[Subject]], file: Path | None = None
    ) -> None:
        self._driver = driver
        self._clock = clock
        self._subjects = subjects
        self._file = file
        self._ledgers: dict[str, Ledger] = {}
        self._saved_at_us = 0
        self._unsaved = False

    async def run(self) -> None:
        self._load()
        try:
            while True:
                pause_s = self.look()
                if pause_s < SEEN_WITHIN_S:
                    await self._clock.sleep(pause_s)
                else:
                    await self._clock.tick(SEEN_WITHIN_S)
                if self._unsaved and self._now_us() - self._saved_at_us >= SAVE_EVERY_S * 1e6:
                    await anyio.to_thread.run_sync(self._write, self._encoded())
        finally:
            self._write(self._encoded())

    def look(self) -> float:
        """Settle whatever is due; the seconds until something may be due again."""
        now_us = self._now_us()
        next_us = now_us + int(SEEN_WITHIN_S * 1e6)
        seen: set[str] = set()
        left = SETTLED_AT_ONCE
        for subject in self._subjects():
            seen.add(subject.machine_id)
            ledger = self._ledgers.get(subject.machine_id)
            if left > 0 and self._is_due(subject, ledger, now_us):
                left -= 1
                self._attend(subject, ledger, now_us)
                ledger = self._ledgers.get(subject.machine_id)
            if ledger is not None and ledger.awake and ledger.shared:
                next_us = min(next_us, ledger.look_at_us)
        if left == 0:
            next_us = now_us
        for machine_id in self._ledgers.keys() - seen:
            del self._ledgers[machine_id]
            self._unsaved = True
        return max(LOOK_LEAST_S, (next_us - now_us) / 1e6)

    def shown(self, machine_id: str) -> MachineCPU | None:
        """The machine's CPU as its API document tells it, as of now; None while it does not run."""
        ledger = self._ledgers.get(machine_id)
        if ledger is None:
            return None
        if ledger.awake and ledger.shared:
            self._settle(machine_id, ledger, self._now_us())
            if machine_id not in self._ledgers:
                return None
        usage = self._driver.cpu_usage(machine_id)
        baseline_us = burst.earned_us(ledger.cpus, 1_000_000) if ledger.shared else ledger.cpus * 1_000_000
        return MachineCPU(
            baseline=baseline_us / CENTISECOND_US,
            balance=max(0, ledger.balance_us) / CENTISECOND_US if ledger.shared else 0.0,
            throttle=(usage.throttled_us if usage else 0) / CENTISECOND_US,
            throttled=ledger.throttled,
        )

    # -- one machine ---------------------------------------------------------------------------------------------------

    def _is_due(self, subject: Subject, ledger: Ledger | None, now_us: int) -> bool:
        if ledger is None or ledger.instance_id != subject.instance_id or ledger.awake != subject.awake:
            return True
        return ledger.awake and ledger.shared and ledger.look_at_us <= now_us

    def _attend(self, subject: Subject, ledger: Ledger | None, now_us: int) -> None:
        if ledger is None or ledger.instance_id != subject.instance_id:
            self._open(subject, now_us)
        elif ledger.awake != subject.awake:
            self._wake_or_rest(subject, ledger, now_us)
        else:
            self._settle(subject.machine_id, ledger, now_us)

    def _open(self, subject: Subject, now_us: int) -> None:
        """A start that was not seen before. What it used until now counts, as far as its balance goes."""
        usage = self._driver.cpu_usage(subject.machine_id)
        if usage is None:
            self._ledgers.pop(subject.machine_id, None)
            return
        size = guests.resolve(subject.config)
        self._ledgers[subject.machine_id] = ledger = Ledger(
            instance_id=subject.instance_id,
            run=usage.run,
            cpus=size.cpus,
            shared=size.is_shared,
            balance_us=max(0, burst.opening_us(size.cpus) - usage.used_us),
            used_us=usage.used_us,
            at_us=now_us,
            awake=subject.awake,
        )
        self._unsaved = True
        if size.is_shared:  # written whatever it is: an agent without the balances of its predecessor knows no quota
            self._limit(subject.machine_id, ledger, burst.is_throttled(ledger.balance_us, cpus=ledger.cpus, was=False))
            self._judge(subject.machine_id, ledger, now_us)

    def _settle(self, machine_id: str, ledger: Ledger, now_us: int) -> None:
        usage = self._driver.cpu_usage(machine_id)
        if usage is None or usage.run != ledger.run:
            # Another start of the same version, or an end that its task has yet to write down: look again soon.
            del self._ledgers[machine_id]
            return
        self._count(ledger, usage, now_us)
        self._judge(machine_id, ledger, now_us)

    def _count(self, ledger: Ledger, usage: CPUUsage, now_us: int) -> None:
        ledger.balance_us = burst.settled_us(
            ledger.balance_us,
            cpus=ledger.cpus,
            elapsed_us=max(0, now_us - ledger.at_us),
            used_us=max(0, usage.used_us - ledger.used_us),
        )
        ledger.used_us, ledger.at_us = usage.used_us, now_us
        self._unsaved = True

    def _judge(self, machine_id: str, ledger: Ledger, now_us: int) -> None:
        throttled = burst.is_throttled(ledger.balance_us, cpus=ledger.cpus, was=ledger.throttled)
        if throttled != ledger.throttled:
            self._limit(machine_id, ledger, throttled)
        pause_us = burst.unchanged_for_us(ledger.balance_us, cpus=ledger.cpus, throttled=ledger.throttled)
        ledger.look_at_us = now_us + min(int(LOOK_MOST_S * 1e6), max(int(LOOK_LEAST_S * 1e6), pause_us))

    def _limit(self, machine_id: str, ledger: Ledger, throttled: bool) -> None:
        try:
            self._driver.set_cpu_quota(machine_id, burst.quota_us(ledger.cpus, throttled=throttled))
        except PantalaError as error:
            log.warning("CPU quota was not taken; tried again", machine=machine_id, error=str(error))
            return
        if throttled != ledger.throttled:
            log.info("machine held back to its share" if throttled else "machine may burst", machine=machine_id)
        ledger.throttled = throttled

    def _wake_or_rest(self, subject: Subject, ledger: Ledger, now_us: int) -> None:
        """Nothing is earned in sleep: a machine that is suspended settles, one that goes on counts from now."""
        if subject.awake:
            ledger.at_us = now_us
            ledger.awake = True
            if ledger.shared:
                self._settle(subject.machine_id, ledger, now_us)
        else:
            if ledger.shared:
                self._settle(subject.machine_id, ledger, now_us)
            ledger.awake = False

    # -- the file ------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        if self._file is None:
            return
        try:
            saved = msgspec.json.decode(self._file.read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError):  # the first agent since boot, or one of a version before
            return
        if saved.boot != boot_id():
            return
        for machine_id, ledger in saved.ledgers.items():
            usage = self._driver.cpu_usage(machine_id)
            if usage is not None and usage.run == ledger.run:
                self._ledgers[machine_id] = ledger
                if ledger.shared:  # the agent before may have died between a verdict and its save
                    self._limit(machine_id, ledger, ledger.throttled)

    def _encoded(self) -> bytes:
        self._unsaved, self._saved_at_us = False, self._now_us()
        return msgspec.json.encode(_Saved(boot=boot_id(), ledgers=self._ledgers))

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        fresh = self._file.with_suffix(".new")
        try:
            fresh.write_bytes(data)
            fresh.rename(self._file)
        except OSError as error:
            log.warning("balances were not saved; tried again", error=str(error))

    def _now_us(self) -> int:
        return int(self._clock.monotonic() * 1e6)
