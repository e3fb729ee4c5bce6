"""The rest of a host in memory: images, network, probes, a sink of rows. They outlive the agent."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec

from pantala.domain.policies import Allowed
from pantala.domain.runtime import ImageConfig, ListenSocket, NetworkHandle, NetworkPlan, UnpackedImage
from pantala.errors import NotFound, PantalaError
from pantala.kit.clock import Clock
from pantala.kit.rows import Row
from pantala.testing.driver import ScriptedDriver
from pantala.wire.machine import ImageRef


class FakeImages:
    """Every image exists but those in `missing`; `hold` makes pulls wait until it is set."""

    def __init__(self) -> None:
        self.config = ImageConfig(entrypoint=("/bin/app",), cmd=("serve",), env={"FROM_IMAGE": "1"})
        self.missing: set[str] = set()
        self.hold: anyio.Event | None = None
        self.have: dict[str, UnpackedImage] = {}

    async def ensure(self, image: ImageRef, *, pull_token: str) -> UnpackedImage:
        await anyio.lowlevel.checkpoint()
        if self.hold is not None:
            await self.hold.wait()
        if image.repository in self.missing:
            raise NotFound(f"there is no image {image.repository}")
        digest = image.digest or f"sha256:{image.repository}:{image.tag}"
        return self.have.setdefault(
            digest, UnpackedImage(digest=digest, layers=(Path("/layers") / digest,), config=self.config)
        )

    async def find(self, digest: str) -> UnpackedImage | None:
        return self.have.get(digest)

    async def prune(self, keep: set[str]) -> list[str]:
        gone = [digest for digest in self.have if digest not in keep]
        for digest in gone:
            del self.have[digest]
        return gone

    async def run(self, clock: Clock) -> None:
        del clock
        await anyio.sleep_forever()


class FakeNetwork:
    """`failures` are raised by as many calls of `police`."""

    def __init__(self, driver: ScriptedDriver) -> None:
        self._driver = driver
        self.failures: builtins.list[PantalaError] = []
        self.plans: dict[str, NetworkPlan] = {}

    async def setup(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def ensure(self, plan: NetworkPlan) -> NetworkHandle:
        await anyio.lowlevel.checkpoint()
        clash = [p.machine_id for p in self.plans.values() if p.slot == plan.slot and p.machine_id != plan.machine_id]
        assert not clash, f"slot {plan.slot} is used by {clash}"
        self.plans[plan.machine_id] = plan
        await anyio.lowlevel.checkpoint()
        return NetworkHandle(netns=Path("/netns") / plan.machine_id, ip4=plan.ip4, ip6=plan.ip6)

    async def police(self, wanted: Mapping[str, Allowed]) -> None:
        await anyio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop()
        for machine_id in wanted.keys() & self.plans.keys():
            self.plans[machine_id] = msgspec.structs.replace(self.plans[machine_id], allowed=wanted[machine_id])

    async def remove(self, machine_id: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.plans.pop(machine_id, None)

    async def teardown(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.plans.clear()

    async def list(self) -> builtins.list[str]:
        return sorted(self.plans)

    async def listening(self, machine_id: str) -> builtins.list[ListenSocket]:
        return self._driver.listening(machine_id)

    def machine_at(self, ip4: str) -> str | None:
        return next((p.machine_id for p in self.plans.values() if p.ip4 == ip4), None)


class FakeProber:
    """Answers as the scripted machine behind an address would; `http_status` for those that accept. `asked` are the
    ports of which an answer was asked. While it `is_shut` no port accepts."""

    def __init__(self, driver: ScriptedDriver, network: FakeNetwork) -> None:
        self._driver = driver
        self._network = network
        self.http_status = 200
        self.is_shut = False
        self.asked: list[int] = []

    async def tcp(self, address: str, port: int, *, timeout_s: float) -> str:
        await anyio.lowlevel.checkpoint()
        machine_id = self._network.machine_at(address)
        if machine_id is not None and not self.is_shut and self._driver.accepts(machine_id, port):
            return ""
        return f"connection refused by {address}:{port}"

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
        refused = await self.tcp(address, port, timeout_s=timeout_s)
        return (0, refused) if refused else (self.http_status, f"{self.http_status} from {path}")

    async def answer(self, address: str, port: int, *, timeout_s: float) -> int:
        refused = await self.tcp(address, port, timeout_s=timeout_s)
        self.asked.append(port)
        return 0 if refused else self.http_status


class RowList:
    """A RowSink that keeps the newest value of each row, and every step in order."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, object]] = {}
        self.steps: list[Row] = []

    async def put(self, rows: Sequence[Row]) -> int:
        for row in rows:
            self.steps.append(row)
            if row.value is None:
                self.rows.pop((row.stream, row.key), None)
            else:
                self.rows[row.stream, row.key] = row.value
        return len(self.steps)

    async def replace_all(self, rows: Sequence[Row]) -> int:
        keep = {(row.stream, row.key) for row in rows}
        gone = [Row(stream, key, None) for stream, key in self.rows if (stream, key) not in keep]
        return await self.put([*gone, *rows])
