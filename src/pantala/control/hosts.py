"""Hosts join, are listed, renew and leave. Owns the tables nodes, host_tokens and edge_keys.

What a member of the cluster is, is decided here and nowhere else: a row of `nodes` with status active or draining,
which `publication` tells all readers as `member/<id>`. An id is never given twice.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Literal

import anyio.to_thread
import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from sqlalchemy import Connection

from pantala.auth import tokens
from pantala.auth.grants import Principal
from pantala.control import regions
from pantala.control.access import Access
from pantala.control.bus_accounts import BusAccounts
from pantala.control.cluster_authority import NODE_LIVES, ClusterAuthority, public_key_of
from pantala.control.context import Context
from pantala.control.edge_keys import EdgeKeys
from pantala.control.nodes import Nodes
from pantala.control.publication import Publication
from pantala.errors import Conflict, Forbidden, InvalidRequest, NotFound
from pantala.kit import ids, nkeys
from pantala.kit.clock import rfc3339_ms
from pantala.kit.sealing import unb64
from pantala.store import hosts, machines, moves, standbys
from pantala.store.records import EdgeKeyRecord, NodeRecord
from pantala.wire.hosts import (
    BusAccess,
    CreateHostTokenRequest,
    Epoch,
    HostToken,
    HostView,
    Joined,
    JoinRequest,
    Renewed,
    TokenText,
)

log = structlog.get_logger()

SCHEME = "pjt_"
TOKEN_LIVES_S_MAX = 7 * 24 * 3600
NODES_MAX = 10_000
REFUSED = "this join token is not valid: unknown, expired or already used"
ZONE = "0000"
NOT_RUNNING = ("stopped", "created", "failed", "launch_failed", "stopping", "suspending", "suspended")
RESERVED = ("control", "hold")
"""Words of the bus's subjects: a node of that name could speak as control, or for other holders."""
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ZONE = re.compile(r"[a-zA-Z0-9-]{0,32}")


class Hosts:
    def __init__(
        self,
        context: Context,
        access: Access,
        nodes: Nodes,
        publication: Publication,
        *,
        authority: ClusterAuthority,
        bus: BusAccounts,
        edge_keys: EdgeKeys,
        api_authority_pem: str,
        control_key: str,
    ) -> None:
        self._context = context
        self._access = access
        self._nodes = nodes
        self._publication = publication
        self._authority = authority
        self._bus = bus
        self._edge_keys = edge_keys
        self._api_authority_pem = api_authority_pem
        self._control_key = control_key

    # -- tokens ------------------------------------------------------------------------------------------------------

    async def create_token(self, principal: Principal, request: CreateHostTokenRequest) -> HostToken:
        await self._access.operator(principal)
        if not 1 <= request.expires_in_s <= TOKEN_LIVES_S_MAX:
            raise InvalidRequest(f"must be 1 to {TOKEN_LIVES_S_MAX} seconds", field="expires_in_s")
        if request.region:
            regions.check(request.region, configured=self._context.settings.regions)
        text, now_ms = self._token_text(), self._context.now_ms()
        token_id, expires_at_ms = ids.ulid(now_ms), now_ms + request.expires_in_s * 1000

        def insert(connection: Connection) -> None:
            hosts.insert_token(
                connection,
                token_id=token_id,
                digest=tokens.digest(text),
                region=request.region,
                made_by=principal.email,
                now_ms=now_ms,
                expires_at_ms=expires_at_ms,
            )
            self._audit(connection, principal.email, "host.token", token_id, {"region": request.region})

        await self._context.db.write(insert)
        return HostToken(id=token_id, token=text, expires_at=rfc3339_ms(expires_at_ms))

    def _token_text(self) -> str:
        """Through an edge where there is one: its certificate proves who answers. Without edges the API speaks plain
        HTTP on the hosts' own network."""
        settings = self._context.settings
        if settings.edge_addresses:
            certificate = x509.load_pem_x509_certificate(self._api_authority_pem.encode())
            text = TokenText(
                api=f"https://api.{settings.platform_domain}",
                address=f"{settings.edge_addresses[0]}:443",
                authority=certificate.fingerprint(hashes.SHA256()).hex(),
                secret=ids.token("s"),
            )
        else:
            backend = settings.api_backend
            text = TokenText(api=f"http://{backend}", address=backend, authority="", secret=ids.token("s"))
        return SCHEME + base64.urlsafe_b64encode(msgspec.json.encode(text)).rstrip(b"=").decode()

    # -- joining -----------------------------------------------------------------------------------------------------

    async def join(self, request: JoinRequest) -> Joined:
        """Redeem a token. One-time: of two hosts that send the same one, the first is in and the other is refused."""
        if request.node:
            raise InvalidRequest("is chosen by the platform", field="node", hint="leave it out")
        _check(request, configured=self._context.settings.regions, any_region=True)
        digest, now_ms = tokens.digest(request.token), self._context.now_ms()
        until_ms = now_ms + int(NODE_LIVES.total_seconds() * 1000)

        def admit(connection: Connection) -> tuple[NodeRecord, EdgeKeyRecord, list[NodeRecord]]:
            token = hosts.find_token(connection, digest)
            if token is None or token.used_at_ms is not None or token.expires_at_ms <= now_ms:
                raise Forbidden(REFUSED, hint="`pantala host token` makes another")
            if request.region and token.region not in ("", request.region):
                raise InvalidRequest(
                    f"this token is for a host in {token.region}, not in {request.region}", field="region"
                )
            region = request.region or token.region
            if not region:
                raise InvalidRequest("this token is for any; say which", field="region", hint="--region CODE")
            placed = msgspec.structs.replace(request, region=region)
            everyone = hosts.list_all_nodes(connection)
            _check_unique(placed, everyone)
            node = self._record(placed, _free_id(region, everyone), now_ms=now_ms, until_ms=until_ms)
            hosts.insert_node(connection, node)
            if not hosts.use_token(connection, token.id, node=node.id, now_ms=now_ms):
                raise Forbidden(REFUSED)
            self._audit(connection, f"token {token.id}", "host.join", node.id, {"address": node.address})
            return node, self._edge_keys.ensure(connection), everyone

        return await self._answer(request, *await self._context.db.write(admit))

    async def admit_first(self, request: JoinRequest) -> Joined:
        """A host that whoever sets up the platform names themselves (`bootstrap --hosts`). Safe to repeat with the same
        keys: the id, and its epoch, stay. Another key for a known id is refused."""
        if not _ID.fullmatch(request.node) or request.node in RESERVED:
            raise InvalidRequest(
                f"{request.node!r} must be lower-case letters, digits and dashes, at most 63, and none of "
                f"{', '.join(RESERVED)}",
                field="node",
            )
        _check(request, configured=self._context.settings.regions)
        now_ms = self._context.now_ms()
        until_ms = now_ms + int(NODE_LIVES.total_seconds() * 1000)

        def admit(connection: Connection) -> tuple[NodeRecord, EdgeKeyRecord, list[NodeRecord]]:
            everyone = hosts.list_all_nodes(connection)
            others = [node for node in everyone if node.id != request.node]
            known = hosts.find_node(connection, request.node)
            _check_unique(request, others)
            if known is None:
                known = self._record(request, request.node, now_ms=now_ms, until_ms=until_ms)
                hosts.insert_node(connection, known)
                self._audit(connection, "bootstrap", "host.join", known.id, {"address": known.address})
            else:
                _check_same(request, known)
                hosts.update_node(
                    connection,
                    known.id,
                    address=request.address,
                    edge=request.edge,
                    verify_key=request.verify_key,
                    bus_key=request.bus_key,
                    certificate_until_ms=until_ms,
                )
                found = hosts.find_node(connection, known.id)
                assert found is not None
                known = found
            return known, self._edge_keys.ensure(connection), others

        return await self._answer(request, *await self._context.db.write(admit))

    def _record(self, request: JoinRequest, node_id: str, *, now_ms: int, until_ms: int) -> NodeRecord:
        return NodeRecord(
            id=node_id,
            region=request.region,
            zone=request.zone or ZONE,
            status="active",
            address=request.address,
            edge=request.edge,
            sealing_key=request.sealing_key,
            verify_key=request.verify_key,
            bus_key=request.bus_key,
            epoch=1,
            certificate_until_ms=until_ms,
            created_at_ms=now_ms,
        )

    async def _answer(
        self, request: JoinRequest, node: NodeRecord, edge_key: EdgeKeyRecord, others: list[NodeRecord]
    ) -> Joined:
        certificate_pem, _ = await anyio.to_thread.run_sync(
            self._authority.sign, request.csr_pem, node.id, node.address
        )
        self._nodes.changed()
        await self._publication.publish_members()
        log.info("host joined", node=node.id, region=node.region, address=node.address, epoch=node.epoch)
        settings = self._context.settings
        members = {other.id for other in others if other.status in hosts.MEMBERS} | {node.id}
        revoked = [other.bus_key for other in others if other.status not in hosts.MEMBERS and other.bus_key]
        return Joined(
            node=node.id,
            region=node.region,
            zone=node.zone,
            epoch=node.epoch,
            certificate_pem=certificate_pem,
            authority_pem=self._authority.certificate_pem,
            control_key=self._control_key,
            edge_key_sealed=self._edge_keys.sealed_to(edge_key, node.sealing_key) if node.edge else "",
            bus=BusAccess(
                user_jwt=self._user_jwt(node),
                operator_jwt=self._bus.operator_jwt(),
                accounts=self._bus.accounts(revoked),
                system_account=self._bus.system_account,
                hubs=list(settings.bus_hubs),
                routes=list(settings.bus_routes),
                hub=node.address in {_host_of(hub) for hub in settings.bus_hubs},
            ),
            registries={settings.registry: settings.registry_url} if settings.registry_url else {},
            api_backend=settings.api_backend,
            app_domain=settings.app_domain,
            platform_domain=settings.platform_domain,
            edge_addresses=list(settings.edge_addresses),
            closed_addresses=list(settings.closed_addresses),
            members=sorted(members),
        )

    # -- members -----------------------------------------------------------------------------------------------------

    async def list_hosts(self, principal: Principal) -> list[HostView]:
        """Also those that were lost or removed."""
        await self._access.operator(principal)
        everyone, placed = await self._context.db.read(
            lambda c: (hosts.list_all_nodes(c), machines.machines_by_node(c))
        )
        found: list[HostView] = []
        for node in everyone:
            info = self._nodes.answering(node.id) if node.status in hosts.MEMBERS else None
            found.append(
                HostView(
                    id=node.id,
                    region=node.region,
                    zone=node.zone,
                    address=node.address,
                    edge=node.edge,
                    status=_status(node),
                    reachable=info is not None,
                    version=info.version if info else "",
                    machines=placed.get(node.id, 0),
                    cpus=info.cpus if info else 0,
                    memory_mib=info.memory_mib if info else 0,
                    memory_mib_free=info.memory_mib_free if info else 0,
                    joined_at=rfc3339_ms(node.created_at_ms),
                    certificate_until=rfc3339_ms(node.certificate_until_ms),
                )
            )
        return found

    async def member(self, node_id: str) -> NodeRecord:
        """Raises Forbidden for whoever is none (any more)."""
        node = await self._context.db.read(lambda c: hosts.find_node(c, node_id))
        if node is None or node.status not in hosts.MEMBERS:
            raise Forbidden(f"{node_id} is no member of this cluster", hint="a host that was lost joins with a new id")
        return node

    async def renew(self, node: NodeRecord, csr_pem: str) -> Renewed:
        certificate_pem, until_ms = await anyio.to_thread.run_sync(self._authority.sign, csr_pem, node.id, node.address)
        await self._context.db.write(lambda c: hosts.update_node(c, node.id, certificate_until_ms=until_ms))
        log.info("host certificate renewed", node=node.id, until=rfc3339_ms(until_ms))
        return Renewed(
            certificate_pem=certificate_pem,
            authority_pem=self._authority.certificate_pem,
            user_jwt=self._user_jwt(node),
        )

    async def new_epoch(self, node: NodeRecord, above: int) -> Epoch:
        """Higher than any that this node had or says it used."""

        def step(connection: Connection) -> int:
            known = hosts.find_node(connection, node.id)
            assert known is not None
            epoch = max(known.epoch, above) + 1
            hosts.update_node(connection, node.id, epoch=epoch)
            return epoch

        return Epoch(epoch=await self._context.db.write(step))

    async def withdraw(
        self,
        node_id: str,
        status: Literal["lost", "removed"],
        *,
        actor: str,
        check: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        """It is no member from now on, for ever; readers drop what it said. In the same transaction its machines get
        new generations and, without volumes, look for another host; when it was an edge the edge key changes. The
        caller has certificates issued again (`Certificates.ensure`). Safe to repeat; `check` may refuse."""
        stopped = await self._stopped_machines(node_id)
        awake = await self._awake_standbys()
        now_ms = self._context.now_ms()

        def leave(connection: Connection) -> bool:
            node = hosts.find_node(connection, node_id)
            if node is None:
                raise NotFound(f"there is no host {node_id}")
            if node.status not in hosts.MEMBERS:
                return False
            check(connection)
            hosts.update_node(connection, node_id, status=status)
            members = [other.id for other in hosts.list_nodes(connection)]
            placed = {placement.machine_id for placement in moves.list_placed_on(connection, node_id)}
            running = (placed - stopped) | awake
            taken = standbys.take_over(connection, node_id, members=members, running=running, now_ms=now_ms)
            moves.leave(connection, node_id, members=members, stopped=stopped | taken, now_ms=now_ms)
            self._audit(connection, actor, f"host.{status}", node_id, {})
            if node.edge:
                self._edge_keys.rotate(connection)
            return True

        if await self._context.db.write(leave):
            self._nodes.changed()
            log.info("host left", node=node_id, status=status)
        await self._publication.publish_members()

    async def _stopped_machines(self, node_id: str) -> set[str]:
        """Of its machines those that it showed as not running; what it never showed counts as running."""
        placed = await self._context.db.read(lambda c: moves.list_placed_on(c, node_id))
        rows = [self._nodes.machine(placement.machine_id) for placement in placed]
        return {row.id for row in rows if row is not None and row.node == node_id and row.state in NOT_RUNNING}

    async def _awake_standbys(self) -> set[str]:
        """Those that cannot take over, because they run already."""
        known = await self._context.db.read(standbys.list_standbys)
        rows = [self._nodes.machine(placement.machine_id) for placement, _ in known]
        return {row.id for row in rows if row is not None and row.state not in NOT_RUNNING}

    # -- footnotes ---------------------------------------------------------------------------------------------------

    def _user_jwt(self, node: NodeRecord) -> str:
        """As long-lived as the certificate: one renewal for both."""
        return self._bus.node_jwt(
            bus_key=node.bus_key, node=node.id, region=node.region, lives=NODE_LIVES + timedelta(hours=1)
        )

    def _audit(self, connection: Connection, actor: str, action: str, target: str, detail: dict[str, str]) -> None:
        self._context.audit(
            connection,
            actor=actor,
            org_id=None,
            action=action,
            target=target,
            detail=detail,
        )


def _check(request: JoinRequest, *, configured: tuple[str, ...], any_region: bool = False) -> None:
    """Everything that can be judged without the database. `any_region`: it may be left to the token. Raises
    InvalidRequest naming the field."""
    if request.region or not any_region:
        regions.check(request.region, configured=configured)
    if not _ZONE.fullmatch(request.zone):
        raise InvalidRequest("may have 32 letters, digits and dashes", field="zone")
    try:
        address = ipaddress.ip_address(request.address)
    except ValueError as error:
        raise InvalidRequest(f"{request.address!r} is not an IP address", field="address") from error
    if address.is_unspecified or address.is_multicast or address.is_loopback or address.is_link_local:
        raise InvalidRequest(f"other hosts cannot reach {request.address}", field="address")
    for field in ("verify_key", "sealing_key"):
        try:
            length = len(unb64(getattr(request, field)))
        except ValueError as error:
            raise InvalidRequest("is not base64", field=field) from error
        if length != 32:
            raise InvalidRequest(f"has {length} bytes, not 32", field=field)
    nkeys.check_public(request.bus_key, "user", field="bus_key")
    public_key_of(request.csr_pem)


def _check_unique(request: JoinRequest, others: list[NodeRecord]) -> None:
    for other in others:
        if request.address == other.address and other.status in hosts.MEMBERS:
            raise Conflict(
                f"address: {request.address} is that of {other.id}",
                hint="a host that is gone for good has to be declared lost first",
            )
        for field in ("verify_key", "sealing_key", "bus_key"):
            if getattr(request, field) == getattr(other, field):
                raise Conflict(f"{field}: {other.id} joined with it", hint="a host that joins anew makes new keys")


def _check_same(request: JoinRequest, known: NodeRecord) -> None:
    if known.status not in hosts.MEMBERS:
        raise Conflict(f"node: {known.id} was {known.status}", hint="ids are not used again; take another")
    for field in ("verify_key", "sealing_key", "bus_key", "region"):
        wanted = getattr(known, field)
        # Nodes of before hosts joined had no keys but this one; what they show first is kept.
        if wanted and getattr(request, field) != wanted:
            raise Conflict(f"{field}: {known.id} joined with another", hint="a host with new keys takes a new id")


def _free_id(region: str, everyone: list[NodeRecord]) -> str:
    """`<region>-<n>`, n one above any that was ever given."""
    if len(everyone) >= NODES_MAX:
        raise Conflict(f"this cluster has had {NODES_MAX} hosts, which is all it can")
    numbers = [node.id.removeprefix(f"{region}-") for node in everyone if node.id.startswith(f"{region}-")]
    return f"{region}-{max((int(number) for number in numbers if number.isdigit()), default=0) + 1}"


def _status(node: NodeRecord) -> Literal["active", "draining", "lost", "removed"]:
    return msgspec.convert(node.status, Literal["active", "draining", "lost", "removed"])


def _host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")
