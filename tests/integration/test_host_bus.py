"""The bus of five hosts for real: three hubs, two leaves, users and certificates as control makes them."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import anyio
import pytest

from pantala.control.bus_accounts import BusAccounts
from pantala.control.cluster_authority import ClusterAuthority
from pantala.errors import NodeUnreachable
from pantala.host.identity import join_request, keep
from pantala.host.place import LEAVES_PORT, ROUTES_PORT, Place
from pantala.host.settings import write_bus
from pantala.kit import binaries
from pantala.kit.bus_nats import NatsBus, connect
from pantala.kit.clock import SystemClock
from pantala.testing.poll import until
from pantala.wire.hosts import BusAccess, Joined

pytestmark = pytest.mark.anyio

HOSTS = {f"iad-{number}": f"127.0.77.{number}" for number in range(1, 6)}
HUBS = list(HOSTS.values())[:3]
WITHIN_S = 15.0


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accounts = BusAccounts(folder / "bus", SystemClock())
        self.authority = ClusterAuthority(folder / "ca", SystemClock())
        self.places: dict[str, Place] = {}
        self.servers: dict[str, subprocess.Popen[bytes]] = {}

    def join(self, node: str, address: str, *, authority: ClusterAuthority | None = None) -> None:
        place = Place(
            state=str(self.folder / node), run=str(self.folder / "run"), logs=str(self.folder), address=address
        )
        request = join_request(place, region="iad", node=node)
        certificate, _ = (authority or self.authority).sign(request.csr_pem, node, address)
        joined = Joined(
            node=node,
            region="iad",
            zone="",
            epoch=1,
            certificate_pem=certificate,
            authority_pem=self.authority.certificate_pem,
            control_key="",
            edge_key_sealed="",
            bus=BusAccess(
                user_jwt=self.accounts.node_jwt(
                    bus_key=request.bus_key, node=node, region="iad", lives=timedelta(days=1)
                ),
                operator_jwt=self.accounts.operator_jwt(),
                accounts=self.accounts.accounts([]),
                system_account=self.accounts.system_account,
                hubs=[f"{hub}:{LEAVES_PORT}" for hub in HUBS],
                routes=[f"{hub}:{ROUTES_PORT}" for hub in HUBS],
                hub=address in HUBS,
            ),
            registries={},
            api_backend="",
            app_domain="",
            platform_domain="",
            edge_addresses=[],
            closed_addresses=[],
            members=[],
        )
        keep(place, joined)
        write_bus(place, joined)
        self.places[node] = place

    def start(self, node: str) -> None:
        command = [str(binaries.find("nats-server")), "-c", str(self.places[node].bus_settings)]
        with (self.folder / f"{node}.log").open("ab") as log:
            self.servers[node] = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self, node: str) -> None:
        server = self.servers.pop(node)
        server.kill()
        server.wait(timeout=WITHIN_S)

    @asynccontextmanager
    async def bus(self, node: str, *, through: str = "") -> AsyncGenerator[NatsBus]:
        """As the agent of `node`, at its own nats-server or another host's."""
        place = self.places[node]
        url = self.places[through or node].bus_url
        async with connect(
            url, credentials=str(place.identity("bus.creds")), inbox=node, name=node, wait_s=WITHIN_S
        ) as bus:
            yield bus


@pytest.fixture
def cluster(tmp_path: Path) -> Generator[Cluster]:
    made = Cluster(tmp_path)
    try:
        for node, address in HOSTS.items():
            made.join(node, address)
            made.start(node)
        yield made
    finally:
        for node in list(made.servers):
            made.stop(node)


async def serve(bus: NatsBus, node: str) -> None:
    async def answer(subject: str, payload: bytes) -> bytes:
        assert subject == f"pantala.node.{node}.call"
        return node.encode() + b" " + payload

    await bus.serve(f"pantala.node.{node}.call", answer)


async def asked(bus: NatsBus, node: str) -> bytes:
    try:
        return await bus.request(f"pantala.node.{node}.call", b"hello", timeout_s=0.5)
    except NodeUnreachable:
        return b""


async def refusals(cluster: Cluster) -> list[str]:
    """What the hubs' logs say of leaves whose certificate they do not take."""
    lines = [line for node in list(HOSTS)[:3] for line in (cluster.folder / f"{node}.log").read_text().splitlines()]
    return [line for line in lines if "TLS leafnode handshake error" in line]


async def test_control_reaches_hubs_and_leaves_and_goes_on_when_a_hub_dies(cluster: Cluster) -> None:
    control = str(cluster.accounts.credentials)
    async with (
        connect(cluster.places["iad-1"].bus_url, credentials=control, name="control", wait_s=WITHIN_S) as bus,
        cluster.bus("iad-2") as hub,
        cluster.bus("iad-5") as leaf,
    ):
        await serve(hub, "iad-2")
        await serve(leaf, "iad-5")
        for node in ("iad-2", "iad-5"):
            await until(partial(asked, bus, node), f"{node} hello".encode().__eq__, within_s=WITHIN_S)
        for dead in ("iad-2", "iad-3"):
            cluster.stop(dead)
        await until(partial(asked, bus, "iad-5"), b"iad-5 hello".__eq__, within_s=WITHIN_S)


async def test_a_host_speaks_as_itself_only_whatever_server_it_speaks_through(cluster: Cluster) -> None:
    heard: list[tuple[str, bytes]] = []

    async def listen(subject: str, payload: bytes) -> None:
        heard.append((subject, payload))

    async with cluster.bus("iad-1") as reader, cluster.bus("iad-4") as leaf:
        await reader.serve("pantala.cat.>", listen)

        async def told() -> set[str]:
            await leaf.publish("pantala.cat.iad-1.routes", b"forged")
            await leaf.publish("pantala.cat.iad-4.routes", b"own")
            await anyio.lowlevel.checkpoint()
            return {subject for subject, _ in heard}

        await until(told, bool, within_s=WITHIN_S)
        assert {subject for subject, _ in heard} == {"pantala.cat.iad-4.routes"}


async def test_a_server_with_a_certificate_of_another_authority_gets_no_words(cluster: Cluster) -> None:
    cluster.stop("iad-5")
    cluster.join("iad-5", HOSTS["iad-5"], authority=ClusterAuthority(cluster.folder / "other", SystemClock()))
    cluster.start("iad-5")
    await until(partial(refusals, cluster), bool, within_s=WITHIN_S)
    async with cluster.bus("iad-1") as reader, cluster.bus("iad-4") as leaf, cluster.bus("iad-5") as stranger:
        heard: set[str] = set()

        async def listen(subject: str, payload: bytes) -> None:
            assert payload
            heard.add(subject)

        await reader.serve("pantala.cat.>", listen)

        async def told() -> set[str]:
            await stranger.publish("pantala.cat.iad-5.routes", b"stranger")
            await leaf.publish("pantala.cat.iad-4.routes", b"leaf")
            return heard

        await until(told, lambda subjects: "pantala.cat.iad-4.routes" in subjects, within_s=WITHIN_S)
        assert heard == {"pantala.cat.iad-4.routes"}
