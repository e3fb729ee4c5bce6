"""States of a machine: the wire's words in three families (`reference/machines.md` section 2)."""

from __future__ import annotations

from enum import StrEnum


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
TRANSIENT = frozenset(State) - PERSISTENT - TERMINAL

ROUTABLE = frozenset({State.STARTED})
"""Receives requests, if its checks pass and it is not cordoned."""

WAKEABLE = frozenset({State.STOPPED, State.SUSPENDED, State.CREATED})
"""A request may start it when its service has autostart."""

SETTLED = PERSISTENT | TERMINAL
"""What `wait?state=settled` waits for."""
