"""Bodies of `/v1/apps/{app}/network_policies`, with the names of the original.

Source: machines reference, section 14. A selector, rule or port with a field that is not known is refused rather than
read without it: a policy that says less than its author wrote protects nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Protocol = Literal["tcp", "udp"]
Direction = Literal["ingress", "egress"]


class PolicyPort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The port that is connected to: the machine's own of ingress, that of the other side of egress."""

    protocol: Protocol
    port: Annotated[int, Meta(ge=1, le=65_535)]


class PolicyRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No ports: nothing in that direction is allowed by this rule, and nothing is open by default any more."""

    action: Literal["allow"]
    direction: Direction
    ports: list[PolicyPort]


class PolicyMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Annotated[str, Meta(min_length=1, max_length=32, pattern="^[A-Za-z0-9]*$")]


class PolicySelector(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which of the app's machines. What is given holds together: any of `machines`, every pair of `metadata`."""

    all: bool = False
    machines: list[PolicyMachine] = []
    metadata: dict[str, str] = {}


class PutNetworkPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """With `id` that policy is changed; without, the one of that name, which is made if there is none."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    selector: PolicySelector
    rules: list[PolicyRule]
    id: str | None = None


class NetworkPolicy(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    selector: PolicySelector
    rules: list[PolicyRule]
    created_at: str
    updated_at: str
