"""The lifecycle of a machine: its states, its transitions, and the judge of requests. Pure.

The words are the wire's, in three families (persistent, transient, terminal). The agent is the only writer of a state
and walks only along `TRANSITIONS`:

    created ──► starting ──► started ──► stopping ──► stopped ──► starting
       │           │            ├──► restarting ──► starting         │
       │           ├──► failed ◄┤                                    │
       │           └──► stopped (its exit is final)                  │
       └──► stopped (created without launch, its image is here)      │
    started ──► suspending ──► suspended ──► starting, or stopping ──► stopped (what it held is dropped)
                     └──► stopping (it cannot be suspended)
    created, started, stopped, suspended, failed ──► updating ──► starting | stopped | failed
    starting ──► launch_failed (nothing will ever make it start) ──► destroying, or updating
    anything that is not terminal ──► destroying ──► destroyed | migrated (it is placed on another host now)

A machine that exits by itself goes from `started` to `restarting` or `stopped`, as its restart policy says
(`domain/restart.py`).
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from pantala.errors import NotFound, UserError, WrongState


class State(StrEnum):
    # persistent
    CREATED = "created"
    STARTED = "started"
    STOPPED = "stopped"
    SUSPENDED = "suspended"
    FAILED = "failed"
    # transient
    CREATING = "creating"
    STARTING = "starting"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    SUSPENDING = "suspending"
    DESTROYING = "destroying"
    UPDATING = "updating"
    REPLACING = "replacing"
    LAUNCH_FAILED = "launch_failed"
    # terminal
    DESTROYED = "destroyed"
    REPLACED = "replaced"
    MIGRATED = "migrated"


PERSISTENT = frozenset({State.CREATED, State.STARTED, State.STOPPED, State.SUSPENDED, State.FAILED})
TERMINAL = frozenset({State.DESTROYED, State.REPLACED, State.MIGRATED})

SETTLED = PERSISTENT | TERMINAL | {State.LAUNCH_FAILED}
"""What `wait?state=settled` waits for."""

RUNS = frozenset({State.STARTED, State.STOPPING, State.SUSPENDING})
"""A process of the app may run."""

TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.STARTING, State.STOPPED, State.UPDATING, State.FAILED, State.DESTROYING}),
    State.STARTING: frozenset(
        {State.STARTED, State.STOPPED, State.FAILED, State.LAUNCH_FAILED, State.UPDATING, State.DESTROYING}
    ),
    State.STARTED: frozenset(
        {
            State.STOPPING,
            State.STOPPED,
            State.RESTARTING,
            State.SUSPENDING,
            State.UPDATING,
            State.FAILED,
            State.DESTROYING,
        }
    ),
    State.SUSPENDING: frozenset({State.SUSPENDED, State.STARTED, State.STOPPING, State.STOPPED, State.DESTROYING}),
    State.SUSPENDED: frozenset({State.STARTING, State.STOPPING, State.STOPPED, State.UPDATING, State.DESTROYING}),
    State.LAUNCH_FAILED: frozenset({State.STARTING, State.UPDATING, State.DESTROYING}),
    State.RESTARTING: frozenset({State.STARTING, State.STOPPED, State.FAILED, State.UPDATING, State.DESTROYING}),
    State.STOPPING: frozenset({State.STOPPED, State.FAILED, State.DESTROYING}),
    State.STOPPED: frozenset({State.STARTING, State.UPDATING, State.FAILED, State.DESTROYING}),
    State.FAILED: frozenset({State.STARTING, State.STOPPED, State.UPDATING, State.DESTROYING}),
    State.UPDATING: frozenset({State.STARTING, State.STOPPED, State.FAILED, State.DESTROYING}),
    State.DESTROYING: frozenset({State.DESTROYED, State.MIGRATED}),
    State.DESTROYED: frozenset(),
    State.MIGRATED: frozenset(),
}


def may_follow(state: State, following: State) -> bool:
    """Whether the agent may go from `state` to `following`; staying is always allowed."""
    return state == following or following in TRANSITIONS.get(state, frozenset())


class Verb(StrEnum):
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    SUSPEND = "suspend"
    UPDATE = "update"
    DESTROY = "destroy"


class Accepted(msgspec.Struct, frozen=True):
    """It will be journaled and done."""


class Ignored(msgspec.Struct, frozen=True):
    """Already so, or on its way."""

    reason: str


class Refused(msgspec.Struct, frozen=True):
    reason: str
    error: type[UserError]


Judgement = Accepted | Ignored | Refused

_UP = frozenset({State.STARTED, State.STARTING, State.RESTARTING})
_DOWN = frozenset({State.STOPPED, State.STOPPING, State.LAUNCH_FAILED})
_ASLEEP = frozenset({State.SUSPENDED, State.SUSPENDING})
_DIRECTIONS = (Verb.START, Verb.STOP, Verb.RESTART, Verb.SUSPEND)


def judge(state: State, queued: tuple[Verb, ...], verb: Verb, *, force: bool = False) -> Judgement:
    """Whether a request may be taken, seen what the machine is and what was accepted but is not done yet.

    `queued` is in order of arrival; of start, stop and suspend the last one decides where the machine will end.
    """
    if state in TERMINAL:
        return Ignored("already destroyed") if verb is Verb.DESTROY else Refused("machine not found", NotFound)
    if state is State.DESTROYING or Verb.DESTROY in queued:
        if verb is Verb.DESTROY:
            return Ignored("already being destroyed")
        return Refused("machine is being destroyed", WrongState)

    last = next((v for v in reversed(queued) if v in _DIRECTIONS), None)
    will_run = last in (Verb.START, Verb.RESTART) if last else state in _UP
    if verb is Verb.START:
        return Ignored("already started, or on its way") if will_run else Accepted()
    if verb is Verb.STOP:
        will_stop = last is Verb.STOP or (last is None and state in _DOWN)
        return Ignored("already stopped, or on its way") if will_stop else Accepted()
    if verb is Verb.RESTART:
        if last is Verb.RESTART:
            return Ignored("already restarting")
        return Accepted() if will_run else Refused(f"machine is {state}; start it instead", WrongState)
    if verb is Verb.SUSPEND:
        if last is Verb.SUSPEND or (last is None and state in _ASLEEP):
            return Ignored("already suspended, or on its way")
        return Accepted() if will_run else Refused(f"machine is {state}; only a started one suspends", WrongState)
    if verb is Verb.DESTROY and not force and (will_run or state in RUNS):
        return Refused(f"machine is {state}; stop it first, or destroy it with force", WrongState)
    return Accepted()
