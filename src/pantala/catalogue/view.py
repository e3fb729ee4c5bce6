"""What readers see: of all owners' rows the newest readable value of each key. In memory, told on as it changes.

A row is set aside (kept, counted, not shown) when its owner may not write it or its value cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import structlog

from pantala.catalogue.frames import ROW_BYTES_MAX
from pantala.wire import catalogue, feed
from pantala.wire.catalogue import OwnedRow

log = structlog.get_logger()

OnChange = Callable[[int, Sequence[feed.FeedRow]], None]

_TYPES: dict[tuple[str, str], type[msgspec.Struct]] = {
    ("routes", "app"): feed.AppRow,
    ("routes", "org"): feed.OrgRow,
    ("routes", "host"): feed.HostRow,
    ("routes", "addr"): feed.AddressRow,
    ("routes", "acme"): feed.AcmeRow,
    ("routes", "txt"): feed.TextRow,
    ("routes", "svc"): feed.ServiceRow,
    ("routes", "m"): feed.MachineRow,
    ("routes", "policy"): catalogue.PolicyRow,
    ("nodes", "node"): feed.NodeRow,
    ("nodes", "member"): feed.MemberRow,
    ("certs", "cert"): feed.CertRow,
    ("certs", "ticket"): feed.TicketRow,
    ("certs", "edge"): catalogue.EdgeKeyRow,
    ("certs", "ssh"): catalogue.SshRow,
}
_OF_NODES = frozenset({("routes", "m"), ("routes", "svc"), ("nodes", "node")})


def why_set_aside(owner: str, row: OwnedRow, *, control: str) -> str:
    """Empty when the row may be shown. Nodes write their own machines, services and themselves; control the rest."""
    kind = (row.stream, row.key.split("/", 1)[0])
    wanted = _TYPES.get(kind)
    if wanted is None or "/" not in row.key:
        return "unknown kind of row"
    if (owner == control) == (kind in _OF_NODES):
        return f"{owner} does not own rows like {row.stream} {row.key}"
    if row.value is None:
        return ""
    if len(msgspec.json.encode(row.value)) > ROW_BYTES_MAX:
        return "too large"
    try:
        value = msgspec.convert(row.value, wanted)
    except msgspec.ValidationError as error:
        return f"cannot be read: {error}"
    match value:
        case feed.MachineRow() if value.node != owner or f"m/{value.id}" != row.key:
            return f"{owner} speaks for another node's machine"
        case catalogue.PolicyRow() if not row.key.startswith(f"policy/{value.app}/"):
            return "the key names another app"
        case feed.MemberRow() if f"member/{value.id}" != row.key:
            return "the key names another node"
        case feed.NodeRow() if value.id != owner or f"node/{value.id}" != row.key:
            return f"{owner} speaks for another node"
        case _:
            return ""


class View:
    """`revision` grows with each change of what is shown."""

    def __init__(self, *, control: str) -> None:
        self.control = control
        self._rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self._shown: dict[tuple[str, str], dict[str, Any]] = {}
        self._listeners: list[OnChange] = []
        self.revision = 0
        self.set_aside: dict[tuple[str, str, str], str] = {}

    def apply(self, owner: str, rows: Iterable[OwnedRow], *, replace: bool = False) -> None:
        """Take an owner's rows; those that listen hear what differs now, before this returns."""
        touched: list[tuple[str, str]] = []
        if replace:
            for key, owners in self._rows.items():
                if owners.pop(owner, None) is not None:
                    touched.append(key)
            for place in [place for place in self.set_aside if place[0] == owner]:
                del self.set_aside[place]
        for row in rows:
            key = (row.stream, row.key)
            touched.append(key)
            reason = why_set_aside(owner, row, control=self.control)
            if reason:
                log.error("catalogue row set aside", owner=owner, stream=row.stream, key=row.key, reason=reason)
                self.set_aside[owner, *key] = reason
            else:
                self.set_aside.pop((owner, *key), None)
            if reason or row.value is None:
                self._rows.get(key, {}).pop(owner, None)
            else:
                self._rows.setdefault(key, {})[owner] = row.value
        self._tell(dict.fromkeys(touched))

    def get(self, stream: str, key: str) -> dict[str, Any] | None:
        return self._shown.get((stream, key))

    def all(self) -> list[feed.FeedRow]:
        return [feed.FeedRow(stream=stream, key=key, value=value) for (stream, key), value in self._shown.items()]

    def listen(self, on_change: OnChange) -> None:
        self._listeners.append(on_change)

    def _tell(self, touched: Iterable[tuple[str, str]]) -> None:
        changed: list[feed.FeedRow] = []
        for key in touched:
            owners = self._rows.get(key, {})
            value = max(owners.items(), key=_rank)[1] if owners else None
            if not owners:
                self._rows.pop(key, None)
            if value == self._shown.get(key):
                continue
            if value is None:
                del self._shown[key]
            else:
                self._shown[key] = value
            changed.append(feed.FeedRow(stream=key[0], key=key[1], value=value))
        if changed:
            self.revision += 1
            for listener in self._listeners:
                listener(self.revision, changed)


def _rank(candidate: tuple[str, dict[str, Any]]) -> tuple[int, str]:
    """A machine's row of the newest generation wins, whoever wrote it."""
    owner, value = candidate
    generation = value.get("generation")
    return (generation if isinstance(generation, int) else 0, owner)
