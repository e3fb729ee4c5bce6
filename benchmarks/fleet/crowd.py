"""The process of all hosts but one: fills the database as if every machine had been created, then answers for them.

`python -m benchmarks.fleet.crowd SETUP`; prints `ready` when the server may start.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import anyio
import msgspec
from sqlalchemy import Connection, insert, select

from benchmarks.fleet import plan
from pantala.catalogue import Publisher, View
from pantala.catalogue.store import CatalogueStore
from pantala.client.node import NodeClient
from pantala.kit import bus_nats, ids
from pantala.kit.bus import Bus
from pantala.kit.clock import SystemClock
from pantala.kit.rows import Row
from pantala.kit.sealing import Signer
from pantala.store import apps as statements
from pantala.store.database import open_database
from pantala.store.schema import apps, orgs, placements
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.fake_registry import image_digest
from pantala.testing.platform import FakeSightings
from pantala.wire import node as wire
from pantala.wire.machine import Guest, ImageRef, Machine, MachineConfig

CREATED_AT_ONCE = 32
MEMORY_MIB, CPUS = 1 << 20, 1024


def config(app: str) -> MachineConfig:
    guest = Guest(cpu_kind="shared", cpus=1, memory_mb=256)
    env = {"PRIMARY_REGION": "iad", "LOG_LEVEL": "info"}
    return MachineConfig(image=f"{plan.REGISTRY}/{app}:v1", guest=guest, env=env, metadata={"fly_process_group": "app"})


def _create(place: plan.Place, machine_id: str, app_id: int, name: str) -> wire.CreateMachine:
    image = f"{plan.REGISTRY}/{place.app}:v1"
    return wire.CreateMachine(
        request_id=f"create-{machine_id}",
        machine_id=machine_id,
        generation=1,
        app=wire.AppRef(id=str(app_id), name=place.app, org=plan.org_of(place.app), network=app_id),
        name=name,
        region=place.region,
        config=config(place.app),
        image=ImageRef(registry=plan.REGISTRY, repository=place.app, tag="v1", digest=image_digest(image)),
    )


class _Host:
    """One of the crowd: its machines, and what it says of them."""

    def __init__(self, agent: FakeAgent, publisher: Publisher, sightings: FakeSightings) -> None:
        self.agent = agent
        self.publisher = publisher
        self._sightings = sightings

    def rows(self) -> list[Row]:
        return [self._node(), *(self._machine(machine_id) for machine_id in self.agent.machines)]

    async def answer(self, subject: str, payload: bytes) -> bytes | None:
        reply = await self.agent.handle(subject, payload)
        request = self.agent.calls.pop()
        if isinstance(request, wire.MUTATIONS) and (machine_id := getattr(request, "machine_id", "")):
            await self.publisher.put([self._node(), self._machine(machine_id)])
        return reply

    def _node(self) -> Row:
        return Row("nodes", f"node/{self.agent.node}", msgspec.to_builtins(self._sightings.node(self.agent.node)))

    def _machine(self, machine_id: str) -> Row:
        row = self.agent.row(machine_id)
        return Row("routes", f"m/{machine_id}", None if row is None else msgspec.to_builtins(row))


async def main(setup: plan.Setup) -> None:
    clock, sightings = SystemClock(), FakeSightings(SystemClock())
    async with (
        bus_nats.connect(setup.bus) as bus,
        CatalogueStore.open(setup.folder / "crowd.db") as store,
        anyio.create_task_group() as tasks,
    ):
        hosts: dict[str, _Host] = {}
        for node, region in plan.nodes()[1:]:
            agent = FakeAgent(
                bus, node, region=region, zone=node, isolation="vm", memory_mib=MEMORY_MIB, cpus=CPUS, clock=clock
            )
            signer = Signer(bytes.fromhex(setup.seeds[node]))
            view = View(control="control")
            publisher = Publisher(store, view, bus, signer, clock, owner=node, epoch=1)
            await publisher.open()
            sightings.add(agent)
            hosts[node] = _Host(agent, publisher, sightings)
        await _fill(setup, bus, {node: host.agent for node, host in hosts.items()})
        for node, host in hosts.items():
            await host.publisher.replace_all(host.rows())
            await bus.serve(f"pantala.node.{node}.call", host.answer)
            await tasks.start(host.publisher.run)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await anyio.sleep_forever()


async def _fill(setup: plan.Setup, bus: Bus, agents: dict[str, FakeAgent]) -> None:
    """Machines on their hosts, and the rows that control would have written."""
    db = open_database(setup.folder / "state" / "control.db")
    now_ms = time.time_ns() // 1_000_000
    places = list(plan.places())
    try:
        app_ids = await db.write(lambda c: _apps(c, list(dict.fromkeys(place.app for place in places)), now_ms))
        real, limiter = NodeClient(bus), anyio.CapacityLimiter(CREATED_AT_ONCE)
        rows: list[dict[str, object]] = []

        async def one(number: int, place: plan.Place) -> None:
            create = _create(place, f"{number:014x}", app_ids[place.app], ids.generated_name() + f"-{number}")
            if place.node in agents:
                reply = await agents[place.node].handle("", msgspec.json.encode(create))
                agents[place.node].calls.clear()
                assert reply is not None
                machine = msgspec.convert(msgspec.json.decode(reply)["result"], Machine)
            else:
                async with limiter:
                    machine = await real.call(place.node, create, timeout_s=60)
            rows.append(_placement(create, machine, place, app_ids[place.app], now_ms))

        async with anyio.create_task_group() as tasks:
            for number, place in enumerate(places, start=1):
                if place.node in agents:
                    await one(number, place)
                else:
                    tasks.start_soon(one, number, place)
        for start in range(0, len(rows), 5_000):
            batch = rows[start : start + 5_000]
            await db.write(lambda c, batch=batch: c.execute(insert(placements), batch))
    finally:
        db.close()


def _apps(connection: Connection, names: list[str], now_ms: int) -> dict[str, int]:
    known = {row.slug: row.id for row in connection.execute(select(orgs))}
    for slug in dict.fromkeys(plan.org_of(name) for name in names):
        if slug not in known:
            made = connection.execute(insert(orgs).values(slug=slug, name=slug, created_at_ms=now_ms))
            known[slug] = int((made.inserted_primary_key or (0,))[0])
    for name in names:
        org_id = known[plan.org_of(name)]
        network_id = statements.ensure_network(connection, org_id=org_id, name="default")
        statements.insert_app(connection, name=name, org_id=org_id, network_id=network_id, role="", now_ms=now_ms)
    return {row.name: row.id for row in connection.execute(select(apps))}


def _placement(
    create: wire.CreateMachine, machine: Machine, place: plan.Place, app_id: int, now_ms: int
) -> dict[str, object]:
    return {
        "machine_id": machine.id,
        "app_id": app_id,
        "name": create.name,
        "node": place.node,
        "region": place.region,
        "generation": 1,
        "phase": "placed",
        "tombstone": False,
        "boot": "bench",
        "config": msgspec.json.encode(create.config).decode(),
        "snapshot": msgspec.json.encode(machine).decode(),
        "created_at_ms": now_ms,
        "updated_at_ms": now_ms,
    }


if __name__ == "__main__":
    document = msgspec.json.decode(
        Path(sys.argv[1]).read_bytes(), type=plan.Setup, dec_hook=lambda kind, value: kind(value)
    )
    anyio.run(main, document, backend_options={"use_uvloop": True})
