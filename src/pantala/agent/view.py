"""A machine's record as the API's document and as rows of the catalogue. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from pantala.domain import suspend, validate
from pantala.domain.machine import TERMINAL
from pantala.domain.process import process_group
from pantala.journal import MachineRecord
from pantala.kit.clock import rfc3339_ms
from pantala.kit.rows import Row
from pantala.wire.feed import MachineRow, ServiceRow
from pantala.wire.machine import (
    CheckStatus,
    Concurrency,
    ContainerStatus,
    Event,
    Hold,
    LeaseView,
    Machine,
    MachineConfig,
    MachineCPU,
    ScheduledRun,
    ScheduleStatus,
    Service,
    Static,
)

METADATA_BYTES_MAX = 128


def machine(
    record: MachineRecord,
    *,
    node: str,
    isolation: str,
    events: list[Event],
    checks: list[CheckStatus],
    nonce: str | None = None,
    cpu: MachineCPU | None = None,
    lease: LeaseView | None = None,
    containers: list[ContainerStatus] | None = None,
) -> Machine:
    latest = record.latest
    return Machine(
        id=record.id,
        name=record.name,
        state=str(record.state),
        region=record.region,
        instance_id=latest.instance_id,
        version=latest.instance_id,
        private_ip=record.ip6,
        created_at=rfc3339_ms(record.created_at_ms),
        updated_at=rfc3339_ms(record.updated_at_ms),
        image_ref=latest.image,
        events=events,
        checks=checks,
        host_status="ok",
        cordoned=record.cordoned,
        config=latest.config,
        nonce=nonce,
        node=node,
        isolation=isolation,
        cpu=cpu,
        schedule=_schedule(record),
        hold=Hold(until=rfc3339_ms(record.hold.until_ms), reason=record.hold.reason) if record.hold else None,
        lease=lease,
        containers=containers,
        other_images={name: other.image for name, other in latest.other_images.items()} or None,
    )


def _schedule(record: MachineRecord) -> ScheduleStatus | None:
    kept = record.schedule
    if kept is None:
        return None
    return ScheduleStatus(
        next_run=rfc3339_ms(kept.next_ms),
        runs=[ScheduledRun(due_at=rfc3339_ms(run.due_ms), outcome=run.outcome, reason=run.reason) for run in kept.runs],
    )


def autostop(config: MachineConfig) -> Literal["off", "stop", "suspend"]:
    """The setting of a machine with several services: the least aggressive one wins. What cannot be suspended is
    stopped."""
    settings = {validate.autostop(service) for service in config.services or []} or {"off"}
    if "off" in settings:
        return "off"
    return "stop" if "stop" in settings or suspend.why_not(config) else "suspend"


def wants_wake(config: MachineConfig) -> bool:
    return any(service.autostart for service in config.services or [])


def service_row(app: str, service: Service, statics: Sequence[Static] = ()) -> ServiceRow:
    stop = validate.autostop(service)
    return ServiceRow(
        app=app,
        protocol=service.protocol or "tcp",
        internal_port=service.internal_port or 0,
        ports=service.ports or [],
        concurrency=service.concurrency or Concurrency(),
        autostart=bool(service.autostart),
        autostop="stop" if stop == "stop" else "suspend" if stop == "suspend" else "off",
        min_machines_running=service.min_machines_running or 0,
        checked=bool(service.checks),
        statics=list(statics),
    )


def service_rows(record: MachineRecord) -> list[Row]:
    """One row per service, in the config's order; machines with equal services share them."""
    out: list[Row] = []
    config = record.version.config
    for service in config.services or []:
        value = msgspec.to_builtins(service_row(record.app.name, service, config.statics or ()))
        digest = hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:16]
        out.append(Row("routes", f"svc/{record.app.name}/{digest}", value))
    return out


def named_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The user's own entries that fit a row, short ones first: rows are small, and clients' entries have no names."""
    own = {key: value for key, value in metadata.items() if not key.startswith("fly_") and key != "process_group"}
    kept: dict[str, str] = {}
    room = METADATA_BYTES_MAX
    for key, value in sorted(own.items(), key=lambda entry: (len(entry[0]) + len(entry[1]), entry[0])):
        room -= len(key.encode()) + len(value.encode())
        if room < 0:
            break
        kept[key] = value
    return kept


def machine_row(record: MachineRecord, *, node: str, passing: Sequence[bool], ready_at_ms: int) -> Row:
    """The row of one machine; null once it is gone."""
    key = f"m/{record.id}"
    if record.state in TERMINAL:
        return Row("routes", key, None)
    config = record.version.config
    metadata = config.metadata or {}
    row = MachineRow(
        id=record.id,
        app=record.app.name,
        region=record.region,
        node=node,
        instance_id=record.version.instance_id,
        generation=record.generation,
        state=str(record.state),
        ip4=record.ip4,
        ip6=record.ip6,
        services=[row.key.rsplit("/", 1)[1] for row in service_rows(record)],
        passing=list(passing),
        cordoned=record.cordoned,
        group=process_group(metadata),
        dns=not (config.dns is not None and config.dns.skip_registration),
        ready_at_ms=ready_at_ms,
        metadata=named_metadata(metadata),
    )
    return Row("routes", key, msgspec.to_builtins(row))
