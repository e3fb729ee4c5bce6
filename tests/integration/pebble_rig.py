"""Debian's `pebble` as the certificate authority, a public DNS of the test, one real proxy as the edge, and the control
plane that orders: what certificates need, all on loopback.

Pebble resolves names at `PublicDns`, which follows CNAMEs into the platform's zone and asks the proxy there, as a
resolver of the world would.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import httpx2
import msgspec
from proxy_rig import WITHIN_S, Ports, Rig, json_of
from proxy_rig import running as running_proxy

from pantala.control.dns_lookup import DnsLookup
from pantala.kit.clock import Clock
from pantala.kit.rows import Row
from pantala.kit.sealing import Opener, b64
from pantala.testing.authority import Authority
from pantala.testing.platform import SETTINGS, RowTable, TestPlatform
from pantala.testing.platform import running as running_platform
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.feed import DNSSettings, FeedRow

EDGE = "127.0.0.1"
ZONE = "pantala.test"


class PublicDns(asyncio.DatagramProtocol):
    """Answers what `says` was told; names under the platform's domain are asked from the edge."""

    def __init__(self, edge_port: int) -> None:
        self._edge_port = edge_port
        self._known: dict[tuple[str, str], list[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self.port = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self.port = self._transport.get_extra_info("sockname")[1]

    def stop(self) -> None:
        assert self._transport is not None
        self._transport.close()
        for task in self._tasks:
            task.cancel()

    def says(self, name: str, kind: str, *values: str) -> None:
        self._known[name, kind] = list(values)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(data, addr))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        kind = dns.rdatatype.to_text(question.rdtype)
        response.answer = await self._look(question.name.to_text(omit_final_dot=True).lower(), kind)
        assert self._transport is not None
        self._transport.sendto(response.to_wire(), addr)

    async def _look(self, name: str, kind: str) -> list[dns.rrset.RRset]:
        if name.endswith(f".{ZONE}"):
            query = dns.message.make_query(name, kind)
            answer = await dns.asyncquery.udp(query, EDGE, port=self._edge_port, timeout=WITHIN_S)
            return list(answer.answer)
        if values := self._known.get((name, kind)):
            values = [f'"{value}"' for value in values] if kind == "TXT" else values
            return [dns.rrset.from_text(name + ".", 1, "IN", kind, *values)]
        if kind != "CNAME" and (targets := self._known.get((name, "CNAME"))):
            cname = dns.rrset.from_text(name + ".", 1, "IN", "CNAME", *targets)
            return [cname, *await self._look(targets[0].rstrip("."), kind)]
        return []


class Pebble:
    """The authority: `directory` is where it is ordered from, `ca_file` what its own certificate is trusted by."""

    def __init__(
        self, folder: Path, *, bindings: Mapping[str, str] | None = None, lives: timedelta | None = None
    ) -> None:
        """`bindings`: HMAC keys (base64url) by id, one of which each new account then has to show. `lives`: how long
        its certificates do."""
        self._folder = folder
        self._bindings = bindings
        self._lives = lives
        self._port, self._management = free_port(), free_port()
        self._process: asyncio.subprocess.Process | None = None
        self.directory = f"https://localhost:{self._port}/dir"
        self.ca_file = folder / "pebble-ca.pem"

    async def start(self, *, ports: Ports, dns_port: int, reject_nonces: int = 0) -> None:
        program = shutil.which("pebble")
        assert program is not None, "pebble is not installed; scripts/install --tests"
        authority = Authority()
        own = authority.issue("localhost")
        (self._folder / "pebble.pem").write_text(own.chain_pem)
        (self._folder / "pebble.key").write_text(own.key_pem)
        self.ca_file.write_text(authority.pem())
        settings: dict[str, Any] = {
            "listenAddress": f"127.0.0.1:{self._port}",
            "managementListenAddress": f"127.0.0.1:{self._management}",
            "certificate": str(self._folder / "pebble.pem"),
            "privateKey": str(self._folder / "pebble.key"),
            "httpPort": ports.http,
            "tlsPort": ports.https,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": self._bindings is not None,
            "externalAccountMACKeys": self._bindings or {},
        }
        if self._lives is not None:
            settings["certificateValidityPeriod"] = int(self._lives.total_seconds())
        file = self._folder / "pebble.json"
        file.write_bytes(msgspec.json.encode({"pebble": settings}))
        environment = os.environ | {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": str(reject_nonces)}
        with (self._folder / "pebble.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                program, "-config", file, "-dnsserver", f"127.0.0.1:{dns_port}",
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            )  # fmt: skip

        async def up() -> bool:
            assert self._process is not None
            assert self._process.returncode is None, (self._folder / "pebble.log").read_text()
            return await self._get("/roots/0") is not None

        await until(up, bool, within_s=WITHIN_S, every_s=0.05)

    async def roots(self) -> str:
        """PEM of the root that it signs with."""
        found = await self._get("/roots/0")
        assert found is not None
        return found

    def orders(self) -> int:
        """How many orders it took."""
        return (self._folder / "pebble.log").read_text().count("Added order")

    async def _get(self, path: str) -> str | None:
        try:
            async with httpx2.AsyncClient(trust_env=False, verify=False) as client:  # what it says is public
                return (await client.get(f"https://127.0.0.1:{self._management}{path}")).text
        except httpx2.TransportError:
            return None

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await asyncio.wait_for(self._process.wait(), WITHIN_S)


class EdgeFeed(RowTable):
    """Control's rows reach the proxy as an agent would tell them: keys opened with the edge key."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self._rig = rig
        self.opener: Opener | None = None

    async def put(self, rows: Sequence[Row]) -> int:
        revision = await super().put(rows)
        told = [self._told(row) for row in rows if row.stream != "nodes" and not row.key.startswith("edge/")]
        await self._rig.agent.rows(*told)
        return revision

    def _told(self, row: Row) -> FeedRow:
        value: dict[str, Any] | None = None if row.value is None else dict(row.value)
        if value is not None and "sealed_key" in value and self.opener is not None:
            opened = self.opener.open(value.pop("sealed_key"))
            value |= {"key": b64(opened)} if row.key.startswith("ticket/") else {"key_pem": opened.decode()}
        return FeedRow(stream=row.stream, key=row.key, value=value)


class Issuing:
    def __init__(self, platform: TestPlatform, rig: Rig, public: PublicDns, pebble: Pebble, lookup: DnsLookup) -> None:
        self.platform, self.rig, self.dns, self.pebble, self.lookup = platform, rig, public, pebble, lookup

    async def add(self, app: str, hostname: str) -> dict[str, Any]:
        path = f"/v1/apps/{app}/certificates/acme"
        answer = await self.platform.http.post(path, json={"hostname": hostname}, headers=self.platform.auth)
        assert answer.status_code == 201, answer.text
        return dict(json_of(answer))

    async def show(self, app: str, hostname: str) -> dict[str, Any]:
        path = f"/v1/apps/{app}/certificates/{hostname.replace('*', '%2A')}"
        answer = await self.platform.http.get(path, headers=self.platform.auth)
        assert answer.status_code == 200, answer.text
        return dict(json_of(answer))

    async def check(self, app: str, hostname: str) -> dict[str, Any]:
        path = f"/v1/apps/{app}/certificates/{hostname.replace('*', '%2A')}/check"
        answer = await self.platform.http.post(path, headers=self.platform.auth)
        assert answer.status_code == 200, answer.text
        return dict(json_of(answer))

    async def remove(self, app: str, hostname: str) -> None:
        path = f"/v1/apps/{app}/certificates/{hostname.replace('*', '%2A')}"
        answer = await self.platform.http.delete(path, headers=self.platform.auth)
        assert answer.status_code == 204, answer.text

    async def issuer(self, server_name: str, *, trusted: str | None = None) -> str:
        """Who signed for whom one connects to by this name, trusting pebble alone, or this PEM."""
        shown = await self._shown(server_name, trusted)
        return str(dict(pair[0] for pair in shown["issuer"])["commonName"])

    async def serial(self, server_name: str) -> int:
        return int((await self._shown(server_name))["serialNumber"], 16)

    async def _shown(self, server_name: str, trusted: str | None = None) -> dict[str, Any]:
        """Raises OSError (ssl.SSLError) when the handshake fails."""
        context = ssl.create_default_context(cadata=trusted or await self.pebble.roots())
        _, writer = await asyncio.open_connection(EDGE, self.rig.ports.https, ssl=context, server_hostname=server_name)
        try:
            shown: dict[str, Any] = writer.get_extra_info("peercert")
            return shown
        finally:
            writer.close()


class Outside:
    """What is there without control: the authority, DNS, an edge with its agent's rows."""

    def __init__(self, folder: Path, rig: Rig, public: PublicDns, pebble: Pebble) -> None:
        self.folder, self.rig, self.dns, self.pebble = folder, rig, public, pebble
        self.feed = EdgeFeed(rig)


@asynccontextmanager
async def outside(
    folder: Path, *, bindings: Mapping[str, str] | None = None, lives: timedelta | None = None
) -> AsyncGenerator[Outside]:
    ports = Ports()
    dns_settings = DNSSettings(listen=[], public_listen=[EDGE], public_names={ZONE: EDGE}, forward=[], port=ports.dns)
    (folder / "edge").mkdir()
    (folder / "control").mkdir()
    async with running_proxy(folder / "edge", ports=ports, dns=dns_settings) as rig:
        public, pebble = PublicDns(ports.dns), Pebble(folder, bindings=bindings, lives=lives)
        await public.start()
        try:
            await pebble.start(ports=ports, dns_port=public.port)
            yield Outside(folder, rig, public, pebble)
        finally:
            await pebble.stop()
            public.stop()


@asynccontextmanager
async def controlled(
    around: Outside, *, clock: Clock | None = None, again: bool = False, **settings: Any
) -> AsyncGenerator[Issuing]:
    """One life of control. `again`: not the first."""
    lookup = DnsLookup([f"127.0.0.1:{around.dns.port}"])
    options: dict[str, Any] = {
        "edge_addresses": (EDGE,),
        "acme_directory": around.pebble.directory,
        "acme_ca_file": str(around.pebble.ca_file),
    }
    chosen = msgspec.structs.replace(SETTINGS, **options | settings)
    folder, feed = around.folder / "control", around.feed
    async with running_platform(
        folder, settings=chosen, lookup=lookup, rows=feed, clock=clock, admits=not again
    ) as platform:
        if not again:
            sealed = platform.rows.rows["edge/node-1"]["sealed_key"]
            feed.opener = Opener(platform.agents["node-1"].opener.open(sealed))
        yield Issuing(platform, around.rig, around.dns, around.pebble, lookup)


@asynccontextmanager
async def issuing(
    folder: Path, *, bindings: Mapping[str, str] | None = None, **settings: Any
) -> AsyncGenerator[Issuing]:
    """The app `web` is there; DNS knows nothing yet."""
    async with outside(folder, bindings=bindings) as around, controlled(around, **settings) as world:
        await world.platform.create_app("web")
        yield world
