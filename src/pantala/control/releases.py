"""Releases: numbered records of what an app deployed, with the plan and cursor of the executor that carries one out.

    pending ─► running ─► complete | failed | interrupted          (the last three are final)
       └──────────┴─► withdrawn: gone, since it changed nothing

Owns the table releases, and the app's status (deployed once a release is complete).
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.errors import InvalidRequest, NotFound, WrongState
from pantala.kit import ids
from pantala.kit.clock import rfc3339_ms
from pantala.store import apps
from pantala.store.records import ReleaseRecord
from pantala.wire.api import CreateReleaseRequest, ListReleasesResponse, Release, UpdateReleaseRequest

STRATEGIES = ("rolling", "immediate", "canary", "bluegreen")
NEXT: dict[str, frozenset[str]] = {
    "pending": frozenset({"running", "complete", "failed", "interrupted"}),
    "running": frozenset({"complete", "failed", "interrupted"}),
    "complete": frozenset(),
    "failed": frozenset(),
    "interrupted": frozenset(),
}
LIST_MAX = 500


class Releases:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def create(self, principal: Principal, app_name: str, request: CreateReleaseRequest) -> Release:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        strategy = request.strategy.lower()
        if strategy not in STRATEGIES:
            raise InvalidRequest(f"{request.strategy!r} is none of {', '.join(STRATEGIES)}", field="strategy")
        if not request.image:
            raise InvalidRequest("is required", field="image")
        try:
            msgspec.json.decode(request.definition)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"is not JSON: {error}", field="definition") from error
        now_ms = self._context.now_ms()
        release_id = ids.ulid(now_ms)

        def insert(connection: Connection) -> ReleaseRecord:
            made = apps.insert_release(
                connection,
                app_id=app.id,
                id=release_id,
                status="pending",
                image=request.image,
                definition=request.definition,
                description=request.description,
                strategy=strategy,
                user=principal.email,
                reason="",
                plan="",
                cursor=0,
                created_at_ms=now_ms,
                updated_at_ms=now_ms,
            )
            self._context.audit(
                connection,
                actor=principal.email,
                org_id=app.org_id,
                action="release.create",
                target=f"{app.name}/v{made.version}",
            )
            return made

        return _answer(await self._context.db.write(insert))

    async def list_releases(self, principal: Principal, app_name: str, *, limit: int) -> ListReleasesResponse:
        """Newest first."""
        if not 1 <= limit <= LIST_MAX:
            raise InvalidRequest(f"must be 1 to {LIST_MAX}", field="limit")
        app = await self._access.app(principal, app_name, Action.READ)
        found = await self._context.db.read(lambda c: apps.list_releases(c, app.id, limit=limit))
        return ListReleasesResponse(releases=[_answer(record) for record in found])

    async def get(self, principal: Principal, app_name: str, release_id: str) -> Release:
        return _answer(await self._find(principal, app_name, release_id, Action.READ))

    async def current(self, principal: Principal, app_name: str) -> Release:
        """The newest one that was completed."""
        app = await self._access.app(principal, app_name, Action.READ)
        found = await self._context.db.read(lambda c: apps.list_releases(c, app.id, limit=LIST_MAX))
        for record in found:
            if record.status == "complete":
                return _answer(record)
        raise NotFound(f"the app {app_name} has no completed release")

    async def definition(self, principal: Principal, app_name: str, release_id: str) -> Any:
        """The fly.toml (as JSON) that the release was made from."""
        record = await self._find(principal, app_name, release_id, Action.READ)
        return msgspec.json.decode(record.definition)

    async def update(
        self, principal: Principal, app_name: str, release_id: str, request: UpdateReleaseRequest
    ) -> Release:
        """Repeating a status is no error; leaving a final one is. Plan and cursor only move while it is not final."""
        before = await self._find(principal, app_name, release_id, Action.DEPLOY)
        status = request.status or before.status
        if status != before.status and status not in NEXT[before.status]:
            raise WrongState(f"the release v{before.version} is {before.status} and cannot become {status}")
        if not NEXT[before.status] and (request.plan is not None or request.cursor is not None):
            raise WrongState(f"the release v{before.version} is {before.status}; its plan can no longer change")
        if request.cursor is not None and request.cursor < 0:
            raise InvalidRequest("must not be negative", field="cursor")
        now_ms = self._context.now_ms()
        values: dict[str, Any] = {"status": status, "updated_at_ms": now_ms}
        for name in ("plan", "cursor", "reason"):
            if getattr(request, name) is not None:
                values[name] = getattr(request, name)

        def change(connection: Connection) -> ReleaseRecord | None:
            if not apps.update_release(connection, before, **values):
                return None
            if status == "complete":
                apps.set_status(connection, before.app_id, "deployed")
            return apps.find_release(connection, before.app_id, before.id)

        changed = await self._context.db.write(change)
        if changed is None:
            raise WrongState(
                f"the release v{before.version} was changed by somebody else meanwhile", hint="read it again"
            )
        return _answer(changed)

    async def withdraw(self, principal: Principal, app_name: str, release_id: str) -> None:
        """Forget a release whose deploy was refused before it changed anything; its version is used again."""
        before = await self._find(principal, app_name, release_id, Action.DEPLOY)
        if not NEXT[before.status]:
            raise WrongState(
                f"the release v{before.version} is {before.status}; only one that goes on can be withdrawn"
            )
        if before.cursor:
            raise WrongState(f"the release v{before.version} has changed machines; mark it as failed")
        app = await self._access.app(principal, app_name, Action.DEPLOY)

        def remove(connection: Connection) -> bool:
            if not apps.delete_release(connection, before):
                return False
            self._context.audit(
                connection,
                actor=principal.email,
                org_id=app.org_id,
                action="release.withdraw",
                target=f"{app.name}/v{before.version}",
            )
            return True

        if not await self._context.db.write(remove):
            raise WrongState(f"the release v{before.version} is not the newest any more, or has changed meanwhile")

    async def _find(self, principal: Principal, app_name: str, release_id: str, action: Action) -> ReleaseRecord:
        app = await self._access.app(principal, app_name, action)
        found = await self._context.db.read(lambda c: apps.find_release(c, app.id, release_id))
        if found is None:
            raise NotFound(f"release not found: {release_id}")
        return found


def _answer(record: ReleaseRecord) -> Release:
    return msgspec.convert(
        {
            "id": record.id,
            "version": record.version,
            "status": record.status,
            "image": record.image,
            "description": record.description,
            "strategy": record.strategy,
            "user": record.user,
            "created_at": rfc3339_ms(record.created_at_ms),
            "reason": record.reason,
            "plan": record.plan,
            "cursor": record.cursor,
        },
        type=Release,
    )
