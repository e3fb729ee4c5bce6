"""The feed: agent and proxy of one host over one unix socket, and the routing rows that it carries.

The agent listens, the proxy connects (and reconnects for ever, holding wakes up to `wake_hold_ms` meanwhile). One JSON
document a line in both directions. After `hello` the agent sends `snapshot` frames, the last with `last = true`, then
`delta` frames. A row is the newest value of `(stream, key)`; null deletes. A row that cannot be read is set aside and
reported in `applied`, and stops nobody.

Keys and values by stream:

    routes  app/<name> AppRow · org/<slug> OrgRow · host/<hostname> HostRow · addr/<ip> AddressRow ·
            svc/<app>/<digest> ServiceRow · m/<machine id> MachineRow · acme/<token> AcmeRow · txt/<name> TextRow
    nodes   node/<id> NodeRow (its agent's) · member/<id> MemberRow (control's)
    certs   cert/<name> CertRow · ticket/<id> TicketRow
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pantala.wire.machine import Concurrency, Port, Static

FEED_PROTOCOL = 1


class _Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    pass


class AppRow(_Row, frozen=True, kw_only=True):
    """`network` is the 6PN network id."""

    app: str
    org: str
    network: int


class OrgRow(_Row, frozen=True, kw_only=True):
    """Whose replays reach an org's apps beside those of the same org and network. An org without this row allows no
    others. `replay_from`: slugs of other orgs; `cross_network`: between the networks of this org."""

    replay_from: list[str] = []
    cross_network: bool = False


class HostRow(_Row, frozen=True, kw_only=True):
    """A public host name leads to an app, or straight to a platform service (`backend`: `ip:port`). `*.` as the first
    label stands for exactly one label; an exact name comes before."""

    app: str | None = None
    backend: str | None = None


class AddressRow(_Row, frozen=True, kw_only=True):
    """Where connections come in. Shared addresses find the app by SNI or Host; dedicated ones name it; private ones
    (Flycast) too, and are there for machines of the 6PN `network` only (None: the app's own)."""

    kind: Literal["shared", "dedicated", "private"]
    app: str | None = None
    network: int | None = None


class AcmeRow(_Row, frozen=True, kw_only=True):
    """HTTP-01: what every edge answers to `/.well-known/acme-challenge/<token>` while a certificate is ordered."""

    authorization: str


class TextRow(_Row, frozen=True, kw_only=True):
    """DNS-01: the TXT records that the platform's public DNS answers for a name of its own."""

    values: list[str]


class ServiceRow(_Row, frozen=True, kw_only=True):
    """One service of an app's machines. `digest` in the key is that of this document, so machines share rows."""

    app: str
    protocol: str
    internal_port: int
    ports: list[Port]
    concurrency: Concurrency
    autostart: bool = False
    autostop: Literal["off", "stop", "suspend"] = "off"
    min_machines_running: int = 0
    checked: bool = False
    statics: list[Static] = []


class MachineRow(_Row, frozen=True, kw_only=True):
    """Where a machine is and what it serves. `services` are digests of `svc/<app>/<digest>` rows, in order;
    `passing` holds a flag per service (true when it has no checks). `ip4` is reachable from its own host only.
    `metadata`: what private names may ask for (`<value>.<key>.kv._metadata.<app>.internal`), bounded by its agent."""

    id: str
    app: str
    region: str
    node: str
    instance_id: str
    generation: int
    state: str
    ip4: str
    ip6: str
    services: list[str]
    passing: list[bool]
    cordoned: bool = False
    group: str = ""
    dns: bool = True
    ready_at_ms: int = 0
    metadata: dict[str, str] = {}


class NodeRow(_Row, frozen=True, kw_only=True):
    """`address` is where other hosts reach it; `verify_key` and `sealing_key` are base64 public keys. `mesh`:
    `ip:port` of its proxy's mesh listener, empty when it has none. `wireguard_key` (base64) and `wireguard`
    (`ip:port`, UDP; empty behind NAT): its end of the tunnels that carry 6PN, empty where hosts use plain links.
    `isolation` is what its `driver` gives (vm, container, none), both empty from agents of an older version."""

    id: str
    region: str
    zone: str
    address: str
    verify_key: str
    sealing_key: str
    cpus: int
    memory_mib: int
    cpus_free: float
    memory_mib_free: int
    version: str
    mesh: str = ""
    wireguard_key: str = ""
    wireguard: str = ""
    disk_mib_free: int = 0
    driver: str = ""
    isolation: str = ""


class MemberRow(_Row, frozen=True, kw_only=True):
    """A host that belongs to the cluster: control's word, and the root of all trust between hosts. Readers believe
    a node's frames only by the `verify_key` (base64) here; proxies accept a mesh peer only while it has this row.
    Once the row is deleted (removed, lost) everything that the node said is void, for ever: ids are not used again."""

    id: str
    region: str
    zone: str
    address: str
    verify_key: str
    sealing_key: str
    edge: bool
    status: Literal["active", "draining"] = "active"


class CertRow(_Row, frozen=True, kw_only=True):
    """A certificate for `names` (`*.` allowed as the first label). In the catalogue the key is `sealed_key` (base64, to
    the edge key); on the feed the agent has opened it and sends `key_pem` instead. With `alpn` (`acme-tls/1`) it is
    shown only to who offers that protocol and nothing else; it ends within days, because an older proxy takes it
    for an ordinary one and prefers what lives longer."""

    names: list[str]
    chain_pem: str
    not_after_ms: int
    sealed_key: str = ""
    key_pem: str = ""
    alpn: str = ""


class TicketRow(_Row, frozen=True, kw_only=True):
    """A key for TLS session tickets, the same at every edge: the newest one that has begun seals tickets, all that have
    not ended open them. 32 random bytes: in the catalogue sealed to the edge key (`sealed_key`, base64); on the
    feed the agent has opened them and sends `key` (base64) instead."""

    not_before_ms: int
    not_after_ms: int
    sealed_key: str = ""
    key: str = ""


class FeedRow(msgspec.Struct, frozen=True, kw_only=True):
    stream: str
    key: str
    value: dict[str, Any] | None


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    pass


# -- agent to proxy ----------------------------------------------------------------------------------------------


class AgentHello(_Frame, tag="hello", frozen=True, kw_only=True):
    protocol: int
    node: str
    region: str


class Snapshot(_Frame, tag="snapshot", frozen=True, kw_only=True):
    """Replaces everything once the frame with `last` has come."""

    revision: int
    rows: list[FeedRow]
    last: bool = False


class Delta(_Frame, tag="delta", frozen=True, kw_only=True):
    revision: int
    rows: list[FeedRow]


class WakeResult(_Frame, tag="wake_result", frozen=True, kw_only=True):
    """`ok`: the machine is ready at `ip4`. Otherwise `code` is one of Fly Proxy's error codes (PM…) with its reason;
    `elsewhere`: another machine may serve."""

    id: int
    machine: str
    ok: bool
    ip4: str = ""
    code: str = ""
    reason: str = ""
    elsewhere: bool = False


class Drain(_Frame, tag="drain", frozen=True, kw_only=True):
    """Stop sending requests to a machine and say when none is left.

    With `load_seq` only if no request came since the load that the agent saw (autostop); without, in any case (update,
    stop by a user). After `deadline_ms` long-lived connections are closed (WebSocket 1001). New requests go
    elsewhere or
    wait. Lifted by `undrain` or when the machine's row shows a new `instance_id` or leaves `started`.
    """

    id: int
    machine: str
    deadline_ms: int
    load_seq: int | None = None


class Undrain(_Frame, tag="undrain", frozen=True, kw_only=True):
    machine: str


class Trace(_Frame, tag="trace", frozen=True, kw_only=True):
    """What does the proxy know of this request? Answered by `traced` with the same id; not by older proxies."""

    id: int
    request: str


AgentFrame = AgentHello | Snapshot | Delta | WakeResult | Drain | Undrain | Trace

# -- proxy to agent ----------------------------------------------------------------------------------------------


class ProxyHello(_Frame, tag="hello", frozen=True, kw_only=True):
    protocol: int
    version: str
    pid: int


class Applied(_Frame, tag="applied", frozen=True, kw_only=True):
    """`set_aside`: keys of rows that could not be read."""

    revision: int
    set_aside: list[str] = []


class Wake(_Frame, tag="wake", frozen=True, kw_only=True):
    """One per machine however many requests wait. Answered by `wake_result` with the same id."""

    id: int
    machine: str
    deadline_ms: int


class MachineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """`seq` grows with each request or connection; `idle_ms` is the time since the last one ended (0 while busy)."""

    machine: str
    in_flight: int
    seq: int
    idle_ms: int


class Load(_Frame, tag="load", frozen=True, kw_only=True):
    """Every second, machines whose row is on this node and that were started or had traffic."""

    machines: list[MachineLoad]


class Drained(_Frame, tag="drained", frozen=True, kw_only=True):
    id: int
    machine: str
    result: Literal["drained", "busy", "deadline"]
    in_flight: int = 0


class ProxyLog(_Frame, tag="log", frozen=True, kw_only=True):
    """A line for the app's log stream, with one of Fly Proxy's error codes (P…); empty where it has none."""

    app: str
    code: str
    message: str
    machine: str = ""
    request_id: str = ""


class TraceRecord(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """One try of a request, with times in µs. `role`: edge, where its client is connected, or worker, on the host of
    the machine. `outcome`: answered, failed (`reason`: connect, not_sent, stale, died), turned (the host did not take
    it; `reason` in the mesh's words), or refused: the request as a whole, when nobody answered it. `attempt` counts
    from 1, 0 is about no try; `replays`: how many apps have sent it on before. `node` and `region` are the machine's.

    `began_us`: since 1970 by that host's clock, when the request came there; `from_us`: from then until this try.
    In order: `choose_us` until a machine had a slot, with what of it were waits (`waited_us`, by cause; of refused:
    all waits), `connect_us` (`reused`: a kept connection), `answer_us` until the head of the answer, at the edge with
    the way through the mesh; `body_us` until the answer was over, null while it is not; `cut`: it broke off."""

    role: Literal["edge", "worker"]
    outcome: str
    began_us: int
    reason: str = ""
    code: str = ""
    status: int = 0
    app: str = ""
    machine: str = ""
    node: str = ""
    region: str = ""
    attempt: int = 0
    replays: int = 0
    from_us: int = 0
    choose_us: int = 0
    waited_us: dict[str, int] = {}
    connect_us: int = 0
    reused: bool = False
    answer_us: int = 0
    body_us: int | None = None
    cut: bool = False


class Traced(_Frame, tag="traced", frozen=True, kw_only=True):
    """Tries in order. No record that was written after `since_ms` (since 1970) is missing."""

    id: int
    since_ms: int
    records: list[TraceRecord] = []


ProxyFrame = ProxyHello | Applied | Wake | Load | Drained | ProxyLog | Traced


# -- settings ----------------------------------------------------------------------------------------------------


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """A public listener. `tls` and `http` say what the port speaks before any app is known."""

    address: str
    port: int
    tls: bool
    http: bool = True


class DNSSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`listen`: addresses for machines (`fdaa::3`); `public_listen`: the box's resolver, which answers `public_names`
    (suffix to address, e.g. `apps.pantala.test` to the edge's) and nothing private. `forward`: resolvers for
    the rest."""

    listen: list[str]
    public_listen: list[str]
    public_names: dict[str, str]
    forward: list[str]
    port: int = 53
    queries_per_s_max: int = 200


class MeshSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Proxy to proxy: HTTP/2 over mutual TLS on the host's own address. The files are PEM and are written by the agent
    (join, renewal); the proxy looks again when they change. The node's id is the certificate's only DNS name:
    `<node>.node.pantala.internal`."""

    listen: str
    certificate: str
    key: str
    authority: str
    ping_interval_ms: int = 250
    ping_timeout_ms: int = 750


class BucketSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where `statics` with a `tigris_bucket` are read: an S3-compatible store. `endpoint`: its URL; `virtual_host`: the
    bucket is part of the host name rather than of the path; `ca_file`: PEM of who signs for it, empty: the machine's
    usual ones. `credentials_file`: JSON with `access_key_id`, `secret_access_key` and perhaps `session_token`,
    readable by its owner alone. `readers`: by bucket the orgs whose apps may read it by these credentials; every
    other bucket is read without any, so it has to be public. `writers`: by bucket the orgs whose deploys may put
    files there, which only the server does; who may write may read. The two times: until its answer begins, and
    between its bytes."""

    endpoint: str
    region: str = "us-east-1"
    virtual_host: bool = False
    ca_file: str = ""
    credentials_file: str = ""
    readers: dict[str, list[str]] = {}
    writers: dict[str, list[str]] = {}
    answer_timeout_ms: int = 10_000
    silence_timeout_ms: int = 30_000


class ProxySettings(msgspec.Struct, frozen=True, kw_only=True):
    """The proxy's whole configuration, one JSON file, read before anything binds. `lame_duck_ms`: how long one that was
    told to end still accepts, while `/healthz` answers 503, so that who announces this edge can withdraw it first.
    `entry_listen`: `ip:port` where the firewall brings connections to every other port and address (IP_TRANSPARENT).
    `handshakes_max`: TLS handshakes at once; those per second count for each /24 or /64 of clients and for each name
    (0: no limit).
    `replay_body_bytes_max`: what of a request's body is kept, so that it can be sent again or be replayed.
    `trace_mib_max`: memory for records of requests, which are kept for ten minutes at most (0: none are).
    `client_ping_after_ms`: a client of HTTP/2 that says nothing for so long is asked for a sign of life;
    `client_ping_timeout_ms`: it is closed when it gives none."""

    node: str
    region: str
    state_dir: str
    agent_socket: str
    listeners: list[Listener]
    dns: DNSSettings
    entry_listen: list[str] = []
    mesh: MeshSettings | None = None
    api_forward: str = ""
    api_listen: list[str] = []
    admin_listen: str = ""
    wake_hold_ms: int = 10_000
    wake_timeout_ms: int = 30_000
    queue_timeout_ms: int = 10_000
    queue_per_app_max: int = 1_000
    waiting_max: int = 10_000
    drain_max_ms: int = 3_600_000
    lame_duck_ms: int = 0
    app_domain: str = ""
    buckets: BucketSettings | None = None
    connections_per_app_max: int = 2_048
    handshakes_max: int = 4_096
    handshakes_per_range_per_s_max: int = 500
    handshakes_per_name_per_s_max: int = 1_000
    replay_body_bytes_max: int = 1024 * 1024
    trace_mib_max: int = 32
    client_ping_after_ms: int = 40_000
    client_ping_timeout_ms: int = 20_000
