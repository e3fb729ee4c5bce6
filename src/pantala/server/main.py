"""The server process: API and control's tasks as one task group, ended together.

`python -m pantala.server --settings FILE`. Started by `pantala up` and by systemd; SIGTERM and SIGINT end it after the
requests in flight.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import structlog

from pantala.control.contexts import Bounds
from pantala.control.keys import ClusterKey
from pantala.control.lease import PublisherLease
from pantala.control.service import Control, make_context
from pantala.errors import PantalaError
from pantala.kit import lean
from pantala.kit.bus_nats import connect
from pantala.kit.clock import SystemClock
from pantala.kit.sealing import Signer, ensure_key
from pantala.server import settings as read_settings
from pantala.server.app import make_app
from pantala.server.compose import Parts, compose
from pantala.server.http import HttpServer
from pantala.server.limits import Bucket, RateLimits
from pantala.store.database import open_database
from pantala.telemetry import configure
from pantala.wire.hosts import CONTROL_CALL
from pantala.wire.server import ServerSettings

log = structlog.get_logger()

SWITCH_S = 0.0005
"""A statement with many rows keeps a thread busy, and every step of every request waits so long for its turn."""


async def serve(settings: ServerSettings, join: Callable[..., AbstractAsyncContextManager[Parts]] = compose) -> None:
    """Until a signal or a failure of any part. `join` is another composition in tests."""
    sys.setswitchinterval(SWITCH_S)
    lean.collect_rarely()
    host, port = read_settings.address_of(settings.listen)
    clock = SystemClock()
    key = ClusterKey.load(read_settings.cluster_key_path(settings))
    db = open_database(read_settings.database_path(settings))
    try:
        where = settings.bus
        async with connect(
            where.url,
            user=where.user,
            password=where.password,
            credentials=where.credentials,
            inbox=where.inbox,
            name=settings.id,
            echo=False,
        ) as bus:
            context = make_context(
                db=db, bus=bus, clock=clock, key=key, settings=read_settings.control_settings(settings)
            )
            lease = PublisherLease(context, settings.id)
            epoch = await lease.acquire()
            async with join(settings, bus=bus, clock=clock, epoch=epoch) as parts:
                control = Control(
                    context,
                    sink=parts.sink,
                    registry=parts.registry,
                    builder=parts.builder,
                    objects=parts.objects,
                    state_dir=Path(settings.state_dir),
                    sightings=parts.sightings,
                    control_key=Signer(ensure_key(read_settings.signing_key_path(settings))).verify_key,
                    lease=lease,
                    bounds=Bounds(upload_bytes=settings.build_upload_bytes_max),
                )
                await bus.serve(CONTROL_CALL, control.calls.handle)
                async with anyio.create_task_group() as tasks:
                    await tasks.start(control.run)
                    limits = RateLimits(
                        clock,
                        per_s=settings.requests_per_s_max,
                        burst=settings.requests_burst,
                        machine_read=Bucket(settings.machine_reads_per_s_max, settings.machine_reads_burst),
                        app_deletion=Bucket(settings.app_deletions_per_min_max / 60, settings.app_deletions_burst),
                    )
                    log.info("serving", listen=settings.listen, epoch=lease.epoch)
                    server = HttpServer(
                        make_app(
                            control,
                            limits,
                            at_once=settings.requests_at_once_max,
                            waits=settings.waits_at_once_max,
                        ),
                        host,
                        port,
                    )
                    tasks.start_soon(_stop_on_signal, server)
                    await server.run_until_stopped()
                    tasks.cancel_scope.cancel()
    finally:
        db.close()


async def _stop_on_signal(server: HttpServer) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name)
            server.stop()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pantala.server", description="The control plane's server.")
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of ServerSettings")
    chosen = parser.parse_args(arguments)
    failures: list[str] = []
    configure(program="server")
    try:
        anyio.run(serve, read_settings.read(chosen.settings), backend_options={"use_uvloop": True})
    except* PantalaError as group:
        failures = _leaves(group)
    for failure in failures:
        sys.stderr.write(f"pantala server: {failure}\n")
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[PantalaError]) -> list[str]:
    found: list[str] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found += _leaves(error)
        else:
            found.append(error.sentence())
    return found
