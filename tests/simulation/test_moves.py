"""A control plane and six hosts in virtual time: machines are made and destroyed, hosts drained, silenced and lost,
while calls, answers and the control plane itself get lost. In the end every live machine runs exactly once.

Seeded: a run that fails names its seed. `PANTALA_SIMULATION_RUNS` sets how many (40 by default).
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path

import pytest
from sqlalchemy import select

from pantala.auth.grants import Principal
from pantala.control.keys import ClusterKey
from pantala.control.moves import LEASE_TTL_S
from pantala.control.service import Control, make_context
from pantala.domain.machine import TERMINAL
from pantala.errors import PantalaError
from pantala.kit.sealing import Signer
from pantala.store import hosts, moves
from pantala.store.database import open_database
from pantala.store.records import MoveRecord, PlacementRecord, many
from pantala.store.schema import placements
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.fake_registry import FakeRegistry
from pantala.testing.faults import FastClock, Faults, FaultyBus, FaultyDatabase, Killed
from pantala.testing.host_keys import HostKeys
from pantala.testing.platform import SETTINGS, FakeBuilder, FakeSightings, RowTable
from pantala.wire.api import CreateAppRequest, LaunchMachineRequest
from pantala.wire.machine import MachineConfig

pytestmark = pytest.mark.anyio

RUNS = int(os.environ.get("PANTALA_SIMULATION_RUNS", "40"))
GROUPS = 4
STEPS = 60
REGIONS = {"iad-1": "iad", "iad-2": "iad", "iad-3": "iad", "lhr-1": "lhr", "lhr-2": "lhr", "nrt-1": "nrt"}
ALLOWED = ("iad", "lhr")
MAY_BE_LOST = ("iad-1", "iad-2", "lhr-1")
"""Each region keeps a host."""
IMAGE = "registry.pantala.test/web:v1"


class Simulation:
    def __init__(self, folder: Path, seed: int) -> None:
        self.dice = random.Random(seed)
        self.faults = Faults(self.dice)
        self.clock = FastClock()
        self.bus = FaultyBus(self.faults)
        self.folder = folder
        self.real_db = open_database(folder / "control.db")
        self.db = FaultyDatabase(self.real_db, self.faults)
        self.sightings = FakeSightings(self.clock)
        self.agents: dict[str, FakeAgent] = {}
        self.lost: set[str] = set()
        self.seen: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        self.control = self.new_life()
        self.principal: Principal

    def new_life(self) -> Control:
        context = make_context(
            db=self.db,
            bus=self.bus,
            clock=self.clock,
            key=ClusterKey.load(self.folder / "cluster.key"),
            settings=SETTINGS,
        )
        return Control(
            context,
            sink=RowTable(),
            registry=FakeRegistry(),
            builder=FakeBuilder(),
            state_dir=self.folder,
            sightings=self.sightings,
            control_key=Signer(b"c" * 32).verify_key,
        )

    async def set_up(self) -> None:
        shares = self.faults.lost_call, self.faults.lost_answer, self.faults.killed
        self.faults.heal()
        for number, (node, region) in enumerate(REGIONS.items(), start=1):
            agent = FakeAgent(self.bus, node, region=region, clock=self.clock, memory_mib=1024)
            await agent.serve()
            keys = HostKeys(sealing=agent.opener)
            request = keys.request(node=node, region=region, zone=node, address=f"10.0.0.{number}")
            await self.control.hosts.admit_first(request)
            self.agents[node] = agent
            self.sightings.add(agent)
        token = (await self.control.accounts.bootstrap(email="ada@example.com", org="acme")).token
        self.principal = await self.control.access.principal_of([token])
        await self.control.apps.create(self.principal, CreateAppRequest(app_name="web", org_slug="acme"))
        self.faults.lost_call, self.faults.lost_answer, self.faults.killed = shares

    async def survive(self, work: Awaitable[object]) -> None:
        """A refusal is an answer; a death is followed by another life."""
        try:
            await work
        except* PantalaError:
            pass
        except* Killed:
            self.control = self.new_life()
        self.look()

    def look(self) -> None:
        """What must hold at every moment."""
        for node, agent in self.agents.items():
            for machine in agent.machines.values():
                self.seen[machine.id, machine.generation].add(node)
                assert agent.region in ALLOWED, f"{machine.id} is in {agent.region}"
        for (machine_id, generation), nodes in self.seen.items():
            assert len(nodes) == 1, f"{machine_id} has generation {generation} on {nodes}"

    async def step(self) -> None:
        what = self.dice.choice(
            ["create"] * 2 + ["destroy", "drain", "undrain", "lose", "hush"] + ["moves"] * 8 + ["sweep"] * 2
        )
        node = self.dice.choice(sorted(REGIONS))
        departures, principal = self.control.departures, self.principal
        match what:
            case "create":
                config = MachineConfig(image=IMAGE)
                request = LaunchMachineRequest(config=config, region=self.dice.choice(["iad", "lhr", "iad,lhr"]))
                await self.survive(self.control.machines.create(principal, "web", request, {"image": IMAGE}))
            case "destroy":
                live = [p for p in await self.placements() if not p.tombstone and p.snapshot]
                if live:
                    machine_id = self.dice.choice(live).machine_id
                    force = self.control.machines.destroy(principal, "web", machine_id, force=True, nonce="")
                    await self.survive(force)
            case "drain" | "undrain":
                await self.survive(departures.drain(principal, node, undo=what == "undrain"))
            case "lose" if node in MAY_BE_LOST and len(self.lost) < 2:
                self.agents[node].silent = True
                await self.survive(departures.lose(principal, node))
                self.lost = await self.gone()
            case "hush":
                if node not in self.lost:
                    self.agents[node].silent = not self.agents[node].silent
            case "sweep":
                await self.survive(self.control.sweep.cycle())
            case _:
                self.clock.advance(self.dice.choice([1, 1, 5, 20]))
                await self.survive(self.control.moves.cycle())

    async def gone(self) -> set[str]:
        nodes = await self.real_db.read(hosts.list_all_nodes)
        return {node.id for node in nodes if node.status == "lost"}

    async def placements(self) -> list[PlacementRecord]:
        return await self.real_db.read(lambda c: many(c, select(placements), PlacementRecord))

    async def moves(self) -> list[MoveRecord]:
        return await self.real_db.read(moves.list_moves)

    async def settle(self) -> None:
        """No more faults: a few more cycles, and everything is in its place."""
        self.faults.heal()
        self.lost = await self.gone()
        for node, agent in self.agents.items():
            agent.silent = node in self.lost
            agent.memory_mib = 64 * 1024
            agent.on_change()
            if node not in self.lost:
                await self.control.departures.drain(self.principal, node, undo=True)
        for _ in range(60):
            self.clock.advance(30)
            await self.control.sweep.cycle()
            await self.control.moves.cycle()
            await self.control.projection.list_machines(
                self.principal, "web", regions=frozenset(), states=frozenset(), metadata={}, include_deleted=False
            )  # a machine that was destroyed while the process died is buried when it is next looked at
            if not await self.moves():
                draining = [p for p in await self.placements() if not p.tombstone and p.node in self.lost]
                if not draining:
                    return

    async def check(self) -> None:
        assert not await self.moves()
        wanted: dict[str, str] = {p.machine_id: p.node for p in await self.placements() if not p.tombstone}
        there: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for node, agent in self.agents.items():
            if node in self.lost:
                continue
            for machine in agent.machines.values():
                if machine.state not in TERMINAL:
                    there[machine.id].append((node, machine.state.value))
                    assert not machine.hidden
                    if machine.lease is not None:  # whose release was lost ends by itself
                        assert machine.lease.expires_at - self.clock.now().timestamp() <= LEASE_TTL_S
        assert there == {machine_id: [(node, "started")] for machine_id, node in wanted.items()}


@pytest.mark.parametrize("group", range(GROUPS))
async def test_every_live_machine_runs_exactly_once_in_the_end(tmp_path: Path, group: int) -> None:
    for number in range(RUNS // GROUPS):
        seed = group * 1_000_003 + number
        folder = tmp_path / str(number)
        folder.mkdir()
        simulation = Simulation(folder, seed)
        try:
            await simulation.set_up()
            for _ in range(STEPS):
                await simulation.step()
            await simulation.settle()
            await simulation.check()
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        finally:
            simulation.real_db.close()
