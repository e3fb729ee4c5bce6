"""Rows as the use cases see them, and how a result becomes them."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection
from sqlalchemy.sql.base import Executable

R = TypeVar("R")


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


class OrgRecord(_Record, frozen=True, kw_only=True):
    id: int
    slug: str
    name: str


class ReplayRulesRecord(_Record, frozen=True, kw_only=True):
    """`org` and `sources` are slugs."""

    org: str
    cross_network: bool
    sources: list[str]


class TokenRecord(_Record, frozen=True, kw_only=True):
    """`role`: user (follows the memberships), admin, member, deploy, read."""

    id: str
    name: str
    user_id: str
    email: str
    role: str
    org_id: int | None
    app_id: int | None
    expires_at_ms: int


class TokenRow(_Record, frozen=True, kw_only=True):
    """A token as lists show it; `email` is who issued it."""

    id: str
    name: str
    email: str
    role: str
    org_id: int | None
    org_slug: str | None
    app: str | None
    created_at_ms: int
    expires_at_ms: int


class AuditRecord(_Record, frozen=True, kw_only=True):
    """`org`: slug; None for what was done to the platform. `detail`: a JSON object."""

    id: int
    at_ms: int
    actor: str
    org: str | None
    action: str
    target: str
    detail: str
    request_id: str
    origin: str
    outcome: str

    def details(self) -> dict[str, Any]:
        return msgspec.json.decode(self.detail, type=dict[str, Any])


class MembershipRecord(_Record, frozen=True, kw_only=True):
    org_id: int
    user_id: str
    role: str


class AppRecord(_Record, frozen=True, kw_only=True):
    id: int
    name: str
    org_id: int
    org_slug: str
    org_name: str
    network_id: int
    network: str
    role: str
    status: str
    secrets_version: int
    created_at_ms: int


class SecretRecord(_Record, frozen=True, kw_only=True):
    name: str
    sealed: str
    digest: str
    created_at_ms: int
    updated_at_ms: int


class SecretKeyRecord(_Record, frozen=True, kw_only=True):
    name: str
    type: str
    sealed: str
    public_key: str
    created_at_ms: int
    updated_at_ms: int


class NetworkPolicyRecord(_Record, frozen=True, kw_only=True):
    id: str
    app_id: int
    app: str
    name: str
    document: str
    created_at_ms: int
    updated_at_ms: int


class ReleaseRecord(_Record, frozen=True, kw_only=True):
    id: str
    app_id: int
    version: int
    status: str
    image: str
    definition: str
    description: str
    strategy: str
    user: str
    reason: str
    plan: str
    cursor: int
    created_at_ms: int
    updated_at_ms: int


class NodeRecord(_Record, frozen=True, kw_only=True):
    """`status`: active, draining, lost, removed. Keys are those that the node joined with."""

    id: str
    region: str
    zone: str
    status: str
    address: str
    edge: bool
    sealing_key: str
    verify_key: str
    bus_key: str
    epoch: int
    certificate_until_ms: int
    created_at_ms: int


class HostTokenRecord(_Record, frozen=True, kw_only=True):
    """`region` empty: any. `used_at_ms` None: not redeemed yet."""

    id: str
    region: str
    expires_at_ms: int
    used_at_ms: int | None


class EdgeKeyRecord(_Record, frozen=True, kw_only=True):
    id: int
    public_key: str
    sealed_key: str


class PlacementRecord(_Record, frozen=True, kw_only=True):
    """`config` is the JSON text that the user submitted, `snapshot` that of the newest machine answered to a caller."""

    machine_id: str
    app_id: int
    name: str
    node: str
    region: str
    generation: int
    phase: str
    tombstone: bool
    boot: str
    config: str
    snapshot: str
    created_at_ms: int
    updated_at_ms: int


class MoveRecord(_Record, frozen=True, kw_only=True):
    """`launch`: the copy is started, not only made ready."""

    machine_id: str
    generation: int
    source: str
    target: str | None
    phase: str
    launch: bool
    created_at_ms: int
    updated_at_ms: int


class TakeoverRecord(_Record, frozen=True, kw_only=True):
    """`standby_id` is to be started in the place of `watched_id`."""

    standby_id: str
    watched_id: str
    since_ms: int


class CertificateRecord(_Record, frozen=True, kw_only=True):
    """`name` is the key of its row; `hostname` whose it is, empty for the platform's own."""

    name: str
    names: str
    chain_pem: str
    sealed_key: str
    sealed_to: str
    not_after_ms: int
    issued_at_ms: int
    hostname: str = ""
    source: str = "platform"
    kept_key: str = ""
    alpn: str = ""


class HostnameRecord(_Record, frozen=True, kw_only=True):
    """`app` is the app's name."""

    hostname: str
    app_id: int
    app: str
    org_id: int
    created_at_ms: int
    updated_at_ms: int
    acme_requested: bool
    validation: str
    owned: bool
    failures: int
    errors: str
    failed_at_ms: int
    look_at_ms: int
    limited_until_ms: int


class OrderRecord(_Record, frozen=True, kw_only=True):
    hostname: str
    directory: str
    challenge: str
    url: str
    kept_key: str
    created_at_ms: int


class AnswerRecord(_Record, frozen=True, kw_only=True):
    hostname: str
    kind: str
    name: str
    value: str


class AcmeAccountRecord(_Record, frozen=True, kw_only=True):
    directory: str
    url: str
    kept_key: str
    created_at_ms: int


class TicketKeyRecord(_Record, frozen=True, kw_only=True):
    id: int
    kept_key: str
    sealed_key: str
    sealed_to: str
    not_before_ms: int
    not_after_ms: int


class AddressRecord(_Record, frozen=True, kw_only=True):
    """`kind`: v4, v6, private_v6 and, of shared ones, shared_v4. `app` is empty when it was released."""

    address: str
    kind: str
    app_id: int | None
    app: str
    network_id: int | None
    created_at_ms: int
    released_at_ms: int | None


class IdempotencyRecord(_Record, frozen=True, kw_only=True):
    digest: str
    boot: str
    code: int | None
    sealed_answer: str | None


def find(connection: Connection, statement: Executable, kind: type[R]) -> R | None:
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else _record(row, kind)


def many(connection: Connection, statement: Executable, kind: type[R]) -> list[R]:
    return [_record(row, kind) for row in connection.execute(statement).mappings()]


def _record(row: Any, kind: type[R]) -> R:
    return msgspec.convert({str(key): value for key, value in row.items()}, type=kind)  # keys may be quoted names
