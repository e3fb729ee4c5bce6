"""What every machine task needs: the parts the agent composes, given once through constructors."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from typing import Literal, Protocol

import anyio
import msgspec

from pantala.agent.policies import Policies
from pantala.agent.ports import ImageStore, Network
from pantala.agent.seating import Seating
from pantala.agent.ssh import SshDoors
from pantala.drivers.protocol import Driver
from pantala.journal import Journal, MachineRecord
from pantala.kit.clock import Clock
from pantala.kit.rows import RowSink
from pantala.kit.sealing import Opener

DrainResult = Literal["drained", "busy", "deadline", "no_proxy"]


class Prober(Protocol):
    """Asks a machine's ports; answers in words, never raises for what the app does."""

    async def tcp(self, address: str, port: int, *, timeout_s: float) -> str:
        """Empty when it accepts, else why not."""
        ...

    async def http(
        self,
        address: str,
        port: int,
        *,
        method: str,
        path: str,
        headers: dict[str, str],
        tls: bool,
        tls_verify: bool,
        timeout_s: float,
    ) -> tuple[int, str]:
        """Status (0: no answer) and what to show."""
        ...

    async def answer(self, address: str, port: int, *, timeout_s: float) -> int:
        """The status that `GET /` is answered with, as soon as it is known; 0: none."""
        ...


class ProxyLink(Protocol):
    """The host's proxy as the machines see it; `agent/feed.py`."""

    async def drain(self, machine_id: str, *, deadline_s: float, load_seq: int | None = None) -> DrainResult: ...

    async def undrain(self, machine_id: str) -> None: ...


class LogSink(Protocol):
    """`logs/`: what machines and the platform say."""

    async def platform_line(self, *, app: str, machine_id: str, message: str, level: str = "info") -> None: ...

    async def collect(self, *, app: str, machine_id: str, instance_id: str) -> int:
        """Take over what the driver has kept and nobody has read yet; how many lines."""
        ...

    async def forget(self, machine_id: str, instance_id: str) -> None:
        """The runtime that was read is gone; positions of the next one begin anew."""
        ...


class Callers(Protocol):
    """Who answers what the processes of a machine ask of the platform (`agent/guest_api.py`)."""

    async def serve(self, record: MachineRecord, calls: AsyncGenerator[socket.socket]) -> None:
        """Until the calls end."""
        ...


class NoCallers:
    """Before there is one, and where nothing calls: calls wait in the machine."""

    async def serve(self, record: MachineRecord, calls: AsyncGenerator[socket.socket]) -> None:
        del record
        await calls.aclose()


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines and rhythms of the machine tasks, in seconds."""

    image_s: float = 600.0
    secrets_s: float = 30.0
    secrets_poll_s: float = 0.2
    suspend_s: float = 10.0
    launch_failed_kept_s: float = 3600.0
    prepare_s: float = 60.0
    start_s: float = 30.0
    stop_extra_s: float = 15.0
    teardown_s: float = 60.0
    drain_s: float = 30.0
    hand_over_s: float = 2.0
    retry_prepare_s: float = 30.0
    restart_scale: float = 1.0
    ready_first_s: float = 0.0005
    ready_most_s: float = 0.25
    explain_after_s: float = 3.0
    explain_nothing_s: float = 15.0
    answer_after_wake_s: float = 1.0
    answer_again_s: float = 2.0
    answer_end_s: float = 600.0
    held_s: float = 20.0
    log_poll_s: float = 0.2
    log_poll_most_s: float = 1.0


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """`node_key` opens what was sealed to this node. `nameserver` answers the machines' DNS questions. `ssh` says how
    one may log in to them; None: nobody may. `policies`: of their networks; None: there are none. `preparing`: turns of
    sleeping machines that are made ready for a wake. `seating` gives starts their CPUs; None: they may run on all."""

    node: str
    region: str
    journal: Journal
    driver: Driver
    network: Network
    images: ImageStore
    prober: Prober
    rows: RowSink
    logs: LogSink
    clock: Clock
    node_key: Opener
    pace: Pace = Pace()
    nameserver: str = "fdaa::3"
    ssh: SshDoors | None = None
    policies: Policies | None = None
    preparing: anyio.Semaphore
    seating: Seating | None = None
