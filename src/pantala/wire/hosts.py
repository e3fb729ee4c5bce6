"""Hosts join, renew and leave: documents between a host and control, and what operators see of hosts.

`POST /v1/hosts/tokens` makes a one-time token; `POST /v1/hosts/join` redeems it (`JoinRequest` → `Joined`). The
token text is `pjt_` + base64url of a `TokenText`: where the API is, which authority its certificate must have, and
a secret. Afterwards a host speaks to control over the bus: subject `pantala.control.call`, body one `SignedCall`,
answer one `NodeReply`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

NODE_DOMAIN = "node.pantala.internal"
"""A node's certificate has the one DNS name `<node id>.node.pantala.internal`."""

CONTROL_CALL = "pantala.control.call"


class TokenText(msgspec.Struct, frozen=True, kw_only=True):
    """`api`: URL; `address`: `ip:port` to connect to in place of the URL's host (no DNS is needed to join);
    `authority`: SHA-256 (hex) of the DER of the API certificate's authority, empty for a plain-HTTP API."""

    api: str
    address: str
    authority: str
    secret: str


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Public halves only. `node` empty: control names the host `<region>-<n>`; `region` empty: that of the token.
    `address`: where other hosts reach
    it. `edge`: it takes public traffic. `csr_pem`: for the node's certificate; `verify_key` (Ed25519) and
    `sealing_key` (X25519) are base64; `bus_key`: public nkey (`U…`) of the node's bus user."""

    token: str = ""
    node: str = ""
    region: str
    zone: str = ""
    address: str
    edge: bool = True
    verify_key: str
    sealing_key: str
    csr_pem: str
    bus_key: str


class BusAccess(msgspec.Struct, frozen=True, kw_only=True):
    """`user_jwt`: what the holder of the bus key may do. `operator_jwt`, `accounts` (public key to JWT) and
    `system_account` are what a hub needs to check users. `hubs`: `host:port` of the leaf listeners, `routes` of the
    cluster listeners between hubs. `hub`: this host is one."""

    user_jwt: str
    operator_jwt: str
    accounts: dict[str, str]
    system_account: str
    hubs: list[str]
    routes: list[str]
    hub: bool


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a host needs to run. `control_key`: verify key (base64) of control's catalogue rows.
    `edge_key_sealed`: the edge key, sealed to the node; empty when it is no edge. `registries`: registry name to
    base URL. `closed_addresses`: what machines must not reach. `members`: ids of the cluster's nodes now."""

    node: str
    region: str
    zone: str
    epoch: int
    certificate_pem: str
    authority_pem: str
    control_key: str
    edge_key_sealed: str
    bus: BusAccess
    registries: dict[str, str]
    api_backend: str
    app_domain: str
    platform_domain: str
    edge_addresses: list[str]
    closed_addresses: list[str]
    members: list[str]


class CreateHostTokenRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`region` empty: the host says it when it joins."""

    region: str = ""
    expires_in_s: int = 3600


class HostToken(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    token: str
    expires_at: str


class HostView(msgspec.Struct, frozen=True, kw_only=True):
    """One host as `host list` shows it. `reachable`: its agent answers now; the figures are 0 when it does not."""

    id: str
    region: str
    zone: str
    address: str
    edge: bool
    status: Literal["active", "draining", "lost", "removed"]
    reachable: bool
    version: str
    machines: int
    cpus: int
    memory_mib: int
    memory_mib_free: int
    joined_at: str
    certificate_until: str


class DrainHostRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`undo`: the host takes machines again."""

    undo: bool = False


class LeavingMachine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of a host that is drained or gone. `state`: `waiting` for its turn, `moving` (to `target`), or `stays`
    because of `reason`."""

    id: str
    app: str
    region: str
    state: Literal["waiting", "moving", "stays"]
    target: str = ""
    reason: str = ""


class HostDeparture(msgspec.Struct, frozen=True, kw_only=True):
    """What is left to be done about a host; nothing when `machines` is empty."""

    host: str
    status: Literal["active", "draining", "lost", "removed"]
    machines: list[LeavingMachine]


class RenewCertificate(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="renew_certificate"):
    csr_pem: str


class NewEpoch(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="new_epoch"):
    """The journal was restored: what this node says from now on replaces what it said. `above`: an epoch already
    used."""

    above: int


class Renewed(msgspec.Struct, frozen=True, kw_only=True):
    certificate_pem: str
    authority_pem: str
    user_jwt: str


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int


ControlRequest = RenewCertificate | NewEpoch


CONTROL_RESULTS: dict[type[msgspec.Struct], type[msgspec.Struct]] = {RenewCertificate: Renewed, NewEpoch: Epoch}
"""What `NodeReply.result` holds."""


class SignedCall(msgspec.Struct, frozen=True, kw_only=True):
    """`payload`: JSON bytes of a `CallBody`; `signature`: Ed25519 by the node's signing key over them."""

    node: str
    payload: bytes
    signature: bytes


class CallBody(msgspec.Struct, frozen=True, kw_only=True):
    """`at_ms`: control refuses calls whose time differs from its own by more than five minutes; `request_id` makes a
    repetition harmless."""

    node: str
    at_ms: int
    request_id: str
    request: ControlRequest
