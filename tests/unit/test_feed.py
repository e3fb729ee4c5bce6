"""The feed socket against a client that plays the proxy: snapshot, deltas, wakes, drains, load, sleep."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import msgspec
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from pantala.agent.certs import EdgeCertificates
from pantala.agent.feed import ROWS_PER_FRAME, Feed
from pantala.agent.host import Capacity
from pantala.agent.idle import Idle
from pantala.agent.wakes import Wakes
from pantala.catalogue import View
from pantala.errors import TransientError
from pantala.kit.clock import SystemClock
from pantala.kit.sealing import Opener, b64, seal
from pantala.testing.agent import RunningAgent, World, config, service
from pantala.testing.poll import until
from pantala.wire import feed, node
from pantala.wire.catalogue import OwnedRow
from pantala.wire.machine import Guest, Port

pytestmark = pytest.mark.anyio

ID = "d8d9510a295118"


class Proxy:
    """Speaks the protocol as `pantala-proxy` does; `got` keeps every frame."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self._stream = stream
        self._lines = BufferedByteReceiveStream(stream)
        self.rows: dict[str, Any] = {}

    async def say(self, frame: feed.ProxyFrame | bytes) -> None:
        data = frame if isinstance(frame, bytes) else msgspec.json.encode(frame)
        await self._stream.send(data + b"\n")

    async def hear(self, kind: Any = None) -> Any:
        """The next frame, or the next one of a kind; rows are kept on the way."""
        with anyio.fail_after(15):
            while True:
                frame = msgspec.json.decode(await self._lines.receive_until(b"\n", 1 << 24), type=feed.AgentFrame)
                if isinstance(frame, feed.Snapshot | feed.Delta):
                    self.rows |= {row.key: row.value for row in frame.rows}
                if kind is None or isinstance(frame, kind):
                    return frame


class Rig:
    """A feed whose rows and wakes the test decides."""

    def __init__(self) -> None:
        self.rows: list[feed.FeedRow] = []
        self.logs: list[feed.ProxyLog] = []
        self.wakes: list[str] = []
        self.feed = Feed(
            node="n1",
            region="iad",
            clock=SystemClock(),
            snapshot=lambda: (len(self.rows), self.rows),
            on_wake=self._wake,
            on_log=self._log,
        )

    async def _wake(self, machine_id: str, deadline_s: float) -> feed.WakeResult:
        self.wakes.append(machine_id)
        self.feed.push(1, [row("m/1", 1)])
        return feed.WakeResult(id=0, machine=machine_id, ok=True, ip4=f"{deadline_s:g}")

    async def _log(self, frame: feed.ProxyLog) -> None:
        self.logs.append(frame)


def row(key: str, value: int) -> feed.FeedRow:
    return feed.FeedRow(stream="routes", key=key, value={"v": value})


@asynccontextmanager
async def serving(served: Feed, folder: Path) -> AsyncGenerator[Path]:
    path = folder / "run" / "agent.sock"
    async with anyio.create_task_group() as tasks:
        await tasks.start(served.serve, path)
        yield path

        async def connected() -> bool:
            return served.connected

        # A reader that is cancelled in the very moment its peer goes away upsets anyio's unix streams.
        await until(connected, lambda there: not there, within_s=15, every_s=0.005)
        tasks.cancel_scope.cancel()
    assert not path.exists()


@asynccontextmanager
async def proxy(path: Path) -> AsyncGenerator[Proxy]:
    async with await anyio.connect_unix(path) as stream:
        client = Proxy(stream)
        await client.say(feed.ProxyHello(protocol=feed.FEED_PROTOCOL, version="0.1.0", pid=1))
        yield client


async def test_snapshot_then_deltas_in_order(tmp_path: Path) -> None:
    rig = Rig()
    rig.rows = [row(f"m/{n}", n) for n in range(2 * ROWS_PER_FRAME + 1)]
    async with serving(rig.feed, tmp_path) as path, proxy(path) as client:
        hello = await client.hear()
        assert (hello.protocol, hello.node, hello.region) == (feed.FEED_PROTOCOL, "n1", "iad")
        chunks = [await client.hear(feed.Snapshot) for _ in range(3)]
        assert [chunk.last for chunk in chunks] == [False, False, True]
        for number in range(3):
            rig.feed.push(number, [row("m/0", 100 + number)])
        assert [(await client.hear()).revision for _ in range(3)] == [0, 1, 2]
        assert client.rows["m/0"] == {"v": 102}
        assert len(client.rows) == len(rig.rows)


async def test_an_empty_snapshot_is_still_complete(tmp_path: Path) -> None:
    rig = Rig()
    async with serving(rig.feed, tmp_path) as path, proxy(path) as client:
        assert (await client.hear(feed.Snapshot)).last


async def test_a_wake_is_answered_with_its_id_after_the_row_that_makes_it_ready(tmp_path: Path) -> None:
    rig = Rig()
    async with serving(rig.feed, tmp_path) as path, proxy(path) as client:
        await client.hear(feed.Snapshot)
        await client.say(feed.Wake(id=7, machine="m1", deadline_ms=2500))
        assert isinstance(await client.hear(), feed.Delta)
        result = await client.hear()
        assert (result.id, result.machine, result.ok, result.ip4) == (7, "m1", True, "2.5")


async def test_a_request_is_asked_for_at_every_proxy(tmp_path: Path) -> None:
    """While one replaces another, each has the requests that it served."""
    rig = Rig()
    with pytest.raises(TransientError):
        await rig.feed.trace("01ARZ3NDEKTSV4RRFFQ69G5FAV")
    async with serving(rig.feed, tmp_path) as path, proxy(path) as old:
        await old.hear(feed.Snapshot)
        async with proxy(path) as new:
            await new.hear(feed.Snapshot)
            found: list[node.HostTrace] = []

            async def ask() -> None:
                found.append(await rig.feed.trace("01ARZ3NDEKTSV4RRFFQ69G5FAV"))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                for client, since_ms in ((old, 10), (new, 500)):
                    asked = await client.hear(feed.Trace)
                    assert asked.request == "01ARZ3NDEKTSV4RRFFQ69G5FAV"
                    record = feed.TraceRecord(role="edge", outcome="answered", began_us=since_ms)
                    await client.say(feed.Traced(id=asked.id, since_ms=since_ms, records=[record]))
            assert found[0].since_ms == 10
            assert [record.began_us for record in found[0].records] == [10, 500]


async def test_a_proxy_that_goes_away_does_not_hold_the_others_up(tmp_path: Path) -> None:
    rig = Rig()
    found: list[node.HostTrace] = []
    async with serving(rig.feed, tmp_path) as path, proxy(path) as stays:
        await stays.hear(feed.Snapshot)
        async with anyio.create_task_group() as tasks:
            async with proxy(path) as goes:
                await goes.hear(feed.Snapshot)

                async def ask() -> None:
                    found.append(await rig.feed.trace("01ARZ3NDEKTSV4RRFFQ69G5FAV"))

                tasks.start_soon(ask)
                asked = await stays.hear(feed.Trace)
                await goes.hear(feed.Trace)
            await stays.say(feed.Traced(id=asked.id, since_ms=3))
        assert found == [node.HostTrace(since_ms=3, records=[])]


async def test_drain_asks_every_proxy_and_takes_the_worst_answer(tmp_path: Path) -> None:
    rig = Rig()
    assert await rig.feed.drain("m1", deadline_s=1) == "no_proxy"
    async with serving(rig.feed, tmp_path) as path, proxy(path) as old:
        await old.hear(feed.Snapshot)
        async with proxy(path) as new:
            await new.hear(feed.Snapshot)
            results: list[str] = []

            async def drain() -> None:
                results.append(await rig.feed.drain("m1", deadline_s=5, load_seq=4))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(drain)
                first, second = await old.hear(feed.Drain), await new.hear(feed.Drain)
                assert (first.load_seq, second.load_seq) == (None, 4)
                await old.say(feed.Drained(id=first.id, machine="m1", result="drained"))
                await new.say(feed.Drained(id=second.id, machine="m1", result="busy", in_flight=2))
            assert results == ["busy"]


async def test_a_proxy_that_goes_away_ends_its_drains(tmp_path: Path) -> None:
    rig = Rig()
    results: list[str] = []

    async def drain() -> None:
        results.append(await rig.feed.drain("m1", deadline_s=5))

    async with serving(rig.feed, tmp_path) as path:
        async with anyio.create_task_group() as tasks:
            async with proxy(path) as client:
                await client.hear(feed.Snapshot)
                tasks.start_soon(drain)
                await client.hear(feed.Drain)
        assert results == ["no_proxy"]


async def test_what_cannot_be_read_is_skipped_and_another_protocol_is_left(tmp_path: Path) -> None:
    rig = Rig()
    async with serving(rig.feed, tmp_path) as path:
        async with proxy(path) as client:
            await client.hear(feed.Snapshot)
            await client.say(b"not json")
            await client.say(b'{"type":"unheard_of"}')
            await client.say(feed.ProxyLog(app="hello", code="PR01", message="no healthy machine"))
            await client.say(feed.Wake(id=1, machine="m1", deadline_ms=1000))
            assert (await client.hear(feed.WakeResult)).ok
            assert [frame.code for frame in rig.logs] == ["PR01"]
        async with await anyio.connect_unix(path) as stream:
            await stream.send(msgspec.json.encode(feed.ProxyHello(protocol=99, version="9", pid=1)) + b"\n")
            with anyio.fail_after(15):
                async for _ in stream:
                    pass


async def test_a_proxy_that_does_not_read_is_disconnected_and_blocks_nobody(tmp_path: Path) -> None:
    rig = Rig()
    async with serving(rig.feed, tmp_path) as path, proxy(path) as deaf:
        await deaf.hear(feed.Snapshot)
        big = feed.FeedRow(stream="routes", key="m/1", value={"v": "x" * 4096})

        async def push() -> bool:
            for number in range(1_000):
                rig.feed.push(number, [big])
            return rig.feed.connected

        await until(push, lambda connected: not connected, within_s=20, every_s=0)


async def test_certificates_are_opened_for_the_edge_only() -> None:
    edge = Opener(b"e" * 32)
    value = {"names": ["a.test"], "chain_pem": "C", "not_after_ms": 1, "sealed_key": seal(edge.public_key, b"KEY")}
    given = [feed.FeedRow(stream="certs", key="cert/a.test", value=value), row("m/1", 1)]

    def with_key(first: Opener | None) -> EdgeCertificates:
        return EdgeCertificates(View(control="control"), Opener(b"n" * 32), node="n1", first=first)

    opened = with_key(edge).for_proxy(given)
    assert opened[0].value == {"names": ["a.test"], "chain_pem": "C", "not_after_ms": 1, "key_pem": "KEY"}
    assert [r.key for r in with_key(None).for_proxy(given)] == ["m/1"]
    assert [r.key for r in with_key(Opener(b"o" * 32)).for_proxy(given)] == ["m/1"]


async def test_ticket_keys_are_opened_as_bytes() -> None:
    edge, secret = Opener(b"e" * 32), bytes(range(224, 256))
    value = {"not_before_ms": 1, "not_after_ms": 2, "sealed_key": seal(edge.public_key, secret)}
    row = OwnedRow(stream="certs", key="ticket/1", seq=1, value=value)
    view = View(control="control")
    view.apply("control", [row])
    opened = EdgeCertificates(view, Opener(b"n" * 32), node="n1", first=edge).for_proxy(view.all())
    assert [r.value for r in opened] == [{"not_before_ms": 1, "not_after_ms": 2, "key": b64(secret)}]


@pytest.mark.parametrize("key_first", [True, False], ids=["key first", "certificate first"])
async def test_a_new_edge_key_opens_certificates_in_whichever_order_they_come(*, key_first: bool) -> None:
    old, new, node = Opener(b"o" * 32), Opener(b"e" * 32), Opener(b"n" * 32)
    cert = {"names": ["a.test"], "chain_pem": "C", "not_after_ms": 1, "sealed_key": seal(new.public_key, b"KEY")}
    key = {"node": "n1", "public_key": new.public_key, "sealed_key": seal(node.public_key, b"e" * 32)}
    rows = [
        OwnedRow(stream="certs", key="edge/n1", seq=1, value=key),
        OwnedRow(stream="certs", key="cert/a.test", seq=2, value=cert),
    ]
    view = View(control="control")
    certificates = EdgeCertificates(view, node, node="n1", first=old)
    told: dict[str, feed.FeedRow] = {}
    view.listen(lambda revision, rows: told.update({row.key: row for row in certificates.changed(rows)}))
    for one in rows if key_first else reversed(rows):
        view.apply("control", [one])
    assert list(told) == ["cert/a.test"]
    assert (told["cert/a.test"].value or {})["key_pem"] == "KEY"


# -- the agent behind it -------------------------------------------------------------------------------------------


@asynccontextmanager
async def asleep_soon(
    world: World, tmp_path: Path, *, idle_window_s: float
) -> AsyncGenerator[tuple[RunningAgent, Proxy]]:
    """An agent whose proxy the test plays, and which puts idle machines to sleep."""
    async with world.agent() as agent:
        wakes = Wakes(agent.host)

        async def on_log(frame: feed.ProxyLog) -> None:
            del frame

        served = Feed(
            node="n1", region="iad", clock=world.clock, snapshot=lambda: (0, []), on_wake=wakes.wake, on_log=on_log
        )
        idle = Idle(agent.host, served, idle_window_s=idle_window_s, pass_every_s=0.02)
        async with serving(served, tmp_path) as path, anyio.create_task_group() as tasks:
            tasks.start_soon(idle.run, tasks)
            async with proxy(path) as client:
                await client.hear(feed.Snapshot)
                yield agent, client
            tasks.cancel_scope.cancel()


def load(in_flight: int = 0, seq: int = 1, idle_ms: int = 1_000_000) -> feed.Load:
    return feed.Load(machines=[feed.MachineLoad(machine=ID, in_flight=in_flight, seq=seq, idle_ms=idle_ms)])


async def test_an_idle_machine_sleeps_and_a_wake_brings_it_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with asleep_soon(world, tmp_path, idle_window_s=0.05) as (agent, client):
        await agent.create()
        await agent.wait("started")
        await client.say(load(seq=5))
        asked = await client.hear(feed.Drain)
        assert (asked.machine, asked.load_seq) == (ID, 5)
        await client.say(feed.Drained(id=asked.id, machine=ID, result="drained"))
        await agent.wait("stopped")
        assert world.driver.running() == set()
        assert next(e for e in (await agent.get()).events if e.type == "stop").source == "proxy"
        await client.say(feed.Wake(id=3, machine=ID, deadline_ms=5_000))
        assert (await client.hear(feed.WakeResult)).ok


@pytest.mark.parametrize("memory_mb", [256, 4096])
async def test_an_idle_machine_is_suspended_and_resumed_where_it_may_be(tmp_path: Path, memory_mb: int) -> None:
    world = World(tmp_path)
    world.capacity = Capacity(cpus=8, memory_mib=8192)
    async with asleep_soon(world, tmp_path, idle_window_s=0.05) as (agent, client):
        guest = Guest(cpus=1 if memory_mb == 256 else 2, memory_mb=memory_mb)
        await agent.create(config=config(services=[service(autostop="suspend")], guest=guest))
        await agent.wait("started")
        await client.say(load(seq=5))
        asked = await client.hear(feed.Drain)
        await client.say(feed.Drained(id=asked.id, machine=ID, result="drained"))
        asleep = "suspended" if memory_mb == 256 else "stopped"
        await agent.wait(asleep)
        await client.say(feed.Wake(id=3, machine=ID, deadline_ms=5_000))
        assert (await client.hear(feed.WakeResult)).ok
        assert world.driver.resumes.get(ID, 0) == (asleep == "suspended")


async def test_a_request_in_between_keeps_it_up(tmp_path: Path) -> None:
    async with asleep_soon(World(tmp_path), tmp_path, idle_window_s=0.05) as (agent, client):
        await agent.create()
        await agent.wait("started")
        await client.say(load(seq=5))
        asked = await client.hear(feed.Drain)
        await client.say(feed.Drained(id=asked.id, machine=ID, result="busy", in_flight=1))
        await client.say(load(in_flight=1, seq=6, idle_ms=0))
        await until(agent.get, lambda m: m.state == "started", within_s=15)


@pytest.mark.parametrize(
    ("why", "told"),
    [
        ("busy", "1 request or connections are open"),
        ("floor", "min_machines_running keeps 1 awake, and 1 are"),
        ("leased", "somebody holds a lease of it, "),
        ("held", "it holds itself awake until "),
        ("off", "auto_stop_machines is off for port 8080"),
        ("silent proxy", "no proxy has said yet how busy it is"),
        ("owes an answer", "its new version has not answered a request yet"),
    ],
)
async def test_what_keeps_a_machine_awake(tmp_path: Path, why: str, told: str) -> None:
    world = World(tmp_path)
    world.prober.http_status = 0 if why == "owes an answer" else 200
    async with world.agent() as agent:
        served = Feed(
            node="n1",
            region="iad",
            clock=world.clock,
            snapshot=lambda: (0, []),
            on_wake=Wakes(agent.host).wake,
            on_log=Rig()._log,
        )
        idle = Idle(agent.host, served, idle_window_s=0)
        kept = service(
            min_machines_running=1 if why == "floor" else 0,
            autostop="off" if why == "off" else "stop",
            ports=[Port(port=80, handlers=["http"])],
        )
        await agent.create(config=config(services=[kept]), lease_ttl_s=60 if why == "leased" else 0)
        await agent.wait("started")
        if why == "held":
            await agent.host.hold(ID, 60, "a job is under way")
        if why != "owes an answer":
            await agent.until(lambda m: m.events[0].type == "answer")
        async with serving(served, tmp_path) as path, proxy(path) as client:
            await client.hear(feed.Snapshot)
            assert idle.choose() == [], "nothing is decided before the proxy said what it serves"
            if why != "silent proxy":
                await client.say(load(in_flight=1 if why == "busy" else 0))

                async def heard() -> bool:
                    return served.load(ID) is not None

                await until(heard, bool, within_s=15, every_s=0.005)
            assert idle.choose() == []
            (sentence,) = idle.why_awake(ID)
            assert sentence.startswith(told)
            assert idle.why_awake("00000000000000") == []
        assert (await agent.call(node.GetMachine(machine_id=ID))).state == "started"
