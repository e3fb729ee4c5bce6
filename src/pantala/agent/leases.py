"""Leases: short exclusive claims of API callers. Pure; wakes and restart policies do not ask here."""

from __future__ import annotations

import secrets

from pantala.errors import InvalidRequest, LeaseHeld, NotFound
from pantala.journal import LeaseRecord, MachineRecord
from pantala.wire.api import Lease
from pantala.wire.machine import LeaseView

TTL_S_MAX = 3600


def current(record: MachineRecord, now_ms: int) -> LeaseRecord | None:
    lease = record.lease
    return lease if lease is not None and lease.expires_at_ms > now_ms else None


def check(record: MachineRecord, nonce: str, now_ms: int) -> None:
    """Raises LeaseHeld when another caller holds the machine."""
    lease = current(record, now_ms)
    if lease is not None and not secrets.compare_digest(lease.nonce, nonce):
        raise LeaseHeld(f"lease currently held by {lease.owner}")


def acquire(record: MachineRecord, *, nonce: str, ttl_s: int, owner: str, description: str, now_ms: int) -> LeaseRecord:
    """A new lease, or the same one for longer when the nonce is right."""
    if not 1 <= ttl_s <= TTL_S_MAX:
        raise InvalidRequest(f"{ttl_s} is not between 1 and {TTL_S_MAX} seconds", field="ttl")
    check(record, nonce, now_ms)
    held = current(record, now_ms)
    if nonce and held is None:
        raise NotFound("lease not found")
    return LeaseRecord(
        nonce=held.nonce if held else secrets.token_hex(8),
        owner=held.owner if held else owner,
        description=description or (held.description if held else ""),
        expires_at_ms=now_ms + ttl_s * 1000,
        version=record.latest.instance_id,
    )


def get(record: MachineRecord, now_ms: int) -> LeaseRecord:
    lease = current(record, now_ms)
    if lease is None:
        raise NotFound("lease not found")
    return lease


def release_check(record: MachineRecord, nonce: str, now_ms: int) -> None:
    get(record, now_ms)
    check(record, nonce, now_ms)


def without_nonce(lease: LeaseRecord) -> LeaseView:
    return LeaseView(description=lease.description, expires_at=lease.expires_at_ms // 1000, owner=lease.owner)


def shown(lease: LeaseRecord) -> Lease:
    return Lease(
        nonce=lease.nonce,
        expires_at=lease.expires_at_ms // 1000,
        owner=lease.owner,
        description=lease.description,
        version=lease.version,
    )
