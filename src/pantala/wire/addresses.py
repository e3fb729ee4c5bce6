"""Bodies of `/v1/apps/{app}/ip_assignments`, with the names of the original.

Source: flyctl-protocol reference, section 4.9.
"""

from __future__ import annotations

from typing import Literal

import msgspec

AddressType = Literal["v4", "v6", "shared_v4", "private_v6"]


class AllocateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`org_slug` and `network` choose whose private network a private address is for; empty: the app's own. `region`
    and `service_name` are accepted for compatibility: addresses are global and lead to all services."""

    type: AddressType
    region: str = ""
    org_slug: str = ""
    network: str = ""
    service_name: str = ""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    ip: str
    region: str
    service_name: str
    shared: bool
    created_at: str


class Assignments(msgspec.Struct, frozen=True, kw_only=True):
    ips: list[Assignment]
