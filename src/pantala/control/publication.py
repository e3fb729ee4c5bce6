"""Control's rows in the catalogue: members, orgs, apps, names, certificates. Written from SQL, never by a request.

Every publication reads what is true *now* and puts that, so repeating it or losing one does no harm: whatever failed is
made good by the next `publish_all`, which also runs when the process starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
import structlog
from sqlalchemy import Connection

from pantala.control import edge_rows
from pantala.control.context import Context
from pantala.control.edge_keys import EdgeKeys
from pantala.control.policy_rows import policy_rows
from pantala.control.ssh_authority import SshAuthority
from pantala.errors import PantalaError
from pantala.kit.rows import Row, RowSink
from pantala.store import addresses, apps, certificates, hostnames, hosts, network_policies, replays
from pantala.store.records import AnswerRecord, AppRecord, NetworkPolicyRecord, NodeRecord, ReplayRulesRecord
from pantala.wire.catalogue import SshRow
from pantala.wire.feed import AddressRow, AppRow, HostRow, MemberRow, OrgRow

log = structlog.get_logger()

EVERY_S = 60.0
RETRY_S = 1.0


class Publication:
    def __init__(self, context: Context, sink: RowSink, edge_keys: EdgeKeys, ssh: SshAuthority) -> None:
        self._context = context
        self._ssh = ssh
        self._sink = sink
        self._edge_keys = edge_keys
        self._one_at_a_time = anyio.Lock()
        self._again = anyio.Event()
        self._certificates = edge_rows.CertificateRows()

    async def run(self) -> None:
        """Publish everything at start, then whenever something failed, and once a minute in any case."""
        while True:
            self._again = anyio.Event()
            try:
                await self.publish_all()
                wait_s = EVERY_S
            except PantalaError as error:
                log.warning("catalogue rows not published", error=error.message)
                wait_s = RETRY_S
            with anyio.move_on_after(wait_s):
                await self._again.wait()

    async def publish_all(self) -> None:
        async with self._one_at_a_time:
            await self._sink.replace_all(await self._context.db.read(self._all_rows))

    async def publish_app(self, name: str) -> None:
        """The rows of one app, or their deletion. Never fails the request: `run` makes up for it."""

        def rows(connection: Connection) -> list[Row]:
            app = apps.find_app(connection, name)
            if app is None:
                return self._gone(name)
            known = hostnames.list_hostnames(connection, app_id=app.id)
            return self._app_rows(app, [record.hostname for record in known])

        async with self._one_at_a_time:
            await self._put(await self._context.db.read(rows))

    async def publish_org(self, org_id: int) -> None:
        async with self._one_at_a_time:
            rules = await self._context.db.read(lambda c: replays.get_rules(c, org_id))
            value = org_row(rules)
            document = None if value == OrgRow() else msgspec.to_builtins(value)
            await self._put([Row("routes", f"org/{rules.org}", document)])

    async def publish_certificates(self) -> None:
        """All keys that edges have: those of the platform, and after a change of the edge key everybody's."""
        async with self._one_at_a_time:
            await self._put(await self._context.db.read(self._edge_rows))

    async def publish_hostname(self, hostname: str, *, gone: Sequence[AnswerRecord] = ()) -> None:
        """Route, certificates and answers of one name, or their deletion."""
        async with self._one_at_a_time:
            await self._put(await self._context.db.read(lambda c: edge_rows.hostname_rows(c, hostname, gone=gone)))

    async def publish_address(self, address: str) -> None:
        """One that belongs to a single app, or its deletion."""

        def rows(connection: Connection) -> list[Row]:
            found = addresses.find_address(connection, address)
            return [edge_rows.address_row(found) if found else Row("routes", f"addr/{address}", None)]

        async with self._one_at_a_time:
            await self._put(await self._context.db.read(rows))

    async def publish_policy(self, record: NetworkPolicyRecord, *, before: Sequence[Row]) -> None:
        """A network policy as it is now, if it still is; of the rows that it had before those that it has no more go
        with the same frame, so that no host ever applies half of it."""

        def rows(connection: Connection) -> list[Row]:
            found = network_policies.find_policy(connection, record.app_id, record.id)
            return policy_rows([found] if found is not None else [])

        async with self._one_at_a_time:
            now = await self._context.db.read(rows)
            kept = {row.key for row in now}
            await self._put([*now, *(row._replace(value=None) for row in before if row.key not in kept)])

    async def publish_tickets(self, *, gone: Sequence[int] = ()) -> None:
        """The session-ticket keys in use."""

        def rows(connection: Connection) -> list[Row]:
            return [edge_rows.ticket_row(record) for record in certificates.list_ticket_keys(connection)]

        async with self._one_at_a_time:
            ended = [Row("certs", f"ticket/{key_id}", None) for key_id in gone]
            await self._put([*await self._context.db.read(rows), *ended])

    async def publish_members(self) -> None:
        """Who belongs to the cluster now; whoever does not gets tombstones, and with them all that it said is void."""
        async with self._one_at_a_time:
            await self._put(await self._context.db.read(self._member_rows))

    async def _put(self, rows: Sequence[Row]) -> None:
        try:
            await self._sink.put(rows)
        except PantalaError as error:
            log.warning("catalogue rows not published", error=error.message)
            self._again.set()

    def _all_rows(self, connection: Connection) -> list[Row]:
        rows = [row for row in self._member_rows(connection) if row.value is not None]
        rows += self._platform_rows()
        rows.append(Row("certs", "ssh/authorities", msgspec.to_builtins(SshRow(authorities=self._ssh.public_keys))))
        rows += [_row(f"org/{rules.org}", org_row(rules)) for rules in replays.list_rules(connection)]
        known = hostnames.list_hostnames(connection)
        names: dict[int, list[str]] = {}
        for record in known:
            names.setdefault(record.app_id, []).append(record.hostname)
        for app in apps.list_apps(connection):
            rows += self._app_rows(app, names.get(app.id, []))
        rows += policy_rows(network_policies.list_policies(connection))
        return rows + edge_rows.all_rows(connection, self._certificates, known)

    def _edge_rows(self, connection: Connection) -> list[Row]:
        return edge_rows.all_rows(connection, self._certificates, hostnames.list_hostnames(connection))

    def _member_rows(self, connection: Connection) -> list[Row]:
        edge_key = hosts.find_edge_key(connection)
        rows: list[Row] = []
        for node in hosts.list_all_nodes(connection):
            member = node.status in hosts.MEMBERS
            rows.append(Row("nodes", f"member/{node.id}", _member(node) if member else None))
            key = self._edge_keys.row(edge_key, node) if member and node.edge and edge_key is not None else None
            rows.append(Row("certs", f"edge/{node.id}", msgspec.to_builtins(key) if key is not None else None))
        return rows

    def _platform_rows(self) -> list[Row]:
        settings = self._context.settings
        hosts = {
            f"api.{settings.platform_domain}": settings.api_backend,
            settings.registry.partition(":")[0]: settings.registry_backend,
        }
        rows = [_row(f"host/{name}", HostRow(backend=backend)) for name, backend in hosts.items() if backend]
        return rows + [_row(f"addr/{address}", AddressRow(kind="shared")) for address in settings.pools.shared_v4]

    def _app_rows(self, app: AppRecord, own_names: Sequence[str]) -> list[Row]:
        value = msgspec.to_builtins(HostRow(app=app.name))
        return [
            _row(f"app/{app.name}", AppRow(app=app.name, org=app.org_slug, network=app.network_id)),
            *(Row("routes", f"host/{name}", value) for name in (self.default_hostname(app.name), *own_names)),
        ]

    def _gone(self, name: str) -> list[Row]:
        keys = (f"app/{name}", f"host/{self.default_hostname(name)}")
        return [Row("routes", key, None) for key in keys]

    def default_hostname(self, app: str) -> str:
        return f"{app}.{self._context.settings.app_domain}"


def org_row(rules: ReplayRulesRecord) -> OrgRow:
    return OrgRow(replay_from=rules.sources, cross_network=rules.cross_network)


def _member(node: NodeRecord) -> dict[str, Any]:
    row = MemberRow(
        id=node.id,
        region=node.region,
        zone=node.zone,
        address=node.address,
        verify_key=node.verify_key,
        sealing_key=node.sealing_key,
        edge=node.edge,
        status="draining" if node.status == "draining" else "active",
    )
    return msgspec.to_builtins(row)


def _row(key: str, value: Any) -> Row:
    return Row("routes", key, msgspec.to_builtins(value))
