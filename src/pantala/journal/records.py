"""What the journal keeps of a machine: desired state, observed state, and what was made for it. Values only."""

from __future__ import annotations

from typing import Literal

import msgspec

from pantala.domain.machine import State, Verb
from pantala.wire.machine import ImageRef, MachineConfig, OtherImage
from pantala.wire.node import AppRef

Goal = Literal["started", "stopped", "suspended", "destroyed", "migrated", "created", "rest"]
Source = Literal["user", "flyd", "proxy"]


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a machine: what it runs. `pull_token` is sealed to the node's own key, those of
    `other_images` (containers' and volumes', by the config's names) too."""

    instance_id: str
    config: MachineConfig
    image: ImageRef
    created_at_ms: int
    pull_token: str = ""
    other_images: dict[str, OtherImage] = {}
    min_secrets_version: int = 0


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """Where the machine should end. `created`: made ready without launching it, and then stopped; `rest`: stay as it
    is (it failed, or its exit was final); `migrated`: it is placed on another host, this copy ends."""

    goal: Goal
    source: Source = "user"
    restart: bool = False
    signal: str | None = None
    timeout_s: float | None = None
    force: bool = False

    @property
    def ends(self) -> bool:
        """Nothing can be asked of it any more."""
        return self.goal in ("destroyed", "migrated")


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    nonce: str
    owner: str
    description: str
    expires_at_ms: int
    version: str


class HoldRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that must not be put to sleep before `until_ms`, and why."""

    until_ms: int
    reason: str


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a schedule. `outcome`: started, ended (the reason says how), missed or skipped."""

    due_ms: int
    outcome: str
    reason: str = ""


class ScheduleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """When a scheduled machine runs next, and its last runs, newest first. `expression` is the config's: another one
    begins anew. Words count from `anchor_ms`. `waits`: the run that is due waits for room; its history says so."""

    expression: str
    next_ms: int
    anchor_ms: int
    runs: tuple[RunRecord, ...] = ()
    waits: bool = False


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`runtime` and `network` say what has been made on this host under the machine's id; `next_version` waits to
    replace `version`. `restarts_ms` are the restarts that the policy counts. `answered_instance` is the last version
    that answered over HTTP when the agent asked it. `hidden`: nobody is told of it yet. `state_since_ms` is 0 in
    records of older agents."""

    id: str
    app: AppRef
    name: str
    region: str
    generation: int
    version: Version
    desired: Desired
    state: State
    slot: int
    ip4: str
    gateway4: str
    ip6: str
    uid_base: int
    created_at_ms: int
    updated_at_ms: int
    next_version: Version | None = None
    reason: str = ""
    cordoned: bool = False
    lease: LeaseRecord | None = None
    network: bool = False
    runtime: Literal["none", "prepared", "running", "suspended"] = "none"
    runtime_instance: str = ""
    started_at_ms: int = 0
    stop_requested: bool = False
    restarts_ms: tuple[int, ...] = ()
    restart_at_ms: int = 0
    destroyed_at_ms: int = 0
    answered_instance: str = ""
    hidden: bool = False
    state_since_ms: int = 0
    hold: HoldRecord | None = None
    schedule: ScheduleRecord | None = None

    def queued(self) -> tuple[Verb, ...]:
        """Requests that were accepted and are not done, for the judge."""
        out: list[Verb] = []
        if self.next_version is not None:
            out.append(Verb.UPDATE)
        if self.desired.restart:
            out.append(Verb.RESTART)
        elif self.desired.goal == "started" and self.state is not State.STARTED:
            out.append(Verb.START)
        elif self.desired.goal == "stopped" and self.state is not State.STOPPED:
            out.append(Verb.STOP)
        elif self.desired.goal == "suspended" and self.state is not State.SUSPENDED:
            out.append(Verb.SUSPEND)
        if self.desired.ends:
            out.append(Verb.DESTROY)
        return tuple(out)

    @property
    def latest(self) -> Version:
        """The version a caller sees: the newest that was accepted."""
        return self.next_version or self.version
