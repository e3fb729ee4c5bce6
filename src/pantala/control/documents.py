"""Machine documents on their way out: the node's answer, with what the caller's config had that we do not know.

A config is kept as it was submitted beside the typed one that machines run from. An answer is the typed document of the
node that owns the machine, plus every field of the submitted one that it lacks, as long as both are of one version.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from pantala.store.records import PlacementRecord
from pantala.wire.machine import Machine

Document = dict[str, Any]
ECHOES_KEPT = 1000
_AUTOSTOP = {"off": False, "stop": True}


LEFT_OUT_OF_SUMMARIES = ("config", "incomplete_config", "checks", "events", "host_status", "nonce", "lease")


def answer(
    machine: Machine, placement: PlacementRecord, *, with_lease: bool = False, summary: bool = False
) -> Document:
    configs = {"config": machine.config, "incomplete_config": machine.incomplete_config}
    document: Document = msgspec.to_builtins(msgspec.structs.replace(machine, config=None, incomplete_config=None))
    if not with_lease:
        document.pop("lease", None)
    if summary:
        return {key: value for key, value in document.items() if key not in LEFT_OUT_OF_SUMMARIES}
    submitted = _submitted(placement, machine.instance_id)
    for name, config in configs.items():
        if config is not None:
            document[name] = dict(_echoed(msgspec.json.encode(config), submitted))
    return document


@lru_cache(maxsize=ECHOES_KEPT)
def _echoed(typed: bytes, submitted: str) -> Document:
    """Machines of an app mostly have one config, and it is asked for again and again. Shared: never written to."""
    return echo(msgspec.json.decode(typed), msgspec.json.decode(submitted) if submitted else {})


def snapshot_of(placement: PlacementRecord) -> Machine:
    return msgspec.json.decode(placement.snapshot, type=Machine)


def unreachable(machine: Machine, *, host_status: str = "unreachable", state: str | None = None) -> Machine:
    """What is last known of a machine whose owner does not answer."""
    config = machine.config or machine.incomplete_config
    changed: dict[str, Any] = {"host_status": host_status, "config": None, "incomplete_config": config}
    changed |= {"nonce": None, "lease": None}
    return msgspec.structs.replace(machine, **changed, **({"state": state} if state else {}))


def echo(typed: Document, submitted: Document) -> Document:
    """`typed` with the unknown fields of `submitted`; `autostop` as clients read it (superfly/fly-go)."""
    merged: Document = fill(typed, submitted)
    metadata = typed.get("metadata")
    if metadata is not None:
        merged["metadata"] = metadata  # changed by an endpoint of its own, so the node alone knows it
    else:
        merged.pop("metadata", None)
    for service in merged.get("services") or []:
        autostop = service.get("autostop")
        if isinstance(autostop, str):
            service["autostop"] = _AUTOSTOP.get(autostop, autostop)
    return merged


def fill(into: Any, extra: Any) -> Any:
    """`into`, and what only `extra` has; lists are gone through side by side when they are as long."""
    if isinstance(into, dict) and isinstance(extra, dict):
        filled: Document = {key: fill(value, extra.get(key)) for key, value in into.items()}
        return filled | {key: value for key, value in extra.items() if key not in into}
    if isinstance(into, list) and isinstance(extra, list) and len(into) == len(extra):
        return [fill(left, right) for left, right in zip(into, extra, strict=True)]
    return into


class _Version(msgspec.Struct, frozen=True):
    """Of a snapshot no more than is needed here."""

    instance_id: str


_VERSION = msgspec.json.Decoder(_Version)


def _submitted(placement: PlacementRecord, instance_id: str) -> str:
    """The config as its text; empty where it is of another version."""
    if not placement.snapshot or _VERSION.decode(placement.snapshot).instance_id != instance_id:
        return ""
    return placement.config
