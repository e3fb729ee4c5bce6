"""Bodies of `/v1/platform`, `/v1/orgs/{org}/machines` and the questions about tokens.

Source: flyctl-protocol reference, sections 4.11 and 4.13. flyctl reads capitalised keys where clients made from the
original's description read the others: such answers have both.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from pantala.wire.machine import Guest

COUNT_MAX = 1000


class PlacementsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`count` 0: how many would fit in each region. `weights`: `region` (50) for what is named first, `spread` (1) for
    regions that have few of them yet."""

    org_slug: str
    compute: Guest | None = None
    region: str | None = None
    count: Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)] = 0
    volume_name: str | None = None
    volume_size_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    weights: dict[str, int] | None = None


class RegionPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """`count` machines would go there, on `concurrency` different hosts."""

    region: str
    count: int
    concurrency: int
    Region: str
    Count: int
    Concurrency: int


class PlacementsResponse(msgspec.Struct, frozen=True, kw_only=True):
    regions: list[RegionPlacement]
    Regions: list[RegionPlacement]


class OrgMachinesResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Oldest change first. `next_cursor` while there are more; `error_regions`: where hosts did not answer, whose
    machines are shown as last known."""

    machines: list[dict[str, Any]]
    next_cursor: str = ""
    last_machine_id: str = ""
    last_updated_at: str = ""
    error_regions: list[str] = []


# -- tokens ------------------------------------------------------------------------------------------------------------


class AuthenticateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`header`: what another service got as `Authorization`."""

    header: str

    def __repr__(self) -> str:
        return "AuthenticateRequest()"


class VerifiedToken(msgspec.Struct, frozen=True, kw_only=True):
    """`header` holds only those tokens that are valid."""

    header: str
    user: str
    expires_at: str

    def __repr__(self) -> str:
        return f"VerifiedToken(user={self.user!r})"


class TokenAccess(msgspec.Struct, frozen=True, kw_only=True):
    """`action`: any of r, w, c, d, C (read, write, create, delete, control), or their sum as bits 1 to 16."""

    action: str | int
    org_slug: str | None = None
    app_name: str | None = None
    machine_id: str | None = None
    app_feature: str | None = None
    org_feature: str | None = None
    machine_feature: str | None = None
    volume_id: str | None = None
    mutation: str | None = None
    source_machine: str | None = None
    storage_object: str | None = None
    command: list[str] | None = None


class AuthorizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    header: str
    access: TokenAccess

    def __repr__(self) -> str:
        return f"AuthorizeRequest(access={self.access!r})"


class AuthorizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    access: TokenAccess
    verified_token: VerifiedToken


class TokenInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`apps` empty: all of the org. The last two are those of tokens that a machine uses; there are none yet."""

    token_id: str
    org_slug: str
    organization: str
    apps: list[str]
    user: str
    source_machine_id: str = ""
    restricted_to_machine: str = ""


class CurrentTokens(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[TokenInfo]
