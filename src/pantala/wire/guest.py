"""The guest API: agent and `pantala-init` (PID 1 of a machine).

Init inherits some descriptors and nothing else ties it to the agent, which may die and come back:

    3  a listening unix stream socket (the agent made it on the host; init accepts)
    4  the ring file for the app's stdout and stderr (`RING_*` below)
    5  the exit record file, written and synced by init before it ends
    6  and on: for what it serves as `/proc/meminfo` (`crates/pantala-init/src/facts/mod.rs`), where there is FUSE

Over the socket: one JSON document a line, `GuestRequest` in, `GuestReply` out, any number per connection, several
connections one after the other or at once. Before `start` the machine is *prepared*: mounts and network are in
place, no
process of the app exists. Every major that still runs is served (`GUEST_PROTOCOL`).

The ring file: a 4096-byte header (little endian): magic `PNTLRING` (8 bytes), version u32 = 1, capacity u32 in bytes,
`head` u64 (bytes ever written, the next record begins at `head % capacity`), `tail` u64 (first byte still whole). Then
`capacity` bytes of records, which wrap around byte-wise: length u32 of what follows, unix nanoseconds u64, stream u8 (1
stdout, 2 stderr), text without the newline. Init moves `tail` before it overwrites and `head` after it wrote. A line is
cut at `RING_LINE_BYTES_MAX`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

GUEST_PROTOCOL = 1
STATICS_PORT = 4282
API_SOCKET = "/.fly/api"
RING_HEADER_BYTES = 4096
RING_MAGIC = b"PNTLRING"
RING_LINE_BYTES_MAX = 16 * 1024
EXEC_OUTPUT_BYTES_MAX = 256 * 1024
"""Of each stream of a command: the answer fits into one message of the bus."""


class _Guest(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    pass


class GuestFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    content_base64: str
    mode: int = 0o644


class StaticPath(msgspec.Struct, frozen=True, kw_only=True):
    url_prefix: str
    guest_path: str


class Statics(msgspec.Struct, frozen=True, kw_only=True):
    """Files that init serves over HTTP at `listen` (`ip:port`) for the proxy of the machine's host."""

    listen: str
    paths: list[StaticPath]


class GuestProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Another process beside the app, in the same root. The machine ends when the first of them all does."""

    argv: list[str]
    env: dict[str, str]
    user: str = ""
    cwd: str = "/"


class GuestDependency(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    condition: Literal["started", "healthy", "exited_successfully"] = "started"


class GuestHealthcheck(msgspec.Struct, frozen=True, kw_only=True):
    """One of `http_port`, `tcp_port`, `argv`. Answers below 400 are good. `tls`: the question goes through it, and the
    certificate must be one for `tls_server_name` by a public authority, or may be any."""

    name: str
    kind: Literal["readiness", "liveness"] = "readiness"
    interval_ms: int = 10_000
    timeout_ms: int = 5_000
    grace_ms: int = 0
    success_threshold: int = 1
    failure_threshold: int = 3
    stops: bool = False
    http_port: int = 0
    http_method: str = "GET"
    http_path: str = "/"
    http_headers: list[tuple[str, str]] = []
    tls: Literal["off", "unverified", "verified"] = "off"
    tls_server_name: str = ""
    tcp_port: int = 0
    argv: list[str] = []


class GuestContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A program with a root of its own, which is mounted at `root` in the machine before init is told of it."""

    name: str
    root: str
    argv: list[str]
    env: dict[str, str]
    user: str = ""
    cwd: str = "/"
    files: list[GuestFile] = []
    depends_on: list[GuestDependency] = []
    healthchecks: list[GuestHealthcheck] = []
    restart: Literal["no", "always", "on-failure"] = "always"
    max_retries: int = 10
    stop_signal: int = 2
    stop_grace_ms: int = 5_000


class CheckState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: str
    passing: bool
    output: str = ""


class ContainerState(msgspec.Struct, frozen=True, kw_only=True):
    """How a container is. `pending`: what it depends on is not so yet; `stopped`: it is not started again.

    `exit_code` is the last one; `restarts` counts since the machine's start. `health` of one without checks is `none`.
    """

    name: str
    state: Literal["pending", "started", "stopping", "restarting", "stopped"]
    health: Literal["none", "starting", "healthy", "unhealthy"] = "none"
    pid: int = 0
    exit_code: int | None = None
    restarts: int = 0
    checks: list[CheckState] = []


class SSH(msgspec.Struct, frozen=True, kw_only=True):
    """Serve SSH at `listen` (`[ip]:port`) to whoever has a user certificate that one of `authorities` (OpenSSH public
    keys) signed. `principals` are scopes: the certificate must name `<login>@<scope>` for one of them, where login is
    the user that is logged in as. `host_key` is an OpenSSH ed25519 private key."""

    listen: str
    authorities: list[str]
    principals: list[str]
    host_key: str


class Start(_Guest, tag="start", frozen=True, kw_only=True):
    """Run the app. `user`: name, uid, `user:group` or empty (root), looked up in the image's own /etc/passwd.

    `argv[0]` is searched in the PATH of `env`. A missing `cwd` is made.
    Who connects to `api_socket` calls the platform. Answered by `Started` or `Failed`.
    With `containers` those run instead of `argv`, and `stop` ends them in reverse order, each by its own signal.
    All of it runs on the host's CPUs `cpus`; on any where there are none.
    """

    argv: list[str]
    env: dict[str, str]
    user: str = ""
    cwd: str = "/"
    hostname: str = ""
    files: list[GuestFile] = []
    statics: Statics | None = None
    processes: list[GuestProcess] = []
    containers: list[GuestContainer] = []
    ssh: SSH | None = None
    api_socket: str = ""
    cpus: list[Annotated[int, msgspec.Meta(ge=0)]] = []


class Stop(_Guest, tag="stop", frozen=True, kw_only=True):
    """Send `signal` to the app, and SIGKILL to all of the machine after `grace_ms`; init keeps to it if the
    agent dies."""

    signal: int
    grace_ms: int


class Signal(_Guest, tag="signal", frozen=True, kw_only=True):
    signal: int


class Status(_Guest, tag="status", frozen=True, kw_only=True):
    pass


class Exec(_Guest, tag="exec", frozen=True, kw_only=True):
    """Run a command beside the app with the app's environment under `env`: where there are containers in the root of
    `container`, without a name in that of the first, with `machine` in the machine's own;
    answered by `Executed` or `Failed` when it ended or was killed after `timeout_ms`. Of each stream
    `output_bytes_max` are kept."""

    argv: list[str]
    env: dict[str, str] = {}
    user: str = ""
    cwd: str = ""
    stdin_base64: str = ""
    container: str = ""
    machine: bool = False
    timeout_ms: int = 60_000
    output_bytes_max: int = EXEC_OUTPUT_BYTES_MAX


class TakeCalls(_Guest, tag="take_calls", frozen=True, kw_only=True):
    """From now on this connection is given what calls `api_socket` inside the machine: after `Ok` one byte with a
    descriptor (SCM_RIGHTS) for each connection. While nobody takes them calls wait; the last to ask has them."""


GuestRequest = Start | Stop | Signal | Status | Exec | TakeCalls


class Started(_Guest, tag="started", frozen=True, kw_only=True):
    pid: int


class Failed(_Guest, tag="failed", frozen=True, kw_only=True):
    """The app could not be started; `reason` is a sentence for its owner. Init ends with an exit record (126, 127)."""

    reason: str


class Ok(_Guest, tag="ok", frozen=True, kw_only=True):
    pass


class Refused(_Guest, tag="refused", frozen=True, kw_only=True):
    reason: str


class StatusReply(_Guest, tag="status", frozen=True, kw_only=True):
    protocol: int
    phase: Literal["prepared", "running", "stopping", "exited"]
    pid: int = 0
    containers: list[ContainerState] = []


class Executed(_Guest, tag="executed", frozen=True, kw_only=True):
    """`signal` is 0 unless one ended it; then `exit_code` is 128 + signal."""

    exit_code: int
    signal: int = 0
    stdout_base64: str = ""
    stderr_base64: str = ""
    truncated: bool = False
    timed_out: bool = False


GuestReply = Started | Failed | Ok | Refused | StatusReply | Executed


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Why the app ended. `signal` is 0 unless a signal ended it; then `exit_code` is 128 + signal."""

    exit_code: int
    signal: int
    requested_stop: bool
    started_at_ms: int
    exited_at_ms: int
    reason: str = ""
