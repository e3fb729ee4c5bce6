"""What every use case is given: store, node client, rows, clock, keys, and the settings that concern it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import msgspec
from sqlalchemy import Connection

from pantala.auth.grants import Principal
from pantala.client.node import NodeClient
from pantala.control.keys import ClusterKey
from pantala.kit.clock import Clock, unix_ms
from pantala.store import ledger
from pantala.store.database import Database
from pantala.store.records import AppRecord
from pantala.wire.server import AUDIT_KEPT_S, AddressPools

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the API request being served; the audit log and node calls name it."""
origin: ContextVar[str] = ContextVar("origin", default="")
"""Address of the client that sent it, as the edge or the connection says; the audit log names it."""


class ControlSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`registry` is the name that images carry (`registry.<domain>[:port]`). `api_backend` and `registry_backend` are
    `ip:port` as edges reach them, `registry_url` is where hosts pull from. `shared_kernel`: orgs may share a host whose
    machines are not VMs. `beat_s`: how often hosts say that they are there. `bus_hubs`, `bus_routes`, `edge_addresses`
    and `closed_addresses`: see `wire/hosts.py`; `pools` and what follows: `wire/server.py`; `writers`:
    by bucket the orgs whose deploys may put files there (`wire/feed.py`)."""

    app_domain: str
    platform_domain: str
    registry: str
    default_region: str
    regions: tuple[str, ...]
    api_backend: str = ""
    registry_backend: str = ""
    registry_url: str = ""
    shared_kernel: bool = False
    beat_s: float = 1.0
    bus_hubs: tuple[str, ...] = ()
    bus_routes: tuple[str, ...] = ()
    edge_addresses: tuple[str, ...] = ()
    closed_addresses: tuple[str, ...] = ()
    pools: AddressPools = AddressPools()
    acme_directory: str = ""
    acme_ca_file: str = ""
    acme_email: str = ""
    acme_eab_kid: str = ""
    acme_eab_key_file: str = ""
    sign_names: bool = False
    resolvers: tuple[str, ...] = ()
    standby_after_s: float = 0.0
    audit_kept_s: float = AUDIT_KEPT_S
    writers: dict[str, list[str]] = {}


class Context:
    """`boot` names this life of the process: what an earlier life left half done can be told apart."""

    def __init__(
        self, *, db: Database, nodes: NodeClient, clock: Clock, key: ClusterKey, settings: ControlSettings, boot: str
    ) -> None:
        self.db = db
        self.nodes = nodes
        self.clock = clock
        self.key = key
        self.settings = settings
        self.boot = boot

    def now_ms(self) -> int:
        return unix_ms(self.clock.now())

    def audit(
        self,
        connection: Connection,
        *,
        actor: str,
        org_id: int | None,
        action: str,
        target: str,
        detail: dict[str, Any] | None = None,
        outcome: str = "accepted",
    ) -> int:
        """Who did what now, in the transaction that does it, with the id of the request being served and where it came
        from. What ends later gets its `outcome` by `ledger.note_outcome`."""
        return ledger.write_audit(
            connection,
            at_ms=self.now_ms(),
            actor=actor,
            org_id=org_id,
            action=action,
            target=target,
            request_id=request_id.get(),
            origin=origin.get(),
            outcome=outcome,
            detail=detail,
        )

    def audit_app(self, connection: Connection, principal: Principal, app: AppRecord, action: str, part: str) -> int:
        """The same of a part of an app: a machine, a name, an address."""
        return self.audit(
            connection, actor=principal.email, org_id=app.org_id, action=action, target=f"{app.name}/{part}"
        )
