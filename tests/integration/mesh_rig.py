"""Several real proxies as one cluster on loopback: each with a fake agent, an address, a node and a region of its own,
the same ports, and certificates that the test's authority made. Rows go to all agents, as the catalogue would bring
them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from proxy_rig import (
    WITHIN_S,
    Backend,
    Handler,
    Ports,
    Request,
    Rig,
    answer,
    app_rows,
    machine_row,
    row,
    say_name,
    service_row,
)

from pantala.testing.authority import Authority
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import FeedRow, MemberRow, MeshSettings, NodeRow, ProxyFrame, Wake, WakeResult

HOST = "web.apps.test"
NAME_OF_NODES = "node.pantala.internal"


def node_row(node: str, region: str, mesh: str) -> FeedRow:
    value = NodeRow(
        id=node,
        region=region,
        zone="a",
        address=mesh.split(":", maxsplit=1)[0],
        verify_key="",
        sealing_key="",
        cpus=2,
        memory_mib=1024,
        cpus_free=2,
        memory_mib_free=1024,
        version="0",
        mesh=mesh,
    )
    return row("nodes", f"node/{node}", value)


def member_row(node: str, region: str) -> FeedRow:
    value = MemberRow(id=node, region=region, zone="a", address="", verify_key="", sealing_key="", edge=True)
    return row("nodes", f"member/{node}", value)


class Host:
    """One host of the cluster: its proxy, and where its machines are."""

    def __init__(self, folder: Path, number: int, region: str, ports: Ports, mesh_port: int, **settings: Any) -> None:
        folder.mkdir()
        self.folder = folder
        self.node, self.region = f"n{number}", region
        self.address = f"127.0.1.{number}"
        self.mesh = f"{self.address}:{mesh_port}"
        self.machines = f"127.0.3.{number}"
        mesh = MeshSettings(
            listen=self.mesh,
            certificate=str(folder / "node.pem"),
            key=str(folder / "node.key"),
            authority=str(folder / "authority.pem"),
            **settings.pop("mesh", {}),
        )
        self.rig = Rig(
            folder, node=self.node, region=region, address=self.address, ports=ports, **{"mesh": mesh, **settings}
        )

    def certify(self, authority: Authority, name: str | None = None) -> None:
        issued = authority.issue(name or f"{self.node}.{NAME_OF_NODES}")
        for file, text in (
            ("authority.pem", authority.pem()),
            ("node.key", issued.key_pem),
            ("node.pem", issued.chain_pem),
        ):
            new = self.folder / f"{file}.new"
            new.write_text(text)
            new.rename(self.folder / file)

    async def metric(self, name: str) -> float:
        text = await self.rig.admin("/metrics") or ""
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    async def forgets_load(self) -> None:
        """What other hosts said of their machines' load holds for a second."""
        await asyncio.sleep(1.1)

    async def peers(self) -> dict[str, Any]:
        return {peer["node"]: peer for peer in (await self.rig.snapshot()).get("peers") or []}


class Cluster:
    """`each`: settings of one host after the other, beside those of all."""

    def __init__(
        self, folder: Path, regions: tuple[str, ...], each: Sequence[dict[str, Any]] = (), **settings: Any
    ) -> None:
        self.ports, self.mesh_port = Ports(), free_port()
        self.authority = Authority()
        self.hosts = [
            Host(folder / f"n{number}", number, region, self.ports, self.mesh_port, **{**settings, **own})
            for number, (region, own) in enumerate(zip(regions, each or [{}] * len(regions), strict=True), start=1)
        ]

    async def start(self) -> None:
        for host in self.hosts:
            host.certify(self.authority)
            await host.rig.agent.start()
            await host.rig.start()
            await host.rig.agent.applied()
        for host in self.hosts:
            await self.rows(node_row(host.node, host.region, host.mesh), member_row(host.node, host.region))
        await self.met()

    async def met(self, *hosts: Host) -> None:
        """All proxies hear all others."""
        hosts = hosts or tuple(self.hosts)
        for host in hosts:
            wanted = {other.node for other in hosts if other is not host}

            def all_up(peers: dict[str, Any], wanted: set[str] = wanted) -> bool:
                return {node for node, peer in peers.items() if peer["state"] == "up"} >= wanted

            await until(host.peers, all_up, within_s=WITHIN_S, every_s=0.02)

    async def rows(self, *rows: FeedRow) -> None:
        for host in self.hosts:
            await host.rig.agent.rows(*rows)

    async def web(self, internal_port: int, *machines: FeedRow, **service: Any) -> None:
        await self.rows(*app_rows("web", HOST), service_row(self.ports, "web", internal_port, **service), *machines)

    def machine(self, host: Host, name: str, state: str = "started", ip4: str | None = None, **changes: Any) -> FeedRow:
        ip4 = host.machines if ip4 is None else ip4
        return machine_row("web", name, ip4, state, node=host.node, region=host.region, **changes)

    async def close(self) -> None:
        for host in self.hosts:
            await host.rig.close()


@contextlib.asynccontextmanager
async def cluster(folder: Path, *regions: str, **settings: Any) -> AsyncGenerator[Cluster]:
    made = Cluster(folder, regions, **settings)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


@contextlib.asynccontextmanager
async def distance(to: Host, address: str, round_trip_s: float) -> AsyncGenerator[str]:
    """A road to a host's mesh listener on which each way takes half of the round trip; yields where it begins."""
    ip, port = to.mesh.split(":")
    loop = asyncio.get_running_loop()
    roads: set[asyncio.Task[None]] = set()
    ends: list[asyncio.StreamWriter] = []

    async def one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                loop.call_later(round_trip_s / 2, writer.write, data)
        loop.call_later(round_trip_s / 2, writer.close)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        try:
            from_there, to_there = await asyncio.open_connection(ip, int(port))
        except ConnectionError:
            writer.close()
            return
        ends.append(to_there)
        for road in (one_way(reader, to_there), one_way(from_there, writer)):
            task = loop.create_task(road)
            roads.add(task)
            task.add_done_callback(roads.discard)

    server = await asyncio.start_server(carry, address, int(port))
    try:
        yield f"{address}:{port}"
    finally:
        server.close()
        for road in list(roads):
            road.cancel()
        await asyncio.gather(*roads, return_exceptions=True)
        for end in ends:
            end.transport.abort()
        await asyncio.gather(*(end.wait_closed() for end in ends), return_exceptions=True)


# -- agents, apps and clients -------------------------------------------------------------------------------------


class Waker:
    """The agent of a host: starts the app and says so when it is told to, or refuses."""

    def __init__(self, host: Host, port: int, handler: Handler = say_name, **result: Any) -> None:
        self.host, self.port, self.handler, self.result = host, port, handler, result
        self.ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        host.rig.agent.on_frame = self.on_frame

    async def on_frame(self, frame: ProxyFrame) -> None:
        if isinstance(frame, Wake):
            task = asyncio.create_task(self._wake(frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _wake(self, wake: Wake) -> None:
        await self.ready.wait()
        if self.result:
            result = WakeResult(id=wake.id, machine=wake.machine, ok=False, **self.result)
        else:
            await self.host.rig.backend(wake.machine, self.host.machines, self.port, self.handler)
            result = WakeResult(id=wake.id, machine=wake.machine, ok=True, ip4=self.host.machines)
        await self.host.rig.agent.send(result)


class Gate:
    """A handler that answers when it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside = 0

    async def __call__(self, backend: Backend, request: Request) -> bytes:
        self.inside += 1
        try:
            await self.open.wait()
        finally:
            self.inside -= 1
        return answer(backend.name.encode())

    async def wait_for(self, number: int) -> None:
        async def inside() -> int:
            return self.inside

        await until(inside, lambda now: now >= number, within_s=WITHIN_S, every_s=0.01)


class Reader:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await asyncio.wait_for(self._writer.drain(), WITHIN_S)

    async def until(self, mark: bytes) -> bytes:
        return await asyncio.wait_for(self._reader.readuntil(mark), WITHIN_S)

    async def exactly(self, size: int) -> bytes:
        return await asyncio.wait_for(self._reader.readexactly(size), WITHIN_S)

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self._reader.read(), WITHIN_S)

    def close_writing(self) -> None:
        self._writer.write_eof()


@contextlib.asynccontextmanager
async def talk(address: str, port: int, limit: int = 1 << 20) -> AsyncGenerator[Reader]:
    reader, writer = await asyncio.open_connection(address, port, limit=limit)
    try:
        yield Reader(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def echo_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers before the request ended, chunk by chunk as they come, and with a trailer that counts them."""
    try:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n")
        total = 0
        while size := int((await reader.readline()).strip(), 16):
            data = await reader.readexactly(size)
            await reader.readexactly(2)
            total += size
            writer.write(b"%x\r\n%s\r\n" % (size, data))
            await writer.drain()
        await reader.readline()
        writer.write(b"0\r\nx-sum: %d\r\n\r\n" % total)
        await writer.drain()
    finally:
        writer.close()


async def echo_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write(b"bye")
        await writer.drain()
    finally:
        writer.close()
