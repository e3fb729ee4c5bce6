"""Who may take part in the mesh, and what happens when a host dies, hangs, comes back or gets a new certificate."""

from __future__ import annotations

import asyncio
import signal
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from mesh_rig import HOST, NAME_OF_NODES, Cluster, Gate, Host, cluster, node_row
from proxy_rig import row

from pantala.testing.authority import Authority
from pantala.testing.poll import until
from pantala.testing.ports import free_port

pytestmark = pytest.mark.anyio
PREFER = {"fly-prefer-region": "lhr"}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "iad", "lhr", "nrt", wake_timeout_ms=10_000) as made:
        yield made


# -- certificates ------------------------------------------------------------------------------------------------


def credentials(cluster: Cluster, folder: Path, issuer: Authority | None, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=cluster.authority.pem())
    context.set_alpn_protocols(["h2"])
    if issuer:
        issued = issuer.issue(*names)
        (folder / "peer.pem").write_text(issued.chain_pem)
        (folder / "peer.key").write_text(issued.key_pem)
        context.load_cert_chain(folder / "peer.pem", folder / "peer.key")
    return context


async def spoken_with(host: Host, context: ssl.SSLContext) -> bytes:
    """What the mesh listener says first; nothing when it refuses."""
    address, port = host.mesh.split(":")
    name = f"{host.node}.{NAME_OF_NODES}"
    writer = None
    try:
        reader, writer = await asyncio.open_connection(address, int(port), ssl=context, server_hostname=name)
        writer.write(PREFACE)
        return await asyncio.wait_for(reader.read(9), 10)
    except (ssl.SSLError, ConnectionError):
        return b""
    finally:
        if writer:
            writer.transport.abort()


async def test_only_members_with_a_certificate_of_the_cluster(three: Cluster, tmp_path: Path) -> None:
    host = three.hosts[0]
    own = f"n2.{NAME_OF_NODES}"
    assert await spoken_with(host, credentials(three, tmp_path, three.authority, own)), "a member is spoken with"
    refused = [
        ("no certificate", None, ()),
        ("another authority", Authority(), (own,)),
        ("a node without a member row", three.authority, (f"n9.{NAME_OF_NODES}",)),
        ("two names", three.authority, (own, f"n3.{NAME_OF_NODES}")),
        ("no node's name", three.authority, ("n2.example.test",)),
        ("a name below a node's", three.authority, (f"x.n2.{NAME_OF_NODES}",)),
    ]
    before = await host.metric("pantala_proxy_mesh_handshakes_refused_total")
    for meaning, issuer, names in refused:
        assert await spoken_with(host, credentials(three, tmp_path, issuer, *names)) == b"", meaning

    async def counted() -> float:
        return await host.metric("pantala_proxy_mesh_handshakes_refused_total")

    await until(counted, lambda now: now == before + len(refused), within_s=15, every_s=0.02)


async def test_a_removed_host_is_cut_off(three: Cluster, tmp_path: Path) -> None:
    here, home, _ = three.hosts
    gate, port = Gate(), free_port()
    await home.rig.backend("one", home.machines, port, gate)
    await three.web(port, three.machine(home, "m1"))
    held = asyncio.create_task(here.rig.get(HOST))
    await gate.wait_for(1)
    await home.rig.agent.rows(row("nodes", f"member/{here.node}", None))
    response = await asyncio.wait_for(held, 10)
    assert response.status_code == 502, "cut in the middle"
    context = credentials(three, tmp_path, three.authority, f"{here.node}.{NAME_OF_NODES}")
    assert await spoken_with(home, context) == b""


async def test_the_peer_must_be_the_node_that_was_meant(three: Cluster) -> None:
    here, home, other = three.hosts
    port = free_port()
    await home.rig.backend("one", home.machines, port)
    await three.web(port, three.machine(home, "m1"))
    # a lying row: n2 is said to be where n3 listens
    await here.rig.agent.rows(node_row(home.node, home.region, other.mesh))
    await until(here.peers, lambda peers: peers["n2"]["state"] == "down", within_s=10, every_s=0.02)
    response = await here.rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (503, "PU03")
    assert await other.metric("pantala_proxy_mesh_served_total") == 0


async def test_a_renewed_certificate_is_used_without_a_restart(three: Cluster) -> None:
    here, home, _ = three.hosts
    gate, port = Gate(), free_port()
    await home.rig.backend("one", home.machines, port, gate)
    await three.web(port, three.machine(home, "m1"))
    held = asyncio.create_task(here.rig.get(HOST))
    await gate.wait_for(1)
    handshakes = await home.metric("pantala_proxy_mesh_handshakes_total")
    before = await shown(three, home)
    for host in (here, home):
        host.certify(three.authority)

    async def renewed() -> bool:
        return await shown(three, home) != before

    await until(renewed, bool, within_s=10, every_s=0.1)
    gate.open.set()
    assert (await held).text == "one", "what was on its way is not cut"

    async def taken() -> float:
        assert (await here.rig.get(HOST)).text == "one"
        return await home.metric("pantala_proxy_mesh_handshakes_total")

    await until(taken, lambda now: now > handshakes, within_s=10, every_s=0.1)
    # files that do not go together change nothing
    (home.folder / "node.key").write_text("broken")
    assert (await here.rig.get(HOST)).text == "one"


async def shown(cluster: Cluster, host: Host) -> bytes:
    context = ssl.create_default_context(cadata=cluster.authority.pem())
    address, port = host.mesh.split(":")
    name = f"{host.node}.{NAME_OF_NODES}"
    _, writer = await asyncio.open_connection(address, int(port), ssl=context, server_hostname=name)
    try:
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()


async def test_a_request_that_came_too_far_is_refused(three: Cluster, tmp_path: Path) -> None:
    home = three.hosts[0]
    port = free_port()
    await home.rig.backend("one", home.machines, port)
    await three.web(port, three.machine(home, "m1"))
    context = credentials(three, tmp_path, three.authority, f"n2.{NAME_OF_NODES}")
    call = {
        "pantala-mesh-app": "web",
        "pantala-mesh-machine": "m1",
        "pantala-mesh-port": str(three.ports.http),
        "pantala-mesh-attempt": "take",
        "pantala-mesh-deadline-ms": "1000",
        "pantala-mesh-client": "192.0.2.1:5",
        "host": HOST,
    }
    name = f"{home.node}.{NAME_OF_NODES}"
    async with httpx2.AsyncClient(verify=context, http1=False, http2=True, trust_env=False) as client:

        async def ask(**more: str) -> httpx2.Response:
            extensions = {"sni_hostname": name}
            return await client.get(f"https://{home.mesh}/", headers={**call, **more}, extensions=extensions)

        fine = await ask(**{"pantala-mesh-hops": "1"})
        assert (fine.status_code, fine.text, fine.headers["pantala-mesh-in-flight"]) == (200, "one", "1")
        for wrong in ({"pantala-mesh-hops": "2"}, {}, {"pantala-mesh-hops": "1", "pantala-mesh-port": "x"}):
            refused = await ask(**wrong)
            assert (refused.status_code, refused.headers["pantala-mesh-refused"]) == (503, "malformed")


# -- hosts that die ----------------------------------------------------------------------------------------------


class Load:
    """Requests at a steady rate on connections of their own, no retries; what failed and when is kept."""

    def __init__(self, host: Host, rate: int = 100) -> None:
        self.host, self.rate = host, rate
        self.failed: list[tuple[float, str]] = []
        self.sent = 0
        self.slowest_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, seconds: float) -> None:
        begun = time.monotonic()
        while (now := time.monotonic() - begun) < seconds:
            while self.sent < now * self.rate:
                self.sent += 1
                self._tasks.append(asyncio.create_task(self._one()))
            await asyncio.sleep(0.005)
        await asyncio.gather(*self._tasks)

    async def _one(self) -> None:
        begun = time.monotonic()
        try:
            response = await self.host.rig.get(HOST, **PREFER)
            if response.status_code != 200:
                self.failed.append((begun, response.text))
        except (httpx2.HTTPError, OSError) as error:
            self.failed.append((begun, repr(error)))
        self.slowest_s = max(self.slowest_s, time.monotonic() - begun)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
async def test_a_host_that_dies_is_left_and_no_request_fails(three: Cluster, how: signal.Signals) -> None:
    here, one, two = three.hosts
    port = free_port()
    await one.rig.backend("one", one.machines, port)
    await two.rig.backend("two", two.machines, port)
    await three.web(port, three.machine(one, "m1"), three.machine(two, "m2"))
    assert (await here.rig.get(HOST, **PREFER)).text == "one"
    load = Load(here, rate=40)
    running = asyncio.create_task(load.run(3))
    await asyncio.sleep(0.5)
    assert one.rig.process
    one.rig.process.send_signal(how)
    died = time.monotonic()
    await until(here.peers, lambda peers: peers["n2"]["state"] in ("down", "gone"), within_s=15, every_s=0.02)
    left_s = time.monotonic() - died
    await running
    print(f"left after {left_s:.3f} s; {load.sent} requests, slowest {load.slowest_s:.3f} s")
    assert not load.failed
    assert left_s < 3, "750 ms of silence; the rest is what a busy machine may add"
    asked = await here.metric("pantala_proxy_retries_total")
    assert (await here.rig.get(HOST, **PREFER)).text == "two"
    assert await here.metric("pantala_proxy_retries_total") == asked, "it is not asked again"
    if how == signal.SIGSTOP:
        one.rig.process.send_signal(signal.SIGCONT)
        await three.met()
        assert (await here.rig.get(HOST, **PREFER)).text == "one"


async def test_what_waits_at_a_host_that_dies_ends_honestly(three: Cluster) -> None:
    here, home, other = three.hosts
    gate, port = Gate(), free_port()
    await home.rig.backend("one", home.machines, port, gate)
    await other.rig.backend("two", other.machines, port)
    await three.web(port, three.machine(home, "m1"))
    async with here.rig.client(HOST) as client:
        url = f"http://{here.address}:{three.ports.http}/"
        post = asyncio.create_task(client.post(url, content=b"x", headers={"accept": "application/json"}))
        get = asyncio.create_task(client.get(url))
        await gate.wait_for(2)
        await three.rows(three.machine(other, "m2"))
        assert home.rig.process
        home.rig.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        response = await post
        # the app may have acted on it, so nobody repeats it
        assert (response.status_code, response.json()["code"]) == (502, "PU03")
        assert "n2" in response.json()["error"]
        assert (await get).text == "two", "harmless to repeat"
        print(f"answered {time.monotonic() - begun:.3f} s after the host hung")
    home.rig.process.send_signal(signal.SIGCONT)


async def test_an_app_whose_hosts_are_all_silent_gets_a_page(three: Cluster) -> None:
    here, home, _ = three.hosts
    port = free_port()
    await home.rig.backend("one", home.machines, port)
    await three.web(port, three.machine(home, "m1"))
    await home.rig.stop(signal.SIGKILL)
    await until(here.peers, lambda peers: peers["n2"]["state"] == "down", within_s=15, every_s=0.02)
    response = await here.rig.get(HOST, accept="application/json")
    assert (response.status_code, response.json()["code"]) == (503, "PU03")
    # a proxy that is started again in time costs a wait, not an error
    waiting = asyncio.create_task(here.rig.get(HOST))
    await home.rig.start()
    assert (await waiting).text == "one"


async def test_a_proxy_that_leaves_in_order_loses_nothing(three: Cluster) -> None:
    here, one, two = three.hosts
    port = free_port()
    await one.rig.backend("one", one.machines, port)
    await two.rig.backend("two", two.machines, port)
    await three.web(port, three.machine(one, "m1"), three.machine(two, "m2"))
    load = Load(here, rate=60)
    running = asyncio.create_task(load.run(3))
    await asyncio.sleep(0.5)
    assert await one.rig.stop(signal.SIGTERM) == 0
    await running
    assert not load.failed
