"""What a token allows. Pure: grants, an action and a moment go in, yes or no comes out.

role     read  change machines,        create and   issue tokens,
               secrets, releases,      delete apps  change the org
               push images
read      x
deploy    x     x                                                    (usually bound to one app)
member    x     x                       x            app tokens only
admin     x     x                       x            x
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import msgspec

Role = Literal["read", "deploy", "member", "admin"]


class Action(StrEnum):
    READ = "read"
    DEPLOY = "deploy"
    MANAGE_APPS = "manage_apps"
    ISSUE_APP_TOKENS = "issue_app_tokens"
    ADMIN = "admin"


ALLOWED: dict[Role, frozenset[Action]] = {
    "read": frozenset({Action.READ}),
    "deploy": frozenset({Action.READ, Action.DEPLOY}),
    "member": frozenset({Action.READ, Action.DEPLOY, Action.MANAGE_APPS, Action.ISSUE_APP_TOKENS}),
    "admin": frozenset(Action),
}


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """One role in one org; with `app_id` for that app alone."""

    role: Role
    org_id: int
    app_id: int | None = None
    expires_at_ms: int


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks: every valid token of the request, expanded. `personal`: one of them is the user's own."""

    user_id: str
    email: str
    grants: tuple[Grant, ...]
    personal: bool = False

    def orgs(self, *, now_ms: int) -> set[int]:
        return {grant.org_id for grant in self.grants if grant.expires_at_ms > now_ms}


def allows(grants: Iterable[Grant], action: Action, *, org_id: int, app_id: int | None, now_ms: int) -> bool:
    """Any one grant suffices. A grant for one app says nothing about its org (`app_id` None)."""
    return any(
        grant.org_id == org_id
        and (grant.app_id is None or grant.app_id == app_id)
        and grant.expires_at_ms > now_ms
        and action in ALLOWED[grant.role]
        for grant in grants
    )
