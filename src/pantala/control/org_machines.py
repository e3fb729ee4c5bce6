"""`GET /v1/orgs/{org}/machines`: the machines of all apps of an org, in the order in which they changed, in pages.

A cursor says after which change a page begins; whoever keeps the last one sees what changed since.
"""

from __future__ import annotations

import base64
from datetime import datetime
from typing import NamedTuple

import anyio
import msgspec

from pantala.auth.grants import Action, Principal
from pantala.control import documents
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.documents import Document
from pantala.control.projection import Projection
from pantala.errors import InvalidRequest
from pantala.kit.clock import unix_ms
from pantala.store import apps
from pantala.store.records import AppRecord, PlacementRecord
from pantala.wire.machine import Machine
from pantala.wire.platform import OrgMachinesResponse

LIMIT_MAX = 1000
APPS_AT_ONCE_MAX = 16
SHOWN = (
    "id", "name", "state", "region", "instance_id", "version", "private_ip", "created_at", "updated_at",
)  # fmt: skip
SHOWN_OF_CONFIG = ("image", "guest", "metadata")


class OrgChoice(NamedTuple):
    """`updated_after`: RFC 3339; a cursor counts more."""

    include_deleted: bool
    regions: frozenset[str]
    states: frozenset[str]
    summary: bool
    updated_after: str
    cursor: str
    limit: int


class _Position(NamedTuple):
    """Of a machine in the list: when it changed, and its id for those that changed at once."""

    at_ms: int
    machine_id: str


class OrgMachines:
    def __init__(self, context: Context, access: Access, projection: Projection) -> None:
        self._context = context
        self._access = access
        self._projection = projection

    async def page(self, principal: Principal, org_slug: str, choice: OrgChoice) -> OrgMachinesResponse:
        if not 1 <= choice.limit <= LIMIT_MAX:
            raise InvalidRequest(f"must be 1 to {LIMIT_MAX}", field="limit")
        after = _begin(choice)
        org = await self._access.seen_org(principal, org_slug)
        mine = await self._context.db.read(lambda c: apps.list_apps(c, org_id=org.id))
        readable = [
            app for app in mine if self._access.allows(principal, Action.READ, org_id=app.org_id, app_id=app.id)
        ]
        found: list[tuple[_Position, AppRecord, PlacementRecord, Machine]] = []
        limiter = anyio.CapacityLimiter(APPS_AT_ONCE_MAX)

        async def ask(app: AppRecord) -> None:
            async with limiter:
                machines = await self._projection.machines_of(app, include_deleted=choice.include_deleted)
            found.extend((_position(machine), app, placement, machine) for placement, machine in machines)

        async with anyio.create_task_group() as tasks:
            for app in readable:
                tasks.start_soon(ask, app)
        silent = sorted({machine.region for _, _, _, machine in found if machine.host_status != "ok"})
        wanted = sorted((one for one in found if one[0] > after and _chosen(one[3], choice)), key=lambda one: one[0])
        shown = wanted[: choice.limit]
        last = shown[-1] if shown else None
        return OrgMachinesResponse(
            machines=[_document(app, placement, machine, choice) for _, app, placement, machine in shown],
            next_cursor=_cursor(last[0]) if last and len(wanted) > len(shown) else "",
            last_machine_id=last[3].id if last else "",
            last_updated_at=last[3].updated_at if last else "",
            error_regions=silent,
        )


def _chosen(machine: Machine, choice: OrgChoice) -> bool:
    return (not choice.regions or machine.region in choice.regions) and (
        not choice.states or machine.state in choice.states
    )


def _document(app: AppRecord, placement: PlacementRecord, machine: Machine, choice: OrgChoice) -> Document:
    whole = documents.answer(machine, placement)
    shown: Document = {"app_name": app.name, **{key: whole[key] for key in SHOWN}}
    config = whole.get("config") or whole.get("incomplete_config") or {}
    if not choice.summary:
        shown["config"] = {key: config[key] for key in SHOWN_OF_CONFIG if key in config}
    return shown


def _begin(choice: OrgChoice) -> _Position:
    if choice.cursor:
        try:
            at_ms, machine_id = msgspec.json.decode(base64.urlsafe_b64decode(choice.cursor), type=tuple[int, str])
        except (ValueError, msgspec.MsgspecError) as error:
            raise InvalidRequest("is none that an earlier answer gave", field="cursor") from error
        return _Position(at_ms, machine_id)
    if choice.updated_after:
        return _Position(
            unix_ms(_moment(choice.updated_after)), "\x7f"
        )  # ids are ASCII: none of that moment comes again
    return _Position(-1, "")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is not RFC 3339", field="updated_after") from error
    if moment.tzinfo is None:
        raise InvalidRequest(f"{text!r} has no time zone; RFC 3339 has one", field="updated_after")
    return moment


def _position(machine: Machine) -> _Position:
    return _Position(unix_ms(datetime.fromisoformat(machine.updated_at)), machine.id)


def _cursor(position: _Position) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(tuple(position))).decode()
