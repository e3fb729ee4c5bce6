"""The two forms of a call between proxies: the brief one where both ends read it, the long one with a proxy of the
version before, which knows no other."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import httpx2
import pytest
from h2.events import RequestReceived
from http2_rig import Speaker, speaker, text
from mesh_rig import HOST, NAME_OF_NODES, Cluster, cluster, member_row, node_row
from proxy_rig import WITHIN_S, machine_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port

pytestmark = pytest.mark.anyio

BRIEF, LONG = "pantala-brief/1", "h2"
"""What a connection speaks."""
NODE, ADDRESS = "n9", "127.0.1.9"
"""The proxy that is played here."""
CALL = {
    "pantala-mesh-app": "web",
    "pantala-mesh-machine": "m1",
    "pantala-mesh-attempt": "take",
    "pantala-mesh-hops": "1",
}


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", wake_timeout_ms=10_000) as made:
        await made.rows(member_row(NODE, "lhr"))
        yield made


def credentials(cluster: Cluster, folder: Path, purpose: ssl.Purpose, *speaks: str) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cadata=cluster.authority.pem())
    issued = cluster.authority.issue(f"{NODE}.{NAME_OF_NODES}")
    (folder / "peer.pem").write_text(issued.chain_pem)
    (folder / "peer.key").write_text(issued.key_pem)
    context.load_cert_chain(folder / "peer.pem", folder / "peer.key")
    context.set_alpn_protocols(speaks)
    return context


class Peer:
    """A proxy that reads the forms of `speaks`; it serves each call itself, and keeps what the call said."""

    def __init__(self, *speaks: str) -> None:
        self.speaks = speaks
        self.calls: list[dict[str, str]] = []

    async def serve(self, made: Speaker, form: str) -> None:
        async for stream in made.requests():
            event = next(
                event
                for event in await made.heard()
                if isinstance(event, RequestReceived) and event.stream_id == stream
            )
            said = {name: value for name, value in text(event.headers).items() if name.startswith("pantala-mesh-")}
            if said != {"pantala-mesh-kind": "ping"}:
                self.calls.append(said)
            load = [("pantala-mesh-others", "0")]
            if form == LONG:
                load = [("pantala-mesh-in-flight", "1"), ("pantala-mesh-yours", "1")]
            made.begin(stream, *load)
            made.say(stream, b"there", end=True)

    @contextlib.asynccontextmanager
    async def listening(self, cluster: Cluster, folder: Path) -> AsyncGenerator[None]:
        context = credentials(cluster, folder, ssl.Purpose.CLIENT_AUTH, *self.speaks)
        serving: set[asyncio.Task[None]] = set()

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            form = writer.get_extra_info("ssl_object").selected_alpn_protocol()
            async with speaker(reader, writer, client=False, strict=False) as made:
                await self.serve(made, form)

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(converse(reader, writer))
            serving.add(task)
            task.add_done_callback(serving.discard)

        server = await asyncio.start_server(accept, ADDRESS, cluster.mesh_port, ssl=context)
        try:
            yield
        finally:
            server.close()
            for task in list(serving):
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)


async def up(cluster: Cluster) -> None:
    await until(
        cluster.hosts[0].peers, lambda peers: peers.get(NODE, {}).get("state") == "up", within_s=WITHIN_S, every_s=0.02
    )


async def asked(cluster: Cluster, peer: Peer) -> dict[str, str]:
    """What a request of the real proxy says to the one that is played here."""
    before = len(peer.calls)
    response = await cluster.hosts[0].rig.get(HOST, **{"pantala-mesh-call": "a lie", "pantala-mesh-app": "a lie"})
    assert (response.status_code, response.text) == (200, "there")
    assert not [name for name in response.headers if name.startswith("pantala-")]
    (call,) = peer.calls[before:]
    return call


def left(ms: str) -> bool:
    """Of the ten seconds, in steps, so that one call reads like the next."""
    return 5_000 < int(ms) <= 10_000 and int(ms) % 10 == 0


# -- asking ------------------------------------------------------------------------------------------------------


async def test_a_peer_is_asked_in_the_form_that_it_reads(one: Cluster, tmp_path: Path) -> None:
    port = one.ports.http
    await one.rows(node_row(NODE, "lhr", f"{ADDRESS}:{one.mesh_port}"))
    await one.web(8080, machine_row("web", "m1", "127.0.3.9", node=NODE, region="lhr"))

    def brief(call: dict[str, str]) -> bool:
        said = re.fullmatch(rf"web m1 {port} take (\d+) 1", call["pantala-mesh-call"])
        return len(call) == 1 and said is not None and left(said[1])

    now = Peer(BRIEF, LONG)
    async with now.listening(one, tmp_path):
        await up(one)
        assert brief(await asked(one, now))
    # the version before takes its place, as when an upgrade is taken back
    before = Peer(LONG)
    async with before.listening(one, tmp_path):
        await up(one)
        call = await asked(one, before)
        assert call.pop("pantala-mesh-client").startswith("127.0.0.1:")
        assert left(call.pop("pantala-mesh-deadline-ms"))
        assert call == {**CALL, "pantala-mesh-port": str(port)}
    async with now.listening(one, tmp_path):
        await up(one)
        assert brief(await asked(one, now))


# -- being asked -------------------------------------------------------------------------------------------------


async def test_an_answer_has_the_form_of_its_call(one: Cluster, tmp_path: Path) -> None:
    (home,) = one.hosts
    port = free_port()
    backend = await home.rig.backend("one", home.machines, port)
    await one.web(port, one.machine(home, "m1"))
    http = one.ports.http
    long = {
        **CALL,
        "pantala-mesh-port": str(http),
        "pantala-mesh-deadline-ms": "1000",
        "pantala-mesh-client": "192.0.2.1:5",
    }
    context = credentials(one, tmp_path, ssl.Purpose.SERVER_AUTH, LONG)
    async with httpx2.AsyncClient(verify=context, http1=False, http2=True, trust_env=False) as client:

        async def ask(call: dict[str, str]) -> tuple[int, dict[str, str]]:
            extensions = {"sni_hostname": f"{home.node}.{NAME_OF_NODES}"}
            url = f"https://{home.mesh}/"
            response = await client.get(url, headers={"host": HOST, **call}, extensions=extensions)
            said = {name: value for name, value in response.headers.items() if name.startswith("pantala-mesh-")}
            return response.status_code, said

        assert await ask(long) == (200, {"pantala-mesh-in-flight": "1", "pantala-mesh-yours": "1"})
        brief = f"web m1 {http} take 1000 1"
        assert await ask({"pantala-mesh-call": brief}) == (200, {"pantala-mesh-others": "0"})
        assert not [name for name, _ in backend.requests[-1].headers if name.startswith("pantala-")]
        # a refusal says all that it knows
        unknown = await ask({"pantala-mesh-call": brief.replace("m1", "m2")})
        assert unknown == (503, {"pantala-mesh-refused": "unknown"})
        for wrong in (f"web m1 {http} take 1000 2", f"web m1 {http} take", "a lie"):
            assert await ask({"pantala-mesh-call": wrong}) == (503, {"pantala-mesh-refused": "malformed"})
