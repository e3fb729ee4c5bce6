"""The control plane composed: every use case, and the tasks that run beside the API.

Made by `server/main.py` (and by tests, over a memory bus). `run` is the story: publish, certify the
platform's names and users', sweep, move, keep the lease.
"""

from __future__ import annotations

from pathlib import Path

import anyio
from anyio.abc import TaskStatus

from pantala.client.node import NodeClient
from pantala.control.access import Access
from pantala.control.accounts import Accounts
from pantala.control.addresses import Addresses
from pantala.control.apps import Apps
from pantala.control.audit import Audit
from pantala.control.builds import Builds
from pantala.control.bus_accounts import BusAccounts
from pantala.control.calls import Calls
from pantala.control.certificates import Authority, Certificates
from pantala.control.cluster_authority import ClusterAuthority
from pantala.control.context import Context, ControlSettings
from pantala.control.contexts import Bounds
from pantala.control.departures import Departures
from pantala.control.dns_lookup import DnsLookup, Lookup
from pantala.control.edge_keys import EdgeKeys
from pantala.control.escape import EscapeSuites
from pantala.control.hostnames import Hostnames
from pantala.control.hosts import Hosts
from pantala.control.idempotency import Idempotency
from pantala.control.images import Images
from pantala.control.issuance import Issuance
from pantala.control.keys import ClusterKey
from pantala.control.lease import PublisherLease
from pantala.control.logs import Logs
from pantala.control.machines import Machines
from pantala.control.moves import Moves
from pantala.control.name_records import NameRecords
from pantala.control.network_policies import NetworkPolicies
from pantala.control.nodes import Nodes
from pantala.control.operations import Operations
from pantala.control.org_machines import OrgMachines
from pantala.control.own_names import OwnNames
from pantala.control.placements import Placements
from pantala.control.platform import Platform
from pantala.control.ports import Builder, NothingSeen, Objects, Registry, Sightings
from pantala.control.projection import Projection
from pantala.control.publication import Publication
from pantala.control.registry_tokens import RegistryTokens
from pantala.control.releases import Releases
from pantala.control.replays import Replays
from pantala.control.secret_keys import SecretKeys
from pantala.control.secrets import Secrets
from pantala.control.ssh import Ssh
from pantala.control.ssh_authority import SshAuthority
from pantala.control.standbys import Standbys
from pantala.control.statics import Statics
from pantala.control.sweep import Sweep
from pantala.control.ticket_keys import TicketKeys
from pantala.control.token_checks import TokenChecks
from pantala.control.traces import Traces
from pantala.kit import ids
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock
from pantala.kit.rows import RowSink
from pantala.store.database import Database


def make_context(*, db: Database, bus: Bus, clock: Clock, key: ClusterKey, settings: ControlSettings) -> Context:
    return Context(db=db, nodes=NodeClient(bus, clock), clock=clock, key=key, settings=settings, boot=ids.ulid())


class Control:
    """`objects`: the operator's store, None where there is none. `control_key`: verify key of the rows that `sink`
    signs. `sightings`: the nodes as the catalogue shows them, None where no machine is placed. `lookup`: public DNS,
    None for the resolvers of the settings. `lease` is None where nothing is published for real (tests)."""

    def __init__(
        self,
        context: Context,
        *,
        sink: RowSink,
        registry: Registry,
        builder: Builder,
        objects: Objects | None = None,
        state_dir: Path,
        control_key: str,
        sightings: Sightings | None = None,
        lease: PublisherLease | None = None,
        bounds: Bounds | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        settings = context.settings
        self.context = context
        self.access = Access(context)
        self.idempotency = Idempotency(context)
        self.registry_tokens = RegistryTokens(state_dir / "registry", context.clock)
        self.authority = Authority(
            state_dir / "ca", context.clock, domains=(settings.app_domain, settings.platform_domain)
        )
        edge_keys = EdgeKeys(context)
        ssh_authority = SshAuthority(state_dir / "ssh-ca")
        self.publication = Publication(context, sink, edge_keys, ssh_authority)
        self.certificates = Certificates(context, self.authority, self.publication, edge_keys)
        self.ticket_keys = TicketKeys(context, self.publication, edge_keys)
        self.nodes = Nodes(context, sightings or NothingSeen())
        self.bus_accounts = BusAccounts(state_dir / "bus", context.clock)
        self.hosts = Hosts(
            context,
            self.access,
            self.nodes,
            self.publication,
            authority=ClusterAuthority(state_dir / "cluster-ca", context.clock),
            bus=self.bus_accounts,
            edge_keys=edge_keys,
            api_authority_pem=self.authority.certificate_path.read_text(),
            control_key=control_key,
        )
        self.audit = Audit(context, self.access)
        self.escapes = EscapeSuites(context, self.access)
        self.calls = Calls(context, self.hosts, self.idempotency)
        self.accounts = Accounts(context, self.access)
        self.replays = Replays(context, self.access, self.publication)
        self.addresses = Addresses(context, self.access, self.publication)
        self.network_policies = NetworkPolicies(context, self.access, self.publication)
        lookup = lookup or DnsLookup(settings.resolvers)
        records = NameRecords(context)
        signs = settings.sign_names and not settings.acme_directory
        own_names = OwnNames(state_dir / "names-ca", context.clock) if signs else None
        self.issuance = Issuance(context, self.publication, edge_keys, lookup, records, own_names=own_names)
        self.hostnames = Hostnames(
            context,
            access=self.access,
            publication=self.publication,
            edge_keys=edge_keys,
            lookup=lookup,
            records=records,
            poke=self.issuance.poke,
            sign=self.issuance.advance if signs else None,
        )
        self.images = Images(context, self.access, registry, self.registry_tokens)
        self.secrets = Secrets(context, self.access, self.nodes)
        self.secret_keys = SecretKeys(context, self.access)
        self.token_checks = TokenChecks(context, self.access)
        self.machines = Machines(context, self.access, self.nodes, self.images, self.secrets)
        self.projection = Projection(context, self.access, self.machines)
        self.statics = Statics(
            context, self.access, self.projection, objects, writers=settings.writers, folder=state_dir / "statics"
        )
        self.apps = Apps(context, self.access, self.publication, self.statics)
        self.operations = Operations(context, self.access, self.machines, self.projection)
        self.org_machines = OrgMachines(context, self.access, self.projection)
        self.placements = Placements(context, self.access, self.nodes)
        self.ssh = Ssh(context, self.access, self.machines, ssh_authority)
        self.releases = Releases(context, self.access)
        self.logs = Logs(context, self.access)
        self.traces = Traces(context, self.access)
        self.platform = Platform(self.nodes)
        self.builds = Builds(
            context, self.access, self.images, builder, folder=state_dir / "builds", bounds=bounds or Bounds()
        )
        self.moves = Moves(context, self.nodes, self.images, self.secrets)
        self.departures = Departures(
            context,
            self.access,
            hosts=self.hosts,
            nodes=self.nodes,
            moves=self.moves,
            publication=self.publication,
            certificates=self.certificates,
        )
        self.standbys = Standbys(
            context, hosts=self.hosts, nodes=self.nodes, moves=self.moves, certificates=self.certificates
        )
        self.sweep = Sweep(context, self.secrets)
        self._lease = lease

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Ready once the certificates are there: an edge without them could serve nobody."""
        await self.certificates.ensure()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.publication.run)
            tasks.start_soon(self.certificates.run)
            tasks.start_soon(self.issuance.run)
            tasks.start_soon(self.ticket_keys.run)
            tasks.start_soon(self.sweep.run)
            tasks.start_soon(self.moves.run)
            tasks.start_soon(self.standbys.run)
            if self._lease is not None:
                tasks.start_soon(self._lease.keep)
            task_status.started()
