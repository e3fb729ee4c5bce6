"""Addresses of apps, given from the operator's pools. Owns the tables addresses and shared_addresses.

An address that is released rests for a day before it is given to another app: until then names may still lead to it.
"""

from __future__ import annotations

from ipaddress import ip_address

from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.publication import Publication
from pantala.errors import CapacityError, Conflict, InvalidRequest, NotFound
from pantala.kit.clock import rfc3339_ms
from pantala.net import sixpn
from pantala.planner import addresses as plan
from pantala.store import addresses, apps
from pantala.store.records import AddressRecord, AppRecord
from pantala.wire.addresses import AddressType, AllocateRequest, Assignment, Assignments

REST_MS = 24 * 3600 * 1000
OF_AN_APP_MAX = 64
REGION = "global"
WORDS = {"v4": "dedicated IPv4", "v6": "IPv6", "shared_v4": "shared IPv4", "private_v6": "private IPv6"}


class Addresses:
    """Raises InvalidRequest when made with pools that cannot be."""

    def __init__(self, context: Context, access: Access, publication: Publication) -> None:
        self._context = context
        self._access = access
        self._publication = publication
        pools = context.settings.pools
        self._pools = {
            "v4": plan.prefixes(pools.v4, version=4, field="pools.v4"),
            "v6": plan.prefixes(pools.v6, version=6, field="pools.v6"),
        }
        plan.prefixes([f"{text}/32" for text in pools.shared_v4], version=4, field="pools.shared_v4")

    async def list_addresses(self, principal: Principal, app_name: str) -> Assignments:
        app = await self._access.app(principal, app_name, Action.READ)
        found = await self._context.db.read(lambda c: addresses.list_addresses(c, app_id=app.id))
        return Assignments(ips=[_assignment(record) for record in found])

    async def allocate(self, principal: Principal, app_name: str, request: AllocateRequest) -> Assignment:
        """Raises CapacityError naming the pool that is empty and what the operator can do."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        org_id = app.org_id
        if request.type != "private_v6" and (request.network or request.org_slug not in ("", app.org_slug)):
            raise InvalidRequest("only private addresses are for a network", field="network")
        if request.org_slug and request.org_slug != app.org_slug:
            org_id = (await self._access.org(principal, request.org_slug, Action.DEPLOY)).id
        now_ms = self._context.now_ms()

        def allocate(connection: Connection) -> AddressRecord:
            kept = addresses.list_addresses(connection, app_id=app.id)
            if len(kept) >= OF_AN_APP_MAX:
                raise InvalidRequest(f"an app may have {OF_AN_APP_MAX} addresses", field="type")
            if request.type == "shared_v4":
                given = self._share(connection, app, kept, now_ms=now_ms)
            else:
                network_id = app.network_id if request.type == "private_v6" else None
                if request.type == "private_v6" and (request.network or org_id != app.org_id):
                    name = request.network or DEFAULT_NETWORK
                    network_id = apps.find_network(connection, org_id=org_id, name=name)
                    if network_id is None:
                        raise NotFound(f"there is no network {name} in that organization")
                given = self._pick(connection, request.type, network_id, now_ms=now_ms)
                addresses.take_address(
                    connection, given, kind=request.type, app_id=app.id, network_id=network_id, now_ms=now_ms
                )
            self._context.audit_app(connection, principal, app, "address.allocate", given)
            made = addresses.list_addresses(connection, app_id=app.id)
            return next(record for record in made if record.address == given)

        given = await self._context.db.write(allocate)
        if given.kind != "shared_v4":
            await self._publication.publish_address(given.address)
        return _assignment(given)

    async def release(self, principal: Principal, app_name: str, ip: str) -> None:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        try:
            address = str(ip_address(ip))
        except ValueError as error:
            raise InvalidRequest(f"{ip!r} is no address", field="ip") from error
        now_ms = self._context.now_ms()

        def release(connection: Connection) -> AddressRecord:
            kept = addresses.list_addresses(connection, app_id=app.id)
            found = next((record for record in kept if record.address == address), None)
            if found is None:
                raise NotFound(f"{app.name} has no address {address}", hint="`pantala ips list` shows those it has")
            if found.kind == "shared_v4":
                addresses.release_shared(connection, app.id)
            else:
                addresses.release_address(connection, address, app_id=app.id, now_ms=now_ms)
            self._context.audit_app(connection, principal, app, "address.release", address)
            return found

        released = await self._context.db.write(release)
        if released.kind != "shared_v4":
            await self._publication.publish_address(address)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _share(self, connection: Connection, app: AppRecord, kept: list[AddressRecord], *, now_ms: int) -> str:
        if any(record.kind == "shared_v4" for record in kept):
            raise Conflict(f"{app.name} has a shared IPv4 address already")
        pool = self._context.settings.pools.shared_v4
        if not pool:
            raise _empty("shared_v4", plan.Pick(address=None), set_up=False)
        address = pool[app.id % len(pool)]
        addresses.take_shared(connection, address, app_id=app.id, now_ms=now_ms)
        return address

    def _pick(self, connection: Connection, kind: AddressType, network_id: int | None, *, now_ms: int) -> str:
        taken = addresses.list_taken(connection, kind, released_after_ms=now_ms - REST_MS)
        if kind == "private_v6":
            assert network_id is not None
            candidates = (str(sixpn.flycast_address(network_id, number)) for number in range(1, len(taken) + 2))
            return next(address for address in candidates if address not in taken)
        pool = self._pools[kind]
        picked = plan.pick(pool, taken)
        if picked.address is None:
            raise _empty(kind, picked, set_up=bool(pool))
        return picked.address


DEFAULT_NETWORK = "default"


def _empty(kind: AddressType, picked: plan.Pick, *, set_up: bool) -> CapacityError:
    hint = f"the operator adds addresses to pools.{kind} of the server's settings"
    if not set_up:
        return CapacityError(f"this platform has no pool of {WORDS[kind]} addresses", hint=hint)
    resting = f", {picked.resting} were released within a day" if picked.resting else ""
    return CapacityError(
        f"the pool of {WORDS[kind]} addresses is empty: {picked.used} are in use{resting}",
        hint=f"release one with `pantala ips release`, or {hint}",
    )


def _assignment(record: AddressRecord) -> Assignment:
    return Assignment(
        ip=record.address,
        region=REGION,
        service_name="",
        shared=record.kind == "shared_v4",
        created_at=rfc3339_ms(record.created_at_ms),
    )
