"""The node API: what control asks of the agent that owns a machine, over the bus.

Subject `pantala.node.<node>.call`; body one `NodeRequest` in JSON; answer one `NodeReply`. Each mutating
request carries
a `request_id`: the agent keeps its outcome for 24 hours and answers a repetition with it instead of repeating the work.
Acknowledged means journaled. Reads have no request id. `nonce` is the caller's lease nonce, empty when it has none.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.wire.api import Lease, LogLine, MachineVersion, ProcessStat, WaitResponse
from pantala.wire.escape import EscapeReport
from pantala.wire.feed import TraceRecord
from pantala.wire.machine import Event, ImageRef, Machine, MachineConfig, OtherImage


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    pass


class _Mutation(_Request, frozen=True, kw_only=True):
    request_id: str


class AppRef(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent must know of the app a machine belongs to. `network` is the 6PN network id (32 bits)."""

    id: str
    name: str
    org: str
    network: int


class SealedSecrets(msgspec.Struct, frozen=True, kw_only=True):
    """All secrets of one app at one version: base64 of a JSON object, sealed to the node's key."""

    app: str
    version: int
    sealed: str


class CreateMachine(_Mutation, tag="create", frozen=True, kw_only=True):
    """`generation` counts the hosts that a machine was placed on; a host refuses one below what it knows of. `hidden`:
    it runs, but nobody is told until `PublishMachine`. `expires_at_ms`, by the node's own clock: when nobody waits for
    the answer any more; a node that gets to it later does nothing. 0: never."""

    machine_id: str
    generation: int
    app: AppRef
    name: str
    region: str
    config: MachineConfig
    image: ImageRef
    pull_token: str = ""
    other_images: dict[str, OtherImage] = {}
    secrets: SealedSecrets | None = None
    min_secrets_version: int = 0
    skip_launch: bool = False
    cordoned: bool = False
    lease_ttl_s: int = 0
    owner: str = ""
    hidden: bool = False
    expires_at_ms: int = 0


class UpdateMachine(_Mutation, tag="update", frozen=True, kw_only=True):
    machine_id: str
    config: MachineConfig
    image: ImageRef
    pull_token: str = ""
    other_images: dict[str, OtherImage] = {}
    secrets: SealedSecrets | None = None
    min_secrets_version: int = 0
    skip_launch: bool = False
    current_version: str | None = None
    lease_ttl_s: int = 0
    owner: str = ""
    nonce: str = ""


class StartMachine(_Mutation, tag="start", frozen=True, kw_only=True):
    """`stands_for`: the machine whose host is lost, for which this standby takes over; nobody asked for that."""

    machine_id: str
    nonce: str = ""
    stands_for: str = ""


class StopMachine(_Mutation, tag="stop", frozen=True, kw_only=True):
    machine_id: str
    signal: str | None = None
    timeout_s: float | None = None
    nonce: str = ""


class RestartMachine(_Mutation, tag="restart", frozen=True, kw_only=True):
    machine_id: str
    signal: str | None = None
    timeout_s: float | None = None
    force_stop: bool = False
    nonce: str = ""


class SuspendMachine(_Mutation, tag="suspend", frozen=True, kw_only=True):
    machine_id: str
    nonce: str = ""


class SignalMachine(_Mutation, tag="signal", frozen=True, kw_only=True):
    machine_id: str
    signal: int
    nonce: str = ""


class ExecMachine(_Mutation, tag="exec", frozen=True, kw_only=True):
    """Run a command beside the app; answered when it ended, or killed and a 408 after `timeout_s`. Where there are
    containers it runs in the named one, else in the first, with `machine` in none of them. Its outcome is kept like
    any other's: a repetition does not run it again."""

    machine_id: str
    argv: list[str]
    stdin_base64: str = ""
    container: str = ""
    machine: bool = False
    timeout_s: float = 60.0
    nonce: str = ""


class DestroyMachine(_Mutation, tag="destroy", frozen=True, kw_only=True):
    machine_id: str
    force: bool = False
    nonce: str = ""


class CordonMachine(_Mutation, tag="cordon", frozen=True, kw_only=True):
    machine_id: str
    cordoned: bool
    nonce: str = ""


class SetMetadata(_Mutation, tag="set_metadata", frozen=True, kw_only=True):
    """`value` null removes the key. Makes no new version."""

    machine_id: str
    key: str
    value: str | None
    nonce: str = ""


class PatchMetadata(_Mutation, tag="patch_metadata", frozen=True, kw_only=True):
    """Several keys at once, all or none; null removes one. `version`: only while the machine is at it, else a 412.
    Makes no new version."""

    machine_id: str
    metadata: dict[str, str | None]
    version: str | None = None
    nonce: str = ""


class PutSecrets(_Mutation, tag="put_secrets", frozen=True, kw_only=True):
    """Newer secrets for every machine of the app on this node; seen at their next start."""

    secrets: SealedSecrets


class AcquireLease(_Mutation, tag="acquire_lease", frozen=True, kw_only=True):
    """With the right `nonce` refreshes, without one acquires. 409 when held by another."""

    machine_id: str
    ttl_s: int
    owner: str
    description: str = ""
    nonce: str = ""


class ReleaseLease(_Mutation, tag="release_lease", frozen=True, kw_only=True):
    machine_id: str
    nonce: str


class PublishMachine(_Mutation, tag="publish", frozen=True, kw_only=True):
    """A copy that was created hidden is shown from now on; its row, of a newer generation, hides the old copy's."""

    machine_id: str
    generation: int


class FenceMachine(_Mutation, tag="fence", frozen=True, kw_only=True):
    """Copies of the machine below `generation` never run on this host again: what there is drains, stops and is gone;
    what comes later is refused. Leases do not matter. Also for a machine that the host does not know."""

    machine_id: str
    generation: int


class SetMemory(_Mutation, tag="set_memory", frozen=True, kw_only=True):
    """Change what a started machine may use, up to its size, until its next start."""

    machine_id: str
    limit_mib: int
    nonce: str = ""


class ReclaimMemory(_Mutation, tag="reclaim_memory", frozen=True, kw_only=True):
    """Have a started machine give back memory that it does not need now."""

    machine_id: str
    amount_mib: int
    nonce: str = ""


class GetMemory(_Request, tag="get_memory", frozen=True, kw_only=True):
    machine_id: str


class GetLease(_Request, tag="get_lease", frozen=True, kw_only=True):
    machine_id: str


class GetMachine(_Request, tag="get", frozen=True, kw_only=True):
    machine_id: str


class ListMachines(_Request, tag="list", frozen=True, kw_only=True):
    """All machines of an app on this node, or of all apps when `app` is null."""

    app: str | None = None
    include_deleted: bool = False


class WaitMachine(_Request, tag="wait", frozen=True, kw_only=True):
    """Answers when one of `states` holds (`settled`: any persistent state), or with a 408 after `timeout_s`."""

    machine_id: str
    states: list[str]
    timeout_s: float
    version: str | None = None
    from_event_id: str | None = None


class ListEvents(_Request, tag="events", frozen=True, kw_only=True):
    machine_id: str
    limit: int = 20


class ListVersions(_Request, tag="versions", frozen=True, kw_only=True):
    machine_id: str


class ListProcesses(_Request, tag="ps", frozen=True, kw_only=True):
    machine_id: str


class ReadLogs(_Request, tag="logs", frozen=True, kw_only=True):
    """The newest `limit` lines of an app on this node after `since_ns`."""

    app: str
    machine_id: str | None = None
    since_ns: int = 0
    limit: int = 100


class TraceRequest(_Request, tag="trace", frozen=True, kw_only=True):
    """What this host's proxy knows of a request, by its id."""

    request: str


class GetNode(_Request, tag="node", frozen=True, kw_only=True):
    pass


class RunEscapeSuite(_Request, tag="run_escape_suite", frozen=True, kw_only=True):
    """Make a machine on this host and try to get out of it; answered when all was tried. One at a time."""


class GetEscapeSuite(_Request, tag="escape_suite", frozen=True, kw_only=True):
    """What became of the last one."""


class OpenSsh(_Request, tag="open_ssh", frozen=True, kw_only=True):
    """A connection to the SSH port of a started machine, carried by the three calls below: one read and one write of a
    stream at a time, so the slower side sets the pace. When nobody reads for a minute it is closed."""

    machine_id: str


class ReadStream(_Request, tag="read_stream", frozen=True, kw_only=True):
    """Answers with what there is, after `wait_s` with nothing."""

    stream_id: str
    wait_s: float = 20.0


class WriteStream(_Request, tag="write_stream", frozen=True, kw_only=True):
    """`last`: nothing follows."""

    stream_id: str
    data: bytes = b""
    last: bool = False


class CloseStream(_Request, tag="close_stream", frozen=True, kw_only=True):
    stream_id: str


STREAM_BYTES_MAX = 128 * 1024
"""Of one read or write."""

NodeRequest = (
    CreateMachine
    | UpdateMachine
    | StartMachine
    | StopMachine
    | RestartMachine
    | SuspendMachine
    | SignalMachine
    | ExecMachine
    | DestroyMachine
    | CordonMachine
    | SetMetadata
    | PatchMetadata
    | PutSecrets
    | AcquireLease
    | ReleaseLease
    | PublishMachine
    | FenceMachine
    | SetMemory
    | ReclaimMemory
    | GetMemory
    | GetLease
    | GetMachine
    | ListMachines
    | WaitMachine
    | ListEvents
    | ListVersions
    | ListProcesses
    | ReadLogs
    | TraceRequest
    | GetNode
    | RunEscapeSuite
    | GetEscapeSuite
    | OpenSsh
    | ReadStream
    | WriteStream
    | CloseStream
)
STREAMS = (OpenSsh, ReadStream, WriteStream, CloseStream)
MUTATIONS = (
    CreateMachine,
    UpdateMachine,
    StartMachine,
    StopMachine,
    RestartMachine,
    SuspendMachine,
    SignalMachine,
    ExecMachine,
    DestroyMachine,
    CordonMachine,
    SetMetadata,
    PatchMetadata,
    PutSecrets,
    AcquireLease,
    ReleaseLease,
    PublishMachine,
    FenceMachine,
    SetMemory,
    ReclaimMemory,
)


class NodeError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `PantalaError` on the wire; `kind` is its class name, so that the caller raises the same."""

    kind: str
    message: str
    http_code: int
    status: str
    hint: str | None = None
    retry_after_s: float | None = None


class NodeReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Either `error` or the `result`, whose type the request decides (`RESULTS`)."""

    result: Any = None
    error: NodeError | None = None


class OpenedStream(msgspec.Struct, frozen=True, kw_only=True):
    stream_id: str


class StreamData(msgspec.Struct, frozen=True, kw_only=True):
    """`ended`: the machine says no more."""

    data: bytes
    ended: bool = False


class MemoryState(msgspec.Struct, frozen=True, kw_only=True):
    """`available_mib`: what of the limit is not in use, or would be given back for the asking."""

    limit_mib: int
    available_mib: int


class ReclaimedMemory(msgspec.Struct, frozen=True, kw_only=True):
    actual_mib: int


class StartResult(msgspec.Struct, frozen=True, kw_only=True):
    previous_state: str


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """`signal` is 0 unless one ended it; `truncated`: more was written than is kept (256 KiB of each)."""

    exit_code: int
    signal: int
    stdout_base64: str
    stderr_base64: str
    truncated: bool = False


class HostTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Tries in order; no record written after `since_ms` is missing."""

    since_ms: int
    records: list[TraceRecord]


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Capacity and free resources in MiB and whole CPUs; `sealing_key` is base64 of an X25519 public key."""

    id: str
    region: str
    zone: str
    version: str
    driver: str
    isolation: str
    sealing_key: str
    cpus: int
    cpus_free: float
    memory_mib: int
    memory_mib_free: int
    disk_mib_free: int


RESULTS: dict[type, Any] = {
    OpenSsh: OpenedStream,
    ReadStream: StreamData,
    WriteStream: None,
    CloseStream: None,
    CreateMachine: Machine,
    UpdateMachine: Machine,
    StartMachine: StartResult,
    StopMachine: None,
    RestartMachine: None,
    SuspendMachine: None,
    SignalMachine: None,
    ExecMachine: ExecResult,
    DestroyMachine: None,
    CordonMachine: None,
    SetMetadata: None,
    PatchMetadata: None,
    PutSecrets: None,
    AcquireLease: Lease,
    ReleaseLease: None,
    PublishMachine: None,
    FenceMachine: None,
    SetMemory: MemoryState,
    ReclaimMemory: ReclaimedMemory,
    GetMemory: MemoryState,
    GetLease: Lease,
    GetMachine: Machine,
    ListMachines: list[Machine],
    WaitMachine: WaitResponse,
    ListEvents: list[Event],
    ListVersions: list[MachineVersion],
    ListProcesses: list[ProcessStat],
    ReadLogs: list[LogLine],
    TraceRequest: HostTrace,
    GetNode: NodeInfo,
    RunEscapeSuite: EscapeReport,
    GetEscapeSuite: EscapeReport,
}
