"""Is a running machine ready, and do its checks pass? One per started instance; lives in the machine's task.

A service is ready when its checks pass, or, without checks, once its port has accepted. When a port does not accept
after a while, the namespace's listening sockets are read and the app is told where it listens instead.

Servers that bind before they load the app accept and never answer when it does not load. So a new version is also
asked over HTTP until it has answered once (`domain/answers.py`): a deploy waits for it, and for `held_s` no request is
sent to it, unless one woke it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import structlog
from anyio.abc import TaskGroup

from pantala.agent.contained import Contained, Tell, check_name
from pantala.agent.context import Context
from pantala.domain.answers import asked_ports
from pantala.domain.durations import seconds
from pantala.domain.runtime import ListenSocket
from pantala.journal import MachineRecord
from pantala.kit.clock import rfc3339_ms, unix_ms
from pantala.wire.guest import STATICS_PORT
from pantala.wire.machine import Check, CheckStatus, MachineConfig

log = structlog.get_logger()

INTERVAL_S = 15.0
TIMEOUT_S = 2.0
GRACE_S = 1.0
OUTPUT_MAX = 500
FIRST = "waiting for the first check"
AGAIN_S = 5.0
ANSWER_TIMEOUT_S = 60.0
"""For one request: the first one may be what makes an app load."""


class _Probe:
    """One check and its last answer. `service`: the index of the service that it gates, None for top-level ones."""

    def __init__(self, name: str, check: Check, port: int, service: int | None) -> None:
        self.name = name
        self.check = check
        self.port = port
        self.service = service
        self.passing = False
        self.output = FIRST
        self.updated_at_ms = 0

    def status(self) -> CheckStatus:
        return CheckStatus(
            name=self.name,
            status="passing" if self.passing else "critical",
            output=self.output,
            updated_at=rfc3339_ms(self.updated_at_ms),
        )


class Health:
    """`changed` is awaited after each change of a flag, `became_ready` once its ports accept and its checks pass; those
    who wait for `ready` are told before either. `answered` gets a sentence when a new version has answered over HTTP,
    `explain` one about a wrong address, `tell` what containers did."""

    def __init__(
        self,
        context: Context,
        record: MachineRecord,
        *,
        changed: Callable[[], Awaitable[None]],
        became_ready: Callable[[int], Awaitable[None]],
        answered: Callable[[str], Awaitable[None]],
        explain: Callable[[str], Awaitable[None]],
        tell: Tell,
    ) -> None:
        self._context = context
        self._record = record
        self._changed = changed
        self._became_ready = became_ready
        self._answered = answered
        self._explain = explain
        self.contained = Contained(context, record, changed=changed, tell=tell)
        self._services = record.version.config.services or []
        self._accepts = [False] * len(self._services)
        self._probes = _probes(record.version.config, self._now_ms())
        self.ready = anyio.Event()
        self.ready_at_ms = 0
        if not self._services:
            self.ready.set()
            self.ready_at_ms = self._now_ms()
        self.explanation = ""
        is_new = record.answered_instance != record.version.instance_id
        self._to_ask = asked_ports(record.version.config) if is_new else []
        self._held = bool(self._to_ask) and record.desired.source != "proxy"
        self._open = anyio.Event()

    @property
    def is_asking(self) -> bool:
        """A new version has not answered yet: it is not idle, however few requests it gets."""
        return bool(self._to_ask)

    def passing(self) -> list[bool]:
        """A flag per service: may it get requests?"""
        held = self._to_ask if self._held else []
        return [
            is_open and service.internal_port not in held
            for service, is_open in zip(self._services, self._is_open(), strict=True)
        ]

    def _is_open(self) -> list[bool]:
        """A flag per service: do its checks pass, or does its port accept?"""
        out: list[bool] = []
        for index in range(len(self._services)):
            gates = [probe.passing for probe in self._probes if probe.service == index]
            out.append(all(gates) if gates else self._accepts[index])
        return out

    def statuses(self) -> list[CheckStatus]:
        return [*(probe.status() for probe in self._probes), *self.contained.checks()]

    def start(self, tasks: TaskGroup) -> None:
        for index, _ in enumerate(self._services):
            if not any(probe.service == index for probe in self._probes):
                tasks.start_soon(self._guarded, partial(self._until_it_accepts, index))
        for probe in self._probes:
            tasks.start_soon(self._guarded, partial(self._check_for_ever, probe))
        if self.contained.are_there:
            tasks.start_soon(self._guarded, self.contained.watch)
        if self._services:
            tasks.start_soon(self._guarded, self._explain_silence)
        if self._to_ask:
            tasks.start_soon(self._guarded, self._until_it_answers)
        if self._held:
            tasks.start_soon(self._guarded, self._hold_no_longer)

    # -- footnotes -----------------------------------------------------------------------------------------------------

    async def _guarded(self, watch: Callable[[], Awaitable[None]]) -> None:
        """A probe that fails in a way nobody foresaw is begun again; the machine itself is not touched."""
        while True:
            try:
                return await watch()
            except Exception as error:
                log.exception("health probe failed", machine=self._record.id, error=str(error))
                await self._context.clock.sleep(AGAIN_S)

    def _now_ms(self) -> int:
        return unix_ms(self._context.clock.now())

    async def _flagged(self) -> None:
        if not self.ready.is_set() and all(self.passing()):
            self.ready_at_ms = self._now_ms()
            self.ready.set()
        await self._changed()
        if not self._open.is_set() and all(self._is_open()):
            self._open.set()
            await self._became_ready(self._now_ms())

    async def _until_it_accepts(self, index: int) -> None:
        pace = self._context.pace
        port = self._services[index].internal_port or 0
        pause_s = pace.ready_first_s
        while await self._context.prober.tcp(self._record.ip4, port, timeout_s=TIMEOUT_S):
            await self._context.clock.sleep(pause_s)
            pause_s = min(pause_s * 1.5, pace.ready_most_s)
        self._accepts[index] = True
        await self._flagged()

    async def _until_it_answers(self) -> None:
        """Ask `/` of each port; any status is an answer. An app that is slow to load gets its time."""
        pace, said = self._context.pace, list[str]()
        await self._open.wait()
        if self._record.desired.source == "proxy":
            await self._context.clock.sleep(pace.answer_after_wake_s)  # the request that woke it goes first
        pause_s, begun = pace.ready_first_s, self._context.clock.monotonic()
        while self._to_ask:
            port = self._to_ask[0]
            status = await self._context.prober.answer(self._record.ip4, port, timeout_s=ANSWER_TIMEOUT_S)
            if status:
                said.append(f"{status} on port {port}")
                if len(self._to_ask) == 1:
                    await self._answered(f"GET / was answered with {', '.join(said)}")
                self._to_ask.pop(0)
                if self._held:
                    await self._flagged()
            elif self._context.clock.monotonic() - begun >= pace.answer_end_s:
                self._to_ask.clear()
            else:
                await self._context.clock.sleep(pause_s)
                pause_s = min(pause_s * 1.5, pace.answer_again_s)

    async def _hold_no_longer(self) -> None:
        """Not every app answers `/`: requests must not wait for that for ever."""
        await self._open.wait()
        await self._context.clock.sleep(self._context.pace.held_s)
        self._held = False
        if self._to_ask:
            await self._flagged()

    async def _check_for_ever(self, probe: _Probe) -> None:
        """Quick until it passes for the first time, then every `interval`; failures within the grace are not told."""
        check, pace = probe.check, self._context.pace
        interval_s = seconds(check.interval, field="interval", default=INTERVAL_S)
        timeout_s = seconds(check.timeout, field="timeout", default=TIMEOUT_S)
        grace_s = seconds(check.grace_period, field="grace_period", default=GRACE_S)
        begun = self._context.clock.monotonic()
        pause_s, first = pace.ready_first_s, True
        while True:
            passing, output = await self._ask(probe, timeout_s)
            in_grace = not passing and self._context.clock.monotonic() - begun < grace_s
            if not in_grace and (passing != probe.passing or first or output != probe.output):
                differs = passing != probe.passing
                probe.passing, probe.output, probe.updated_at_ms = passing, output, self._now_ms()
                if differs:
                    await self._flagged()
            first = first and not passing
            if first:
                await self._context.clock.sleep(min(pause_s, interval_s))
                pause_s = min(pause_s * 1.5, pace.ready_most_s)
            else:
                await self._context.clock.sleep(interval_s)

    async def _ask(self, probe: _Probe, timeout_s: float) -> tuple[bool, str]:
        check = probe.check
        if check.type == "tcp":
            refused = await self._context.prober.tcp(self._record.ip4, probe.port, timeout_s=timeout_s)
            return not refused, self._with_hint(refused) or "Success"
        status, text = await self._context.prober.http(
            self._record.ip4,
            probe.port,
            method=(check.method or "GET").upper(),
            path=check.path or "/",
            headers={header.name: ",".join(header.values) for header in check.headers or []},
            tls=check.protocol == "https",
            tls_verify=not check.tls_skip_verify,
            timeout_s=timeout_s,
        )
        good = 200 <= status < 300
        return good, text[:OUTPUT_MAX] if status else self._with_hint(text)[:OUTPUT_MAX]

    def _with_hint(self, refused: str) -> str:
        return f"{refused}; {self.explanation}" if refused and self.explanation else refused

    async def _explain_silence(self) -> None:
        """Once, some seconds after the start: where does the app listen if not where its services say? An app that
        listens nowhere yet gets more time."""
        pace = self._context.pace
        waited_s = 0.0
        while True:
            await self._context.clock.sleep(pace.explain_after_s)
            waited_s += pace.explain_after_s
            silent = [port for port in self._ports() if await self._refuses(port)]
            if not silent:
                return
            listening = await self._context.network.listening(self._record.id)
            sockets = [socket for socket in listening if socket.port != STATICS_PORT]  # init's, not the app's
            if sockets or waited_s >= pace.explain_nothing_s:
                self.explanation = "; ".join(dict.fromkeys(wrong_address(sockets, port) for port in silent))
                await self._explain(self.explanation)
                return

    def _ports(self) -> list[int]:
        return [service.internal_port or 0 for service in self._services]

    async def _refuses(self, port: int) -> str:
        return await self._context.prober.tcp(self._record.ip4, port, timeout_s=TIMEOUT_S)


def wrong_address(sockets: list[ListenSocket], port: int) -> str:
    """A sentence for the app's owner about a port that does not accept."""
    tcp = [socket for socket in sockets if socket.proto.startswith("tcp")]
    here = [socket for socket in tcp if socket.port == port]
    if here and all(_loopback(socket.address) for socket in here):
        return f"the app listens on {shown(here[0])}; bind 0.0.0.0:{port}"
    if here:
        return f"the app listens on {shown(here[0])}, but does not accept; is it busy?"
    if tcp:
        where = ", ".join(sorted({shown(socket) for socket in tcp}))
        return f"nothing listens on port {port}; the app listens on {where}; bind 0.0.0.0:{port} or set internal_port"
    return f"nothing listens on port {port} yet; bind 0.0.0.0:{port}"


def shown(socket: ListenSocket) -> str:
    return f"[{socket.address}]:{socket.port}" if ":" in socket.address else f"{socket.address}:{socket.port}"


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def expected(config: MachineConfig, now_ms: int) -> list[CheckStatus]:
    """The checks of a version that is about to start: those that a client waits for, none of them passing yet."""
    contained = [
        CheckStatus(
            name=check_name(one.name, check.name), status="critical", output=FIRST, updated_at=rfc3339_ms(now_ms)
        )
        for one in config.containers or []
        for check in one.healthchecks or []
    ]
    return [*(probe.status() for probe in _probes(config, now_ms)), *contained]


def _probes(config: MachineConfig, now_ms: int) -> list[_Probe]:
    out: list[_Probe] = []
    for index, service in enumerate(config.services or []):
        for check in service.checks or []:
            port = check.port or service.internal_port or 0
            name = f"servicecheck-{len(out):02d}-{check.type}-{port}"
            out.append(_Probe(name, check, port, index))
    for name, check in (config.checks or {}).items():
        out.append(_Probe(name, check, check.port or 0, None))
    for probe in out:
        probe.updated_at_ms = now_ms
    return out
