"""Machine documents of the Machines API: the config a user submits and the machine the API answers with.

Names, defaults and spellings are the wire's (Machines API; `machine_types.go` of superfly/fly-go). Unknown fields
of a config are kept aside by the server and given back; these types hold what Pantala acts on.
Durations are Go strings or nanoseconds (`Duration`); `pantala.domain.durations.seconds` reads both.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pantala.wire.escape import EscapeSuite

Duration = str | int


class _Doc(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """Base of wire documents: unset fields are left out, unknown ones are skipped."""


class Guest(_Doc, frozen=True, kw_only=True):
    """`isolation`: what must at least keep the machine apart from others; the host's own when it is left out."""

    cpu_kind: str | None = None
    cpus: int | None = None
    memory_mb: int | None = None
    max_memory_mb: int | None = None
    gpu_kind: str | None = None
    gpus: int | None = None
    kernel_args: list[str] | None = None
    host_dedication_id: str | None = None
    persist_rootfs: str | None = None
    isolation: str | None = None


class Init(_Doc, frozen=True, kw_only=True):
    exec: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    tty: bool | None = None
    swap_size_mb: int | None = None
    kernel_args: list[str] | None = None


class HTTPHeader(_Doc, frozen=True, kw_only=True):
    name: str
    values: list[str] = []


class Check(_Doc, frozen=True, kw_only=True):
    """A service check or a top-level one. Durations: Go strings or nanoseconds."""

    type: str | None = None
    port: int | None = None
    kind: Literal["informational", "readiness"] | None = None
    interval: Duration | None = None
    timeout: Duration | None = None
    grace_period: Duration | None = None
    method: str | None = None
    path: str | None = None
    protocol: str | None = None
    headers: list[HTTPHeader] | None = None
    tls_skip_verify: bool | None = None
    tls_server_name: str | None = None


class HTTPResponseOptions(_Doc, frozen=True, kw_only=True):
    headers: dict[str, Any] | None = None
    pristine: bool | None = None


class ReplayCache(_Doc, frozen=True, kw_only=True):
    path_prefix: str | None = None
    ttl_seconds: int | None = None
    type: str | None = None
    name: str | None = None
    allow_bypass: bool | None = None


class HTTPOptions(_Doc, frozen=True, kw_only=True):
    compress: bool | None = None
    h2_backend: bool | None = None
    idle_timeout: int | None = None
    headers_read_timeout: int | None = None
    response: HTTPResponseOptions | None = None
    replay_cache: list[ReplayCache] | None = None


class TLSOptions(_Doc, frozen=True, kw_only=True):
    alpn: list[str] | None = None
    versions: list[str] | None = None
    default_self_signed: bool | None = None


class ProxyProtoOptions(_Doc, frozen=True, kw_only=True):
    version: str | None = None


class Port(_Doc, frozen=True, kw_only=True):
    port: int | None = None
    start_port: int | None = None
    end_port: int | None = None
    handlers: list[str] | None = None
    force_https: bool | None = None
    http_options: HTTPOptions | None = None
    tls_options: TLSOptions | None = None
    proxy_proto_options: ProxyProtoOptions | None = None


class Concurrency(_Doc, frozen=True, kw_only=True):
    type: str | None = None
    soft_limit: int | None = None
    hard_limit: int | None = None


class Service(_Doc, frozen=True, kw_only=True):
    protocol: str | None = None
    internal_port: int | None = None
    ports: list[Port] | None = None
    concurrency: Concurrency | None = None
    autostop: bool | str | None = None
    autostart: bool | None = None
    min_machines_running: int | None = None
    checks: list[Check] | None = None
    force_instance_key: str | None = None
    force_instance_description: str | None = None


class Mount(_Doc, frozen=True, kw_only=True):
    volume: str | None = None
    path: str | None = None
    name: str | None = None
    size_gb: int | None = None
    encrypted: bool | None = None
    extend_threshold_percent: int | None = None
    add_size_gb: int | None = None
    size_gb_limit: int | None = None


class Restart(_Doc, frozen=True, kw_only=True):
    policy: str | None = None
    max_retries: int | None = None


class StopConfig(_Doc, frozen=True, kw_only=True):
    signal: str | None = None
    timeout: Duration | None = None


class File(_Doc, frozen=True, kw_only=True):
    guest_path: str
    raw_value: str | None = None
    secret_name: str | None = None
    image_config: str | None = None
    mode: int | None = None


class Static(_Doc, frozen=True, kw_only=True):
    guest_path: str
    url_prefix: str
    tigris_bucket: str | None = None
    index_document: str | None = None


class DNSConfig(_Doc, frozen=True, kw_only=True):
    skip_registration: bool | None = None
    nameservers: list[str] | None = None
    searches: list[str] | None = None
    options: list[dict[str, str]] | None = None
    dns_forward_rules: list[dict[str, Any]] | None = None
    hostname: str | None = None
    hostname_fqdn: str | None = None


class Metrics(_Doc, frozen=True, kw_only=True):
    port: int | None = None
    path: str | None = None
    https: bool | None = None


class SecretRef(_Doc, frozen=True, kw_only=True):
    """A secret of the app as an environment variable; `name` is that of the variable if it is left out."""

    env_var: str
    name: str | None = None


class EnvFrom(_Doc, frozen=True, kw_only=True):
    env_var: str
    field_ref: Literal["id", "version", "app_name", "private_ip", "region", "image"]


class Process(_Doc, frozen=True, kw_only=True):
    """One of several processes of a machine that share its root."""

    exec: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: dict[str, str] | None = None
    user: str | None = None
    secrets: list[SecretRef] | None = None
    ignore_app_secrets: bool | None = None
    env_from: list[EnvFrom] | None = None


class Dependency(_Doc, frozen=True, kw_only=True):
    name: str
    condition: Literal["started", "healthy", "exited_successfully"] | None = None


class HTTPHealth(_Doc, frozen=True, kw_only=True):
    port: int
    method: str | None = None
    path: str | None = None
    scheme: Literal["http", "https"] | None = None
    headers: list[HTTPHeader] | None = None
    tls_skip_verify: bool | None = None
    tls_server_name: str | None = None


class TCPHealth(_Doc, frozen=True, kw_only=True):
    port: int


class ExecHealth(_Doc, frozen=True, kw_only=True):
    command: list[str]


class Healthcheck(_Doc, frozen=True, kw_only=True):
    """One of `http`, `tcp`, `exec`. Times in whole seconds."""

    name: str
    http: HTTPHealth | None = None
    tcp: TCPHealth | None = None
    exec: ExecHealth | None = None
    interval: int | None = None
    timeout: int | None = None
    grace_period: int | None = None
    success_threshold: int | None = None
    failure_threshold: int | None = None
    kind: Literal["readiness", "liveness"] | None = None
    unhealthy: Literal["stop"] | None = None


class ContainerMount(_Doc, frozen=True, kw_only=True):
    """`name` is one of the config's `volumes`."""

    name: str
    path: str


class Container(_Doc, frozen=True, kw_only=True):
    """One of several roots in a machine: kernel, addresses and localhost are shared, files and processes are not."""

    name: str
    image: str
    exec: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    user: str | None = None
    env: dict[str, str] | None = None
    env_from: list[EnvFrom] | None = None
    secrets: list[SecretRef] | None = None
    ignore_app_secrets: bool | None = None
    files: list[File] | None = None
    restart: Restart | None = None
    stop: StopConfig | None = None
    depends_on: list[Dependency] | None = None
    healthchecks: list[Healthcheck] | None = None
    mounts: list[ContainerMount] | None = None


class TempDir(_Doc, frozen=True, kw_only=True):
    storage_type: Literal["disk", "memory"]
    size_mb: int | None = None


class Volume(_Doc, frozen=True, kw_only=True):
    """What containers mount besides their own files: a directory that ends with the machine, or an image's files."""

    name: str
    temp_dir: TempDir | None = None
    image: str | None = None


class RootFS(_Doc, frozen=True, kw_only=True):
    persist: Literal["never", "restart", "always"] | None = None
    size_gb: int | None = None


class MachineConfig(_Doc, frozen=True, kw_only=True):
    """What a user submits and what a machine runs from. With `containers` those run, and `image` may be left out."""

    image: str | None = None
    init: Init | None = None
    env: dict[str, str] | None = None
    guest: Guest | None = None
    size: str | None = None
    services: list[Service] | None = None
    checks: dict[str, Check] | None = None
    mounts: list[Mount] | None = None
    metadata: dict[str, str] | None = None
    metrics: Metrics | None = None
    files: list[File] | None = None
    restart: Restart | None = None
    stop_config: StopConfig | None = None
    auto_destroy: bool | None = None
    schedule: str | None = None
    standbys: list[str] | None = None
    statics: list[Static] | None = None
    dns: DNSConfig | None = None
    processes: list[Process] | None = None
    containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    rootfs: RootFS | None = None
    cache_drive: dict[str, Any] | None = None
    spot: dict[str, Any] | None = None


class ImageRef(_Doc, frozen=True, kw_only=True):
    registry: str
    repository: str
    tag: str = ""
    digest: str = ""
    labels: dict[str, str] = {}


class ExitEvent(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    exit_code: int
    guest_exit_code: int
    guest_signal: int
    oom_killed: bool
    requested_stop: bool
    restarting: bool
    signal: int
    exited_at: str


class EventRequest(_Doc, frozen=True, kw_only=True):
    exit_event: ExitEvent | None = None
    restart_count: int | None = None
    reason: str | None = None


class Event(_Doc, frozen=True, kw_only=True):
    """One entry of a machine's history; `timestamp` in Unix milliseconds."""

    id: str
    type: str
    status: str
    source: str
    timestamp: int
    request: EventRequest | None = None


class CheckStatus(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    name: str
    status: Literal["passing", "warning", "critical"]
    output: str
    updated_at: str


class MachineCPU(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    """Centiseconds of CPU, as the metrics `fly_instance_cpu_*` count them: what it earns in a second, what it has saved
    (shared CPUs), how long it was held back since it started; and whether it is held back now."""

    baseline: float
    balance: float
    throttle: float
    throttled: bool


class ScheduledRun(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    """`outcome`: started, ended, missed or skipped; `reason` says how or why."""

    due_at: str
    outcome: str
    reason: str


class ScheduleStatus(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    """`runs`: the last ones, newest first."""

    next_run: str
    runs: list[ScheduledRun]


class Hold(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    """The machine asked not to be put to sleep before `until`."""

    until: str
    reason: str


class Isolation(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    """What keeps this machine apart from others and from its host. `seccomp`: SHA-256 of the filter in force;
    `user_mapping`: ids inside, then ids outside; `runtime`: what makes it and its version, `init`: SHA-256 of PID 1.
    Empty where there is no such thing. `escape_suite`: what was tried against it; null when that was never run on this
    host."""

    driver: str
    boundary: str
    kernel: str
    seccomp: str
    capabilities: list[str]
    user_mapping: str
    no_new_privileges: bool
    runtime: str = ""
    init: str = ""
    escape_suite: EscapeSuite | None = None


class Progress(_Doc, omit_defaults=False, frozen=True, kw_only=True):
    """Of a machine that is on its way: since when, who asked for it, what it waits for, and from when on it counts as
    stuck."""

    since: str
    asked_by: str
    waits_for: str
    stuck_at: str


class LeaseView(_Doc, frozen=True, kw_only=True):
    """Who holds a machine, without what proves it."""

    description: str
    expires_at: int
    owner: str


class ContainerStatus(_Doc, frozen=True, kw_only=True):
    """`exit_code` is its last one. `health` is left out where there are no health checks."""

    name: str
    state: Literal["pending", "started", "stopping", "restarting", "stopped"]
    health: Literal["starting", "healthy", "unhealthy"] | None = None
    exit_code: int | None = None
    restarts: int = 0


class OtherImage(msgspec.Struct, frozen=True, kw_only=True):
    """What an image of a container or a volume was when the config was accepted; `pull_token` as for the machine's."""

    image: ImageRef
    pull_token: str = ""


class Machine(_Doc, frozen=True, kw_only=True):
    """The API's answer for one machine. Times are RFC 3339 strings; `events` newest first. `lease` is shown to those
    who ask for it (`include_leases`). `other_images`: what those of containers and volumes are, by the config's names.
    `isolation_details`, `progress` and `awake_because` (why autostop leaves it running) are in the answer for one
    machine only.
    """

    id: str
    name: str
    state: str
    region: str
    instance_id: str
    version: str
    private_ip: str
    created_at: str
    updated_at: str
    image_ref: ImageRef
    events: list[Event]
    checks: list[CheckStatus]
    host_status: Literal["ok", "unknown", "unreachable"]
    cordoned: bool
    config: MachineConfig | None = None
    incomplete_config: MachineConfig | None = None
    nonce: str | None = None
    node: str | None = None
    isolation: str | None = None
    containers: list[ContainerStatus] | None = None
    other_images: dict[str, ImageRef] | None = None
    cpu: MachineCPU | None = None
    schedule: ScheduleStatus | None = None
    hold: Hold | None = None
    lease: LeaseView | None = None
    isolation_details: Isolation | None = None
    progress: Progress | None = None
    awake_because: list[str] | None = None
