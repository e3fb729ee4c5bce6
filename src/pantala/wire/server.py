"""Settings of the `pantala server` process: one JSON file, written by `up` or by the operator, read whole at start."""

from __future__ import annotations

import msgspec

from pantala.wire.feed import BucketSettings
from pantala.wire.hosts import Joined

AT_ONCE_MAX, WAITS_AT_ONCE_MAX = 64, 1_000
"""Requests served at a time, and those besides that wait for something; the others get 429 (`server/overload.py`)."""


AUDIT_KEPT_S = 400 * 24 * 3600.0
"""A year, and a month to look at it."""


class BusSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the bus is; agents have the same in their settings. Either `user` and `password`, or `credentials`: a NATS
    credentials file (JWT and seed), read again at each connection. `inbox`: answers come to `_INBOX.<inbox>.>`, the
    only inbox that a node's credentials may hear (its id); empty means any."""

    url: str
    user: str = ""
    password: str = ""
    credentials: str = ""
    inbox: str = ""

    def __repr__(self) -> str:
        return f"BusSettings(url={self.url!r}, user={self.user!r})"


class RegistrySettings(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is what image references begin with (`registry.<domain>[:port]`), `url` where this server reaches it,
    `backend` the `ip:port` to which edges forward that host name, `folder` where it keeps images if that is on this
    machine."""

    name: str
    url: str = ""
    backend: str = ""
    folder: str = ""


class AddressPools(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Public addresses that the operator has routed to every edge. `shared_v4`: single ones at which apps are found by
    name. `v4`, `v6`: prefixes whose addresses each belong to one app (of a v4 prefix the first and the last address
    are left out)."""

    shared_v4: list[str] = []
    v4: list[str] = []
    v6: list[str] = []


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`id` names this server across restarts. `listen` is `address:port`; `api_backend` is how edges reach it.

    `cluster_key` and `signing_key` (of control's catalogue rows) are files of 32 bytes, made when they are not there,
    by default under `state_dir`; so are the box authority (`ca/ca.pem`), the registry's `rootcertbundle`
    (`registry/token.pem`), the cluster's authority (`cluster-ca/ca.pem`) and the bus's accounts (`bus/control.creds`
    is this server's user). `builder`: address of buildkitd, empty where no builds are offered; `builder_folder`: where
    it keeps what it builds. `beat_s`: how often hosts say that they are there.

    What joining hosts are told: `bus_hubs` and `bus_routes` (`host:port` of the hubs' leaf and cluster listeners; a
    host whose address is among the hubs' is one), `edge_addresses` (public), `closed_addresses` (networks that
    machines must not reach). Hosts themselves are in the database: `bootstrap --hosts` admits the first, tokens the
    others.

    `acme_directory`: URL of the certificate authority's ACME directory, which signs for users' host names; empty: they
    bring their own certificates. `acme_ca_file`: PEM of authorities that the directory itself is trusted by;
    `acme_email`: where the authority writes to. `acme_eab_kid` with `acme_eab_key_file` (the HMAC key in base64url, as
    the authority gives it): an account there to which ours is bound. `sign_names`, without a directory: users' names
    are signed by an authority of our own (`names-ca/ca.pem`), whatever DNS says; for boxes. `resolvers` (`address` or
    `address:port`): who is asked what public DNS says; empty: those of this machine.

    `standby_after_s`: a host that is silent for so long is declared lost when a standby watches one of its machines and
    most hosts answer; 0: only operators declare hosts lost.

    `audit_kept_s`: how long an entry of the audit log is kept.

    `requests_…`: how often one caller may do one thing to one machine or app; `machine_reads_…` of `GET` of one
    machine, `app_deletions_…` of all apps together. `buckets`: the store that deploys put files into, the same that
    edges read.
    """

    id: str = "server-1"
    listen: str
    state_dir: str
    bus: BusSettings
    app_domain: str
    platform_domain: str
    registry: RegistrySettings
    default_region: str
    regions: list[str]
    cluster_key: str = ""
    signing_key: str = ""
    api_backend: str = ""
    builder: str = ""
    builder_folder: str = ""
    shared_kernel: bool = False
    beat_s: float = 1.0
    bus_hubs: list[str] = []
    bus_routes: list[str] = []
    edge_addresses: list[str] = []
    closed_addresses: list[str] = []
    pools: AddressPools = AddressPools()
    acme_directory: str = ""
    acme_ca_file: str = ""
    acme_email: str = ""
    acme_eab_kid: str = ""
    acme_eab_key_file: str = ""
    sign_names: bool = False
    resolvers: list[str] = []
    standby_after_s: float = 0.0
    audit_kept_s: float = AUDIT_KEPT_S
    requests_per_s_max: float = 50.0
    requests_burst: int = 200
    requests_at_once_max: int = AT_ONCE_MAX
    waits_at_once_max: int = WAITS_AT_ONCE_MAX
    machine_reads_per_s_max: float = 250.0
    machine_reads_burst: int = 1000
    app_deletions_per_min_max: float = 600.0
    app_deletions_burst: int = 600
    build_upload_bytes_max: int = 512 * 1024 * 1024
    buckets: BucketSettings | None = None


class Bootstrapped(msgspec.Struct, frozen=True, kw_only=True):
    """What `python -m pantala.server.bootstrap` prints. `verify_key` is that of control's catalogue rows; `registry_*`
    is what the registry's configuration wants; `hosts` answers the join requests of `--hosts FILE`, in their order;
    `bus_credentials`: the file of the server's own bus user."""

    token: str
    expires_at: str
    email: str
    org: str
    ca: str
    verify_key: str
    registry_bundle: str
    registry_service: str
    registry_issuer: str
    hosts: list[Joined] = []
    bus_credentials: str = ""
