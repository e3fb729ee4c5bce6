"""Bodies of the public API under `/v1` besides the machine documents.

What the original has keeps its names (Machines API; superfly/fly-go). Releases, builds and logs are ours
until the clients' own surfaces for them exist; they follow the same conventions.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pantala.wire.machine import MachineConfig


class _Body(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    pass


class _Whole(msgspec.Struct, frozen=True, kw_only=True):
    """Answers whose every field is always there."""


class ErrorBody(_Body, frozen=True, kw_only=True):
    error: str
    status: str = "unknown"


# -- organisations, apps, tokens ---------------------------------------------------------------------------------


class OrgRef(_Whole, frozen=True, kw_only=True):
    name: str
    slug: str
    internal_numeric_id: int


class User(_Whole, frozen=True, kw_only=True):
    email: str
    orgs: list[OrgRef]


class ReplayRules(_Whole, frozen=True, kw_only=True):
    """Whose replays reach an org's apps: between its networks (`cross_network`), and those of other orgs by slug."""

    cross_network: bool
    sources: list[str]


class UpdateReplayRules(_Body, frozen=True, kw_only=True):
    """What is absent stays as it is; `add` and `remove` name orgs by slug."""

    cross_network: bool | None = None
    add: list[str] = []
    remove: list[str] = []


class CreateAppRequest(_Body, frozen=True, kw_only=True):
    """Clients of the original send `app_name` (Machines API) or `name` (flyctl); one of them is required."""

    org_slug: str
    app_name: str | None = None
    name: str | None = None
    network: str | None = None
    app_role_id: str | None = None
    enable_subdomains: bool | None = None


class App(_Whole, frozen=True, kw_only=True):
    """`network_cidr`: of its private network (6PN)."""

    id: str
    name: str
    internal_numeric_id: int
    status: Literal["pending", "deployed", "suspended"]
    organization: OrgRef
    network: str
    network_cidr: str
    machine_count: int
    volume_count: int
    cname_target: str
    hostname: str
    app_role: str = ""


class ListAppsResponse(_Whole, frozen=True, kw_only=True):
    total_apps: int
    apps: list[App]


class CreateTokenRequest(_Body, frozen=True, kw_only=True):
    name: str
    app: str | None = None
    org_slug: str | None = None
    expiry: str = "8760h"


class CreateTokenResponse(_Whole, frozen=True, kw_only=True):
    """`id` is what `tokens revoke` takes."""

    token: str
    expires_at: str
    id: str = ""


class TokenInfo(_Whole, frozen=True, kw_only=True):
    """A valid token without its text. `role` is `user` (whatever its user may), `admin` or `deploy`; `org_slug` and
    `app` say for what."""

    id: str
    name: str
    user: str
    role: str
    org_slug: str | None
    app: str | None
    created_at: str
    expires_at: str


# -- machines ----------------------------------------------------------------------------------------------------


class LaunchMachineRequest(_Body, frozen=True, kw_only=True):
    """Create and update share this body; `current_version` is the update's guard against lost updates."""

    config: MachineConfig
    name: str | None = None
    region: str | None = None
    skip_launch: bool = False
    skip_service_registration: bool = False
    skip_secrets: bool = False
    min_secrets_version: int | None = None
    lease_ttl: int | None = None
    lsvd: bool | None = None
    current_version: str | None = None


class StartResponse(_Whole, frozen=True, kw_only=True):
    previous_state: str
    migrated: bool = False
    new_host: str = ""


class StopRequest(_Body, frozen=True, kw_only=True):
    id: str | None = None
    signal: str | None = None
    timeout: str | int | None = None


class LeaseRequest(_Body, frozen=True, kw_only=True):
    ttl: int | None = None
    description: str | None = None


class Lease(_Whole, frozen=True, kw_only=True):
    nonce: str
    expires_at: int
    owner: str
    description: str
    version: str


class LeaseResponse(_Whole, frozen=True, kw_only=True):
    """superfly/fly-go reads `data` and requires `status == "success"`; clients made from the original's description
    read the lease itself. Both find it."""

    status: str
    data: Lease
    nonce: str
    expires_at: int
    owner: str
    description: str
    version: str

    @classmethod
    def of(cls, lease: Lease) -> LeaseResponse:
        return cls(status="success", data=lease, **msgspec.structs.asdict(lease))


class MetadataValue(_Body, frozen=True, kw_only=True):
    value: str


class SetMetadataRequest(_Body, frozen=True, kw_only=True):
    """`updated_at` is read and not used: writes are ordered as they reach the machine's host."""

    value: str
    updated_at: str | None = None


class UpdateMetadataRequest(_Body, frozen=True, kw_only=True):
    """Several keys at once; null or an empty text removes one, what is not named stays. `machine_version`: only while
    the machine is at it."""

    metadata: dict[str, str | None]
    machine_version: str | None = None
    updated_at: str | None = None


class MemoryResponse(_Whole, frozen=True, kw_only=True):
    """`limit_mb`: what the machine may use now. `available_mb`: what of that it does not, or would give back for the
    asking; all of it while the machine does not run."""

    available_mb: int
    limit_mb: int


class MemoryRequest(_Body, frozen=True, kw_only=True):
    """From 1 to the machine's size (`guest.memory_mb`). Lasts until its next start."""

    limit_mb: int


class ReclaimRequest(_Body, frozen=True, kw_only=True):
    amount_mb: int


class ReclaimResponse(_Whole, frozen=True, kw_only=True):
    """What the machine has given back; more than was asked for on hosts that can only take all of it."""

    actual_mb: int


class HoldRequest(_Body, frozen=True, kw_only=True):
    """A machine asks, through its own socket only, not to be put to sleep for so long."""

    seconds: float
    reason: str = ""


class SignalRequest(_Body, frozen=True, kw_only=True):
    """A name, with or without SIG, or (flyctl) a number."""

    signal: str | int


class ExecRequest(_Body, frozen=True, kw_only=True):
    """`cmd` is a command line that is split as a shell would, without running one; `command` is argv. `timeout` in
    seconds. `machine`: in the machine's own root instead of a container's, which is the first unless it is named."""

    command: list[str] | None = None
    cmd: str | None = None
    container: str | None = None
    machine: bool | None = None
    stdin: str | None = None
    timeout: int | None = None


class ExecResponse(_Whole, frozen=True, kw_only=True):
    """`exit_signal` is 0 unless a signal ended it. Output is text; bytes that are not are replaced. `truncated`: more
    was written than is kept (1 MiB of each)."""

    exit_code: int
    exit_signal: int
    stdout: str
    stderr: str
    truncated: bool = False


class MachineVersion(_Whole, frozen=True, kw_only=True):
    """`status`: `current`, `pending` (accepted, not there yet) or `replaced`. Newest first in lists."""

    version: str
    user_config: MachineConfig
    status: str
    created_at: str


class WaitResponse(_Whole, frozen=True, kw_only=True):
    ok: bool
    state: str
    version: str
    event_id: str


class ListenSocket(_Whole, frozen=True, kw_only=True):
    proto: str
    address: str


class ProcessStat(_Whole, frozen=True, kw_only=True):
    """`cpu` in clock ticks, `rss` in bytes, `stime` the Unix second it began, `rtime` the seconds since."""

    pid: int
    command: str
    directory: str
    cpu: int
    rss: int
    rtime: int
    stime: int
    listen_sockets: list[ListenSocket]


# -- secrets -----------------------------------------------------------------------------------------------------


class SetSecretsRequest(_Body, frozen=True, kw_only=True):
    """null removes a name."""

    values: dict[str, str | None]


class SecretInfo(_Whole, frozen=True, kw_only=True):
    name: str
    digest: str
    created_at: str
    updated_at: str


class SecretsResponse(_Whole, frozen=True, kw_only=True):
    """`Version` is what clients of an older description read."""

    secrets: list[SecretInfo]
    version: int
    Version: int


class SetSecretRequest(_Body, frozen=True, kw_only=True):
    value: str

    def __repr__(self) -> str:
        return "SetSecretRequest()"


class SetSecretResponse(SecretInfo, frozen=True, kw_only=True):
    version: int
    Version: int


class SecretsVersion(_Whole, frozen=True, kw_only=True):
    """After something was removed."""

    version: int
    Version: int


# -- releases ----------------------------------------------------------------------------------------------------


class CreateReleaseRequest(_Body, frozen=True, kw_only=True):
    """`image` is what the machines will run, `definition` the fly.toml it came from (as JSON text)."""

    image: str
    definition: str = "{}"
    description: str = ""
    strategy: str = "rolling"


class UpdateReleaseRequest(_Body, frozen=True, kw_only=True):
    status: Literal["running", "complete", "failed", "interrupted"] | None = None
    plan: str | None = None
    cursor: int | None = None
    reason: str | None = None


class Release(_Whole, frozen=True, kw_only=True):
    id: str
    version: int
    status: Literal["pending", "running", "complete", "failed", "interrupted"]
    image: str
    description: str
    strategy: str
    user: str
    created_at: str
    reason: str
    plan: str
    cursor: int


class ListReleasesResponse(_Whole, frozen=True, kw_only=True):
    releases: list[Release]


# -- builds ------------------------------------------------------------------------------------------------------


class BuildOptions(_Body, frozen=True, kw_only=True):
    """Sent as the first part of a build upload; paths are relative to the root of the uploaded context."""

    dockerfile: str = "Dockerfile"
    target: str | None = None
    args: dict[str, str] = {}
    tag: str | None = None
    no_cache: bool = False


class BuildEvent(_Body, frozen=True, kw_only=True):
    """One line of a build's answer (`application/x-ndjson`). The last line is `done` or `failed`."""

    type: Literal["step", "log", "done", "failed"]
    text: str = ""
    took_ms: int | None = None
    image: str | None = None
    digest: str | None = None


# -- logs --------------------------------------------------------------------------------------------------------


class LogLine(_Whole, frozen=True, kw_only=True):
    """One line of an app's stream. `timestamp` is RFC 3339 with nanoseconds; `provider`: app, proxy or runner."""

    timestamp: str
    message: str
    level: str
    instance: str
    region: str
    provider: str


class LogsResponse(_Whole, frozen=True, kw_only=True):
    """`next_token`: nanoseconds since the epoch; ask again with it for what came after."""

    lines: list[LogLine]
    next_token: str


# -- platform ----------------------------------------------------------------------------------------------------


class Region(_Whole, frozen=True, kw_only=True):
    """`capacity`: how many of the smallest machines would fit there now."""

    code: str
    name: str
    latitude: float
    longitude: float
    gateway_available: bool
    requires_paid_plan: bool
    deprecated: bool
    capacity: int
    geo_region: str
    mpg_available: bool


class RegionsResponse(_Whole, frozen=True, kw_only=True):
    """flyctl reads the capitalised keys, clients made from the original's description the others."""

    regions: list[Region]
    nearest: str
    Regions: list[Region]
    Nearest: str
