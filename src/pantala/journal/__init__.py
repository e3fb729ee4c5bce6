"""A host's own truth: machines, steps, events, outcomes, sealed secrets (SQLite). Written by the agent alone."""

from pantala.journal.journal import Change, Journal, Step
from pantala.journal.records import (
    Desired,
    HoldRecord,
    LeaseRecord,
    MachineRecord,
    RunRecord,
    ScheduleRecord,
    Version,
)

__all__ = [
    "Change",
    "Desired",
    "HoldRecord",
    "Journal",
    "LeaseRecord",
    "MachineRecord",
    "RunRecord",
    "ScheduleRecord",
    "Step",
    "Version",
]
