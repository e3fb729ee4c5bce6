"""A whole control plane in memory: real store and API, fake agents, registry and builder.

    async with running(tmp_path) as platform:
        answer = await platform.http.post("/v1/apps", json=…, headers=platform.auth)

`serve_http` puts the same application on a loopback port, for clients that bring their own connection.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import httpx2
from sqlalchemy import event

from pantala.control.context import ControlSettings
from pantala.control.dns_lookup import Lookup
from pantala.control.keys import ClusterKey
from pantala.control.ports import Objects
from pantala.control.service import Control, make_context
from pantala.kit.clock import Clock, SystemClock
from pantala.kit.rows import Row, RowSink
from pantala.kit.sealing import Signer
from pantala.kit.secret import Secret
from pantala.server.app import make_app
from pantala.server.http import HttpServer
from pantala.server.limits import RateLimits
from pantala.store.database import Database, open_database, sqlite_engine
from pantala.testing.bus import MemoryBus
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.fake_registry import FakeRegistry, image_digest
from pantala.testing.host_keys import HostKeys
from pantala.wire.api import BuildEvent, BuildOptions
from pantala.wire.certificates import DnsRecords
from pantala.wire.feed import MachineRow, NodeRow
from pantala.wire.hosts import CONTROL_CALL

SETTINGS = ControlSettings(
    app_domain="apps.pantala.test",
    platform_domain="pantala.test",
    registry="registry.pantala.test",
    default_region="iad",
    regions=("iad", "lhr"),
    api_backend="192.0.2.1:4280",
    registry_backend="192.0.2.1:5000",
    shared_kernel=True,
)


class RowTable:
    """A RowSink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.puts = 0

    async def put(self, rows: Sequence[Row]) -> int:
        for row in rows:
            if row.value is None:
                self.rows.pop(row.key, None)
            else:
                self.rows[row.key] = row.value
        self.puts += 1
        return self.puts

    async def replace_all(self, rows: Sequence[Row]) -> int:
        self.rows.clear()
        return await self.put(rows)


class FakeSightings:
    """Fake agents as the catalogue would show them: at once, and a silent one as not heard for a minute. `told` is what
    stays in the view of an agent that says no more (`frozen`)."""

    def __init__(self, clock: Clock) -> None:
        self.agents: dict[str, FakeAgent] = {}
        self.frozen: dict[str, NodeRow] = {}
        self._clock = clock
        self._listeners: list[Callable[[str], None]] = []

    def add(self, agent: FakeAgent) -> None:
        self.agents[agent.node] = agent
        agent.on_change = lambda: self.tell(agent.node)
        self.tell(agent.node)

    def tell(self, node_id: str) -> None:
        for listener in self._listeners:
            listener(node_id)

    def freeze(self, node_id: str) -> None:
        """From now on its row says nothing new."""
        row = self.node(node_id)
        assert row is not None
        self.frozen[node_id] = row
        self.agents[node_id].on_change = lambda: None

    def node(self, node_id: str) -> NodeRow | None:
        agent = self.agents.get(node_id)
        if agent is None or node_id in self.frozen:
            return self.frozen.get(node_id)
        info = agent.info()
        return NodeRow(
            id=info.id,
            region=info.region,
            zone=info.zone,
            address="",
            verify_key="",
            sealing_key=info.sealing_key,
            cpus=info.cpus,
            memory_mib=info.memory_mib,
            cpus_free=info.cpus_free,
            memory_mib_free=info.memory_mib_free,
            version=info.version,
            disk_mib_free=info.disk_mib_free,
            driver=info.driver,
            isolation=info.isolation,
        )

    def machine(self, machine_id: str) -> MachineRow | None:
        shown = [row for agent in self.agents.values() if (row := agent.row(machine_id)) is not None]
        return max(shown, key=lambda row: row.generation, default=None)

    def heard_at(self, node_id: str) -> float | None:
        agent = self.agents.get(node_id)
        if agent is None:
            return None
        return self._clock.monotonic() - (60.0 if agent.silent else 0.0)

    def ahead_ms(self, node_id: str) -> int | None:
        agent = self.agents.get(node_id)
        return None if agent is None else agent.now_ms() - int(self._clock.monotonic() * 1000)

    def listen(self, on_change: Callable[[str], None]) -> None:
        self._listeners.append(on_change)


class FakeDns:
    """Public DNS as a test says it is; names that it does not say do not exist."""

    def __init__(self) -> None:
        self.known: dict[str, DnsRecords] = {}
        self.asked: list[str] = []

    def says(self, hostname: str, **records: Any) -> None:
        """`a` and `aaaa` are what it resolves to."""
        records.setdefault("resolved_addresses", sorted([*records.get("a", ()), *records.get("aaaa", ())]))
        self.known[hostname] = DnsRecords(**records)

    async def records(self, hostname: str) -> DnsRecords:
        self.asked.append(hostname)
        return self.known.get(hostname, DnsRecords())


class FakeBuilder:
    """Says which files it saw, and is done at once."""

    def __init__(self) -> None:
        self.contexts: list[list[str]] = []
        self.options: list[BuildOptions] = []
        self.push_tokens: list[str] = []

    async def build(
        self, *, app: str, context_dir: Path, options: BuildOptions, image: str, push_token: Secret
    ) -> AsyncIterator[BuildEvent]:
        found = sorted(str(path.relative_to(context_dir)) for path in context_dir.rglob("*"))
        self.contexts.append(found)
        self.options.append(options)
        self.push_tokens.append(push_token.reveal())
        yield BuildEvent(type="step", text=f"building {app} with {options.dockerfile}")
        yield BuildEvent(type="done", image=image, digest=image_digest(image))


class TestPlatform:
    __test__ = False

    def __init__(self, control: Control, bus: MemoryBus, db: Database, sightings: FakeSightings) -> None:
        self.control = control
        self.sightings = sightings
        self.bus = bus
        self.db = db
        self.rows = RowTable()
        self.registry = FakeRegistry()
        self.builder = FakeBuilder()
        self.agents: dict[str, FakeAgent] = {}
        self.token = ""

    @property
    def auth(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    http: httpx2.AsyncClient

    async def add_agent(self, node: str, *, region: str = "iad", **more: Any) -> FakeAgent:
        agent = FakeAgent(self.bus, node, region=region, clock=self.control.context.clock, **more)
        await agent.serve()
        address = f"10.0.0.{len(self.agents) + 1}"
        keys = HostKeys(sealing=agent.opener)
        await self.control.hosts.admit_first(keys.request(node=node, region=region, zone=agent.zone, address=address))
        self.agents[node] = agent
        self.sightings.add(agent)
        return agent

    async def admin(self, email: str, org: str) -> dict[str, str]:
        """Headers of another org's admin."""
        made = await self.control.accounts.bootstrap(email=email, org=org)
        return {"authorization": f"Bearer {made.token}"}

    async def create_app(self, name: str, *, org: str = "acme") -> None:
        body = {"app_name": name, "org_slug": org}
        (await self.http.post("/v1/apps", json=body, headers=self.auth)).raise_for_status()

    async def create_machine(self, app: str, **more: Any) -> dict[str, Any]:
        body = {"config": {"image": f"registry.pantala.test/{app}:v1"}} | more
        answer = await self.http.post(f"/v1/apps/{app}/machines", json=body, headers=self.auth)
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document


@cache
def _migrated() -> bytes:
    """A database of the newest schema: migrations are a third of a platform's start, and the same each time."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "control.db"
        open_database(path).close()
        return path.read_bytes()


def _database(path: Path) -> Database:
    """What `open_database` would open, but that nothing waits for the disk: no test here cuts the power."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_migrated())
        path.chmod(0o600)
    engine = sqlite_engine(path)

    @event.listens_for(engine, "connect")
    def hurry(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.execute("PRAGMA synchronous=OFF").close()

    return Database(engine, path.parent)


@asynccontextmanager
async def running(
    folder: Path,
    *,
    clock: Clock | None = None,
    settings: ControlSettings = SETTINGS,
    bus: MemoryBus | None = None,
    lookup: Lookup | None = None,
    rows: RowTable | None = None,
    sink: RowSink | None = None,
    admits: bool = True,
    objects: Objects | None = None,
) -> AsyncGenerator[TestPlatform]:
    """One agent (`node-1` in iad), the org `acme` with an admin whose token is `platform.token`. `sink`: where rows of
    control go instead of `rows`; `objects`: a store for files of apps. `admits` False: a further life over the same
    folder, without the node."""
    clock = clock or SystemClock()
    bus = bus or MemoryBus()
    db = _database(folder / "control.db")
    try:
        context = make_context(
            db=db, bus=bus, clock=clock, key=ClusterKey.load(folder / "cluster.key"), settings=settings
        )
        rows, registry, builder = rows or RowTable(), FakeRegistry(), FakeBuilder()
        sightings = FakeSightings(clock)
        control = Control(
            context,
            sink=sink or rows,
            registry=registry,
            builder=builder,
            objects=objects,
            state_dir=folder,
            sightings=sightings,
            lookup=lookup or FakeDns(),
            control_key=Signer(b"c" * 32).verify_key,
        )
        platform = TestPlatform(control, bus, db, sightings)
        platform.rows, platform.registry, platform.builder = rows, registry, builder
        await bus.serve(CONTROL_CALL, control.calls.handle)
        if admits:
            await platform.add_agent("node-1")
        platform.token = (await control.accounts.bootstrap(email="ada@example.com", org="acme")).token
        app = make_app(control, RateLimits(clock, per_s=1000, burst=10_000))
        transport = httpx2.ASGITransport(app=app)  # pyright: ignore[reportArgumentType]
        async with httpx2.AsyncClient(transport=transport, base_url="http://api.pantala.test") as http:
            platform.http = http
            yield platform
    finally:
        db.close()


@asynccontextmanager
async def serve_http(platform: TestPlatform, *, per_s: float = 1000, burst: int = 10_000) -> AsyncGenerator[str]:
    """The base URL of the same API on a loopback port."""
    app = make_app(platform.control, RateLimits(platform.control.context.clock, per_s=per_s, burst=burst))
    server = HttpServer(app, "127.0.0.1", 0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run_until_stopped)
        host, port = server.address
        try:
            yield f"http://{host}:{port}"
        finally:
            server.stop(now=True)
