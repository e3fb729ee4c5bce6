"""The agent as a whole: opens its stores, adopts the machines, then serves proxy and control side by side.

Cancelling `run` leaves every machine running: nothing of theirs lives in this process.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc
import msgspec
import structlog

from pantala.agent import parts
from pantala.agent.api import NodeApi
from pantala.agent.certs import EdgeCertificates
from pantala.agent.context import Context, Pace
from pantala.agent.doors import Doors
from pantala.agent.escape import EscapeSuites
from pantala.agent.feed import Feed
from pantala.agent.fencing import Fencing
from pantala.agent.governor import Governor, Subject
from pantala.agent.guest_api import GuestApi
from pantala.agent.host import Capacity, Host
from pantala.agent.identity import ControlClient, Identity, Renewal
from pantala.agent.idle import Idle
from pantala.agent.late_bus import LateBus
from pantala.agent.overdue import Overdue
from pantala.agent.peers import Peers
from pantala.agent.policies import Policies
from pantala.agent.prober import SocketProber
from pantala.agent.queries import Queries
from pantala.agent.schedules import Schedules
from pantala.agent.seating import Seating
from pantala.agent.settings import AgentSettings
from pantala.agent.ssh import SshDoors
from pantala.agent.streams import Streams
from pantala.agent.subset import Subset
from pantala.agent.wakes import Wakes
from pantala.catalogue import Publisher, Replica, Trust, View
from pantala.catalogue.store import CatalogueStore
from pantala.domain.machine import State
from pantala.errors import PantalaError
from pantala.journal import Journal
from pantala.kit.clock import Clock, SystemClock, unix_ms
from pantala.kit.rows import Row
from pantala.kit.sealing import Opener, Signer, ensure_key
from pantala.logs.collector import Collector, timestamp
from pantala.logs.store import LogStore
from pantala.wire import feed, node
from pantala.wire.api import LogLine

log = structlog.get_logger()

OUTCOMES_KEPT_S = 24 * 3600
DESTROYED_KEPT_S = 24 * 3600
FENCES_KEPT_S = 90 * 24 * 3600
PRUNE_IMAGES_EVERY_S = 3600.0
GIB_MIB = 1024


class _Stores(msgspec.Struct, frozen=True):
    journal: Journal
    catalogue: CatalogueStore
    logs: LogStore


@asynccontextmanager
async def _stores(settings: AgentSettings) -> AsyncGenerator[_Stores]:
    state = settings.state_dir
    async with (
        Journal.open(state / "journal.db") as journal,
        CatalogueStore.open(state / "catalogue.db") as catalogue,
        LogStore.open(
            state / "logs.db", lines_per_app_max=settings.log_lines_per_app_max, keep_s=settings.log_keep_s
        ) as logs,
    ):
        yield _Stores(journal, catalogue, logs)


async def run(settings: AgentSettings, *, task_status: anyio.abc.TaskStatus[Host] = anyio.TASK_STATUS_IGNORED) -> None:
    """Until cancelled. `started` once machines are adopted and the proxy can connect."""
    for folder in (settings.state_dir, settings.run_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    async with _stores(settings) as stores, anyio.create_task_group() as tasks:
        host = await _compose(settings, stores, SystemClock(), tasks)
        task_status.started(host)
        await anyio.sleep_forever()


async def _compose(settings: AgentSettings, stores: _Stores, clock: Clock, tasks: anyio.abc.TaskGroup) -> Host:
    node_key = Opener(ensure_key(settings.node_key or settings.state_dir / "keys" / "sealing"))
    signer = Signer(ensure_key(settings.signing_key or settings.state_dir / "keys" / "signing"))
    bus = LateBus()

    view = View(control=settings.control)
    control = ControlClient(bus, signer, clock, node=settings.node)
    fencing = Fencing(view, stores.journal, node=settings.node)
    trust = Trust(view, settings.trusted_keys | {settings.node: signer.verify_key}, own=settings.node)
    publisher = Publisher(
        stores.catalogue,
        view,
        bus,
        signer,
        clock,
        owner=settings.node,
        epoch=settings.epoch,
        new_epoch=control.new_epoch,
        holders=trust.others,
        beat_s=settings.beat_s,
    )
    replica = Replica(
        stores.catalogue,
        view,
        bus,
        clock,
        trust.key_of,
        own=settings.node,
        holders=trust.others,
        gossip_s=settings.gossip_s,
    )
    await publisher.open()
    await replica.open()
    await fencing.open()

    first_edge_key = Opener(ensure_key(settings.edge_key)) if settings.edge_key else None
    certificates = EdgeCertificates(view, node_key, node=settings.node, first=first_edge_key)

    driver = parts.driver(settings, clock)
    collector = Collector(stores.logs, driver, bus, clock, node=settings.node, region=settings.region)
    policies = Policies()
    policies.take(view.all())
    view.listen(lambda _, rows: policies.take(rows))
    network = parts.network(settings, clock)

    def running() -> Iterator[Subject]:
        return subjects()

    seating = Seating(driver, clock, subjects=running)
    context = Context(
        node=settings.node,
        region=settings.region,
        journal=stores.journal,
        driver=driver,
        network=network,
        images=parts.images(settings, clock),
        prober=SocketProber(),
        rows=publisher,
        logs=collector,
        clock=clock,
        node_key=node_key,
        pace=Pace(drain_s=settings.drain_s),
        nameserver=settings.nameserver,
        ssh=SshDoors(view, ensure_key(settings.state_dir / "keys" / "ssh")),
        policies=policies,
        preparing=anyio.Semaphore(max(2, os.cpu_count() or 1)),
        seating=seating,
    )

    async def on_wake(machine_id: str, deadline_s: float) -> feed.WakeResult:
        return await wakes.wake(machine_id, deadline_s)

    async def on_log(frame: feed.ProxyLog) -> None:
        code = f"[{frame.code}] " if frame.code else ""
        message = f"{code}{frame.message}" + (f" request={frame.request_id}" if frame.request_id else "")
        await collector.proxy_line(app=frame.app, machine_id=frame.machine, message=message)

    proxy = Feed(
        node=settings.node,
        region=settings.region,
        clock=clock,
        snapshot=lambda: (view.revision, certificates.for_proxy(view.all())),
        on_wake=on_wake,
        on_log=on_log,
    )
    view.listen(lambda revision, rows: proxy.push(revision, certificates.changed(rows)))
    host = Host(context, tasks, proxy, capacity=_capacity(settings), pool4=settings.pool4, newest=fencing.newest)
    wakes = Wakes(host)
    subjects = _subjects(host)

    async def read_logs(request: node.ReadLogs) -> list[LogLine]:
        limit = min(max(request.limit, 1), 5_000)
        lines = await stores.logs.read(request.app, machine=request.machine_id, since_ns=request.since_ns, limit=limit)
        return [
            LogLine(
                timestamp=timestamp(line.at_ns),
                message=line.message,
                level=line.level,
                instance=line.machine,
                region=settings.region,
                provider=line.provider,
            )
            for line in lines
        ]

    escapes = EscapeSuites(
        host,
        state_dir=settings.state_dir,
        pool4=settings.pool4,
        addresses=[settings.address, *settings.edge_addresses],
        after_s=settings.escape_suite_after_s,
    )
    idle = Idle(host, proxy, idle_window_s=settings.idle_window_s, mode=settings.autostop_mode)
    governor = Governor(driver, clock, subjects=subjects, file=settings.run_dir / "cpu-balances.json")
    queries = Queries(
        host,
        read_logs=read_logs,
        trace=proxy.trace,
        state_dir=settings.state_dir,
        zone=settings.zone,
        cpu=governor.shown,
        why_awake=idle.why_awake,
        escapes=escapes,
    )
    streams = Streams(host)
    tasks.start_soon(streams.run)
    api = NodeApi(host, queries, streams)
    host.callers = GuestApi(api.handle, host.hold)
    sentence = await host.adopt()
    log.info("machines adopted", node=settings.node, summary=sentence)
    said = _node_row(settings, queries.node(), signer.verify_key)
    await _announce(host, said)

    if (links := parts.peer_links(settings)) is not None:
        peers = Peers(settings.node, links, clock)
        peers.take(view.all())
        view.listen(lambda _, rows: peers.take(rows))
        tasks.start_soon(peers.run)
    if (leading := parts.entrances(settings)) is not None:
        doors = Doors(leading, clock, edge=settings.edge_addresses, own=[settings.address])
        doors.take(view.all())
        view.listen(lambda _, rows: doors.take(rows))
        tasks.start_soon(doors.run)
    tasks.start_soon(policies.run, network, clock, lambda: list(host.machines.values()))
    tasks.start_soon(fencing.run, host)
    tasks.start_soon(governor.run)
    tasks.start_soon(seating.run)

    await tasks.start(proxy.serve, settings.socket)
    tasks.start_soon(bus.run, settings.bus, f"agent-{settings.node}")
    await tasks.start(publisher.run)
    await tasks.start(replica.run)
    tasks.start_soon(trust.follow, replica)
    tasks.start_soon(_greet, bus, publisher, replica)
    await bus.serve(f"pantala.node.{settings.node}.call", api.call)
    tasks.start_soon(idle.run, tasks)
    tasks.start_soon(Schedules(host, catch_up_s=settings.schedule_catch_up_s).run)
    tasks.start_soon(Overdue(host).run)
    tasks.start_soon(context.images.run, clock)
    tasks.start_soon(escapes.run_when_due)
    tasks.start_soon(_tidy, settings, stores, host, clock)
    identity = Identity(settings.identity or settings.state_dir / "identity", settings.state_dir / "keys")
    if identity.exists:
        renewal = Renewal(identity, control, clock, before_s=settings.renew_before_s, every_s=settings.renew_every_s)
        tasks.start_soon(renewal.run)
    tasks.start_soon(_keep_node_row, settings, host, queries, signer.verify_key, said)
    return host


async def _greet(bus: LateBus, publisher: Publisher, replica: Replica) -> None:
    """What was said before the bus was there reached nobody, and the next beat may be long away."""
    await bus.connected.wait()
    await publisher.beat()
    replica.hurry()


def _subjects(host: Host) -> Callable[[], Iterator[Subject]]:
    """Machines whose processes are there and have been started."""
    running = Subset(host, lambda record: record.runtime == "running")

    def subjects() -> Iterator[Subject]:
        for record in (task.record for task in running.tasks()):
            is_awake = record.state is not State.SUSPENDED
            yield Subject(record.id, record.runtime_instance, record.version.config, is_awake)

    return subjects


def _capacity(settings: AgentSettings) -> Capacity:
    """What the machine has, less what the platform itself needs, unless the operator said otherwise."""
    memory_mib = settings.memory_mib
    if not memory_mib:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (1 << 20)
        memory_mib = max(physical - max(512, physical // 10), 256)
    cpus = settings.cpus or os.cpu_count() or 1
    return Capacity(cpus=cpus, memory_mib=memory_mib, machines_max=settings.machines_max)


def _node_row(
    settings: AgentSettings, info: node.NodeInfo, verify_key: str, *, said: feed.NodeRow | None = None
) -> feed.NodeRow:
    wireguard_key, wireguard = parts.wireguard_row(settings)
    return feed.NodeRow(
        id=info.id,
        region=info.region,
        zone=info.zone,
        address=settings.address,
        verify_key=verify_key,
        sealing_key=info.sealing_key,
        cpus=info.cpus,
        memory_mib=info.memory_mib,
        cpus_free=info.cpus_free,
        memory_mib_free=info.memory_mib_free,
        version=info.version,
        mesh=settings.mesh,
        wireguard_key=wireguard_key,
        wireguard=wireguard,
        disk_mib_free=disk_shown(info.disk_mib_free, said.disk_mib_free if said else None),
        driver=info.driver,
        isolation=info.isolation,
    )


async def _announce(host: Host, row: feed.NodeRow) -> None:
    await host.announce([Row("nodes", f"node/{row.id}", msgspec.to_builtins(row))])


def disk_shown(free_mib: int, said_mib: int | None) -> int:
    """In whole GiB, and what was said before while it is about true: a log that grows and is trimmed is no news, and
    every host would have to hear it."""
    if said_mib is not None and said_mib <= free_mib < said_mib + 2 * GIB_MIB:
        return said_mib
    return free_mib // GIB_MIB * GIB_MIB


async def _keep_node_row(
    settings: AgentSettings, host: Host, queries: Queries, verify_key: str, said: feed.NodeRow
) -> None:
    """What is free changes with the machines; placement may learn it a little later."""
    while True:
        await host.context.clock.tick(5.0)
        said = _node_row(settings, queries.node(), verify_key, said=said)
        try:
            await _announce(host, said)
        except PantalaError as error:
            log.warning("node row not published", error=str(error))


async def _tidy(settings: AgentSettings, stores: _Stores, host: Host, clock: Clock) -> None:
    """Forget what is kept for a time only: outcomes, destroyed machines, tombstones, old lines, unused images."""
    pruned_at = clock.monotonic()
    while True:
        await clock.sleep(settings.tidy_every_s)
        now_ms = unix_ms(clock.now())
        try:
            await stores.journal.forget(
                outcomes_before_ms=now_ms - OUTCOMES_KEPT_S * 1000,
                destroyed_before_ms=now_ms - DESTROYED_KEPT_S * 1000,
                fences_before_ms=now_ms - FENCES_KEPT_S * 1000,
            )
            await stores.catalogue.forget_tombstones(now_ms - int(settings.tombstones_kept_s * 1000))
            await stores.logs.trim(now_ms * 1_000_000)
            if clock.monotonic() - pruned_at >= PRUNE_IMAGES_EVERY_S:
                pruned_at = clock.monotonic()
                await host.context.images.prune(_images_in_use(host))
        except PantalaError as error:
            log.warning("tidying failed; tried again later", error=str(error))


def _images_in_use(host: Host) -> set[str]:
    versions = [v for task in host.machines.values() for v in (task.record.version, task.record.next_version) if v]
    images = [image for v in versions for image in (v.image, *(other.image for other in v.other_images.values()))]
    return {image.digest for image in images if image.digest}
