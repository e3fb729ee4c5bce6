"""Control, the catalogue and real proxies of several edges: what control stores travels as on hosts, by signed frames
to each edge's view, opened by its edge key, over the feed to the proxy. The bus is in memory."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.streams.tls
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from proxy_rig import Ports, Rig
from sqlalchemy import Connection

from pantala.agent.certs import EdgeCertificates
from pantala.agent.feed import Feed
from pantala.catalogue import Publisher, Replica, View
from pantala.catalogue.store import CatalogueStore
from pantala.control.edge_keys import EdgeKeys
from pantala.control.edge_rows import certificate_name
from pantala.kit.clock import SystemClock, unix_ms
from pantala.kit.sealing import Signer, seal
from pantala.store import apps, certificates, hostnames
from pantala.store.records import CertificateRecord
from pantala.testing.bus import MemoryBus
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.platform import TestPlatform
from pantala.testing.platform import running as running_platform
from pantala.testing.poll import until
from pantala.wire import feed

CONTROL = Signer(b"n" * 32)


class Mint:
    """An authority that signs for one key, over and over: ten thousand certificates in a few seconds."""

    def __init__(self) -> None:
        self._authority = ec.generate_private_key(ec.SECP256R1())
        key = ec.generate_private_key(ec.SECP256R1())
        self._public = key.public_key()
        plain = serialization.NoEncryption()
        self.key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mint")])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        made = self._builder(self._authority.public_key(), self._name, days=30).add_extension(
            constraints, critical=True
        )
        self.pem = self._pem(made)

    def issue(self, name: str, *, days: int = 10) -> tuple[str, int]:
        """A chain, as long as usual ones are, and when it ends."""
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        made = self._builder(self._public, x509.Name([]), days=days).add_extension(names, critical=True)
        ends = datetime.now(UTC) + timedelta(days=days)
        return self._pem(made) + self.pem, unix_ms(ends)

    def _builder(self, public: ec.EllipticCurvePublicKey, subject: x509.Name, *, days: int) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))

    def _pem(self, builder: x509.CertificateBuilder) -> str:
        made = builder.sign(self._authority, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM).decode()


class Edge:
    """One host's part: view, opened keys, feed, proxy."""

    def __init__(self, folder: Path, host: FakeAgent, address: str, ports: Ports) -> None:
        self.rig = Rig(folder, node=host.node, region=host.region, address=address, ports=ports)
        self.view = View(control="control")
        self.certificates = EdgeCertificates(self.view, host.opener, node=host.node)
        self.feed = Feed(
            node=host.node,
            region=host.region,
            clock=SystemClock(),
            snapshot=lambda: (self.view.revision, self.certificates.for_proxy(self.view.all())),
            on_wake=_never,
            on_log=_nothing,
        )
        self.view.listen(lambda revision, rows: self.feed.push(revision, self.certificates.changed(rows)))
        self._folder = folder

    @asynccontextmanager
    async def running(self, bus: MemoryBus) -> AsyncGenerator[None]:
        async with CatalogueStore.open(self._folder / "catalogue.db") as store, anyio.create_task_group() as tasks:
            replica = Replica(store, self.view, bus, SystemClock(), {"control": CONTROL.verify_key}.get)
            await replica.open()
            await tasks.start(replica.run)
            await tasks.start(self.feed.serve, self._folder / "agent.sock")
            await self.rig.start()
            try:
                yield
            finally:
                await self.rig.close()
                tasks.cancel_scope.cancel()

    async def serial(self, name: str, trusted: ssl.SSLContext) -> int:
        """Raises OSError (ssl.SSLError) when no certificate for the name is shown."""
        stream = await anyio.connect_tcp(
            self.rig.address,
            self.rig.ports.https,
            ssl_context=trusted,
            tls_hostname=name,
            tls_standard_compatible=False,
        )
        async with stream:
            shown: Any = stream.extra(anyio.streams.tls.TLSAttribute.ssl_object).getpeercert()
            assert shown["subjectAltName"] == (("DNS", name),)
            return int(shown["serialNumber"], 16)

    async def has(self, count: int) -> None:
        """Once its proxy has so many certificates."""

        async def names() -> int:
            return int((await self.rig.snapshot())["certificate_names"])

        await until(names, lambda found: found >= count, within_s=120, every_s=0.1)

    def memory_mib(self) -> float:
        assert self.rig.process is not None
        lines = Path(f"/proc/{self.rig.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class World:
    def __init__(self, platform: TestPlatform, edges: Sequence[Edge]) -> None:
        self.platform, self.edges = platform, edges
        self.mint = Mint()
        self.trusted = ssl.create_default_context(cadata=self.mint.pem)

    async def store(self, names: Sequence[str]) -> None:
        """As issuance keeps them, all in one transaction, and published."""
        edge_key = await EdgeKeys(self.platform.control.context).public()
        now_ms = unix_ms(datetime.now(UTC))
        kept_key = self.platform.control.context.key.seal(self.mint.key_pem)

        def keep(connection: Connection) -> None:
            app = apps.find_app(connection, "web")
            assert app is not None
            for name in names:
                chain_pem, not_after_ms = self.mint.issue(name)
                hostnames.insert_hostname(connection, name, app_id=app.id, now_ms=now_ms)
                hostnames.update_hostname(connection, name, owned=True, acme_requested=True)
                record = CertificateRecord(
                    name=certificate_name("acme", name),
                    names=msgspec.json.encode([name]).decode(),
                    chain_pem=chain_pem,
                    sealed_key=seal(edge_key, self.mint.key_pem),
                    sealed_to=edge_key,
                    not_after_ms=not_after_ms,
                    issued_at_ms=now_ms,
                    hostname=name,
                    source="acme",
                    kept_key=kept_key,
                )
                certificates.put_certificate(connection, record)

        await self.platform.db.write(keep)
        await self.platform.control.publication.publish_all()

    async def import_one(self, name: str) -> None:
        """By the API: one that lives longer, so that it is served in place of the other."""
        chain_pem, _ = self.mint.issue(name, days=20)
        document = {"hostname": name, "fullchain": chain_pem, "private_key": self.mint.key_pem.decode()}
        path = "/v1/apps/web/certificates/custom"
        answer = await self.platform.http.post(path, json=document, headers=self.platform.auth)
        assert answer.status_code == 201, answer.text


async def _never(machine: str, deadline_s: float) -> feed.WakeResult:
    raise AssertionError(f"{machine} is to be woken within {deadline_s} s")


async def _nothing(frame: feed.ProxyLog) -> None:
    del frame


@asynccontextmanager
async def world(folder: Path, *, edges: int) -> AsyncGenerator[World]:
    """The app `web` without machines, and so many edges of one cluster."""
    bus, ports = MemoryBus(), Ports()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(CatalogueStore.open(folder / "control-catalogue.db"))
        publisher = Publisher(store, View(control="control"), bus, CONTROL, SystemClock(), owner="control", epoch=1)
        await publisher.open()
        tasks = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(tasks.cancel_scope.cancel)
        await tasks.start(publisher.run)
        platform = await stack.enter_async_context(running_platform(folder, bus=bus, sink=publisher))
        hosts = [platform.agents["node-1"]]
        hosts += [await platform.add_agent(f"node-{number}") for number in range(2, edges + 1)]
        made: list[Edge] = []
        for number, host in enumerate(hosts, start=1):
            here = folder / host.node
            here.mkdir()
            edge = Edge(here, host, f"127.0.7.{number}", ports)
            await stack.enter_async_context(edge.running(bus))
            made.append(edge)
        await platform.create_app("web")
        await platform.control.certificates.ensure()
        await platform.control.publication.publish_all()
        yield World(platform, made)
