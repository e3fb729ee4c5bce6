"""Apps: names, networks, deletion. Owns the tables apps and networks."""

from __future__ import annotations

import re

from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.accounts import org_ref
from pantala.control.context import Context
from pantala.control.publication import Publication
from pantala.control.statics import Statics
from pantala.errors import Forbidden, InvalidRequest, NameTaken, NotOffered
from pantala.net import sixpn
from pantala.store import addresses, apps, hostnames, machines, network_policies
from pantala.store.records import AppRecord
from pantala.wire.api import App, CreateAppRequest, ListAppsResponse

DEFAULT_NETWORK = "default"
RESERVED = frozenset(
    "admin api app apps auth billing console dashboard dns docs edge flycast health internal localhost login mail "
    "metrics ns oidc pantala registry root smtp ssh status support www".split()
)
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NETWORK = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,62}")


class Apps:
    def __init__(self, context: Context, access: Access, publication: Publication, statics: Statics) -> None:
        self._context = context
        self._access = access
        self._publication = publication
        self._statics = statics

    async def create(self, principal: Principal, request: CreateAppRequest) -> App:
        """Raises NameTaken; names are global, and free again once their app is deleted."""
        name = _checked_name(request)
        if request.enable_subdomains:
            raise NotOffered("enable_subdomains: names below an app's name are not offered yet; leave it out")
        network = request.network or DEFAULT_NETWORK
        if not _NETWORK.fullmatch(network):
            raise InvalidRequest("letters, digits and dashes, beginning with a letter", field="network")
        org = await self._access.org(principal, request.org_slug, Action.MANAGE_APPS)
        now_ms = self._context.now_ms()

        def insert(connection: Connection) -> AppRecord:
            network_id = apps.ensure_network(connection, org_id=org.id, name=network)
            role = request.app_role_id or ""
            apps.insert_app(connection, name=name, org_id=org.id, network_id=network_id, role=role, now_ms=now_ms)
            self._audit(connection, principal, org.id, "app.create", name)
            made = apps.find_app(connection, name)
            assert made is not None
            return made

        made = await self._context.db.write(insert)
        await self._publication.publish_app(name)
        return self._answer(made, machine_count=0)

    async def get(self, principal: Principal, name: str) -> App:
        if name in RESERVED:
            raise Forbidden(f"the app name {name} is reserved")
        app = await self._access.app(principal, name, Action.READ, names_are_public=True)
        counts = await self._context.db.read(apps.count_machines)
        return self._answer(app, machine_count=counts.get(app.id, 0))

    async def list_apps(self, principal: Principal, *, org_slug: str | None, role: str | None) -> ListAppsResponse:
        """Those of the org's apps that the caller may read."""
        if not org_slug:
            raise InvalidRequest("is required: whose apps?", field="org_slug")
        org = await self._access.seen_org(principal, org_slug)

        def load(connection: Connection) -> tuple[list[AppRecord], dict[int, int]]:
            return apps.list_apps(connection, org_id=org.id), apps.count_machines(connection)

        found, counts = await self._context.db.read(load)
        mine = [
            self._answer(app, machine_count=counts.get(app.id, 0))
            for app in found
            if (not role or app.role == role)
            and self._access.allows(principal, Action.READ, org_id=app.org_id, app_id=app.id)
        ]
        return ListAppsResponse(total_apps=len(mine), apps=mine)

    async def delete(self, principal: Principal, name: str) -> None:
        """The name is free and nothing routes to the app when this returns; its machines are swept after that. Files
        that its deploys have put into buckets go with it, as far as their store answers."""
        app = await self._access.app(principal, name, Action.MANAGE_APPS)
        now_ms = self._context.now_ms()
        pushed = await self._statics.of_destroyed(app)

        def remove(connection: Connection) -> list[str]:
            """What was its own: free again."""
            if not apps.delete_app(connection, app.id, now_ms=now_ms):
                return []
            machines.destroy_all_of_app(connection, app.id, now_ms=now_ms)
            freed = addresses.release_all(connection, app.id, now_ms=now_ms)
            for record in hostnames.list_hostnames(connection, app_id=app.id):
                hostnames.delete_hostname(connection, record.hostname)
                freed.append(record.hostname)
            freed += network_policies.delete_all(connection, app.id)
            self._audit(connection, principal, app.org_id, "app.delete", name)
            return freed

        freed = await self._context.db.write(remove)
        await self._publication.publish_app(name)
        if freed:
            await self._publication.publish_all()
        await self._statics.forget(name, pushed)

    def _audit(self, connection: Connection, principal: Principal, org_id: int, action: str, target: str) -> None:
        self._context.audit(
            connection,
            actor=principal.email,
            org_id=org_id,
            action=action,
            target=target,
        )

    def _answer(self, app: AppRecord, *, machine_count: int) -> App:
        hostname = self._publication.default_hostname(app.name)
        match app.status:
            case "deployed" | "suspended":
                status = app.status
            case _:
                status = "pending"
        return App(
            id=f"app_{app.id}",
            name=app.name,
            internal_numeric_id=app.id,
            status=status,
            organization=org_ref(app.org_slug, app.org_name, app.org_id),
            network=app.network,
            network_cidr=str(sixpn.network_prefix(app.network_id)),
            machine_count=machine_count,
            volume_count=0,
            cname_target=hostname,
            hostname=hostname,
            app_role=app.role,
        )


def _checked_name(request: CreateAppRequest) -> str:
    field = "app_name" if request.app_name else "name"
    name = request.app_name or request.name
    if not name:
        raise InvalidRequest("is required", field="app_name")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} must be 1 to 63 lower-case letters, digits and dashes, with no dash at either end", field=field
        )
    if name in RESERVED:
        raise NameTaken(apps.NAME_TAKEN, hint="the platform keeps this name for itself")
    return name
