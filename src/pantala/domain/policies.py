"""Network policies: from what an app's owner wrote to what one machine may exchange directly. Pure.

    NetworkPolicy ─ `rows` ─► PolicyRow … ─ `allowed` ─► Allowed       control │ catalogue │ the machine's agent

Policies only open. Without any for it a machine may exchange everything that its network lets through; the first that
speaks of a direction closes that direction for it, and from then on what some policy opens is open. Source: machines
reference, section 14.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import msgspec

from pantala.wire.catalogue import PolicyRow
from pantala.wire.network_policies import Direction, PolicyRule, PolicySelector, Protocol

Port = tuple[str, int]
"""Protocol and number."""

PORT_MAX = 65_535
DIRECTIONS: tuple[Direction, ...] = ("ingress", "egress")
PORTS_PER_ROW, MACHINES_PER_ROW = 12, 6
"""With an app's name and a policy's metadata a row stays below what one of the catalogue should be."""


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine may exchange besides what always is: None is everything, in that direction."""

    ingress: tuple[Port, ...] | None = None
    egress: tuple[Port, ...] | None = None


def rows(app: str, selector: PolicySelector, rules: Sequence[PolicyRule]) -> list[PolicyRow]:
    """The same policy in small parts, always in the same order."""
    machines = sorted({machine.id for machine in selector.machines})
    groups = _groups(machines, MACHINES_PER_ROW) or [[]]
    return [
        PolicyRow(app=app, direction=direction, ports=ports, machines=group, metadata=selector.metadata)
        for direction in DIRECTIONS
        for ports in _ports(direction, rules)
        for group in groups
    ]


def _ports(direction: Direction, rules: Sequence[PolicyRule]) -> list[list[str]]:
    """One empty part where rules open nothing, no part where there is no rule."""
    mine = [rule for rule in rules if rule.direction == direction]
    opened = sorted({f"{port.protocol}/{port.port}" for rule in mine for port in rule.ports})
    return _groups(opened, PORTS_PER_ROW) or [[] for _ in mine[:1]]


def _groups(values: Sequence[str], size: int) -> list[list[str]]:
    return [list(values[at : at + size]) for at in range(0, len(values), size)]


def allowed(policies: Iterable[PolicyRow], machine_id: str, metadata: Mapping[str, str]) -> Allowed:
    """Of a machine, by all rows of its app."""
    mine = [row for row in policies if selects(row, machine_id, metadata)]
    return Allowed(ingress=_opened("ingress", mine), egress=_opened("egress", mine))


def selects(row: PolicyRow, machine_id: str, metadata: Mapping[str, str]) -> bool:
    named = not row.machines or machine_id in row.machines
    return named and all(metadata.get(key) == value for key, value in row.metadata.items())


def _opened(direction: Direction, policies: Sequence[PolicyRow]) -> tuple[Port, ...] | None:
    mine = [row for row in policies if row.direction == direction]
    ports = (_port(text) for row in mine for text in row.ports)
    return tuple(sorted({port for port in ports if port is not None})) if mine else None


def _port(text: str) -> Port | None:
    """None, which opens nothing, of what a later version may say."""
    protocol, _, number = text.partition("/")
    if protocol not in get_args(Protocol) or not number.isdecimal() or not 1 <= int(number) <= PORT_MAX:
        return None
    return protocol, int(number)
