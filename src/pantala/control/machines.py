"""Machines: placed, created, updated, destroyed. Owns the table placements.

The road of a creation: choose a node (pure) → write the placement → ask the node → keep its answer. Whatever happens
in between, the sweep (`control/sweep.py`) brings a placement that nobody waits for to its end, so a lost answer never
leaves a machine that nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import anyio
import msgspec
import structlog
from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control import documents, regions
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.documents import Document
from pantala.control.images import Images, ResolvedImages
from pantala.control.nodes import Nodes
from pantala.control.secrets import Secrets
from pantala.domain import guests
from pantala.domain.validate import validate_config
from pantala.errors import CapacityError, DiskFull, InvalidRequest, NameTaken, NodeUnreachable, NotFound
from pantala.kit import ids
from pantala.planner.placement import Ask, Candidate
from pantala.store import machines, secrets
from pantala.store.records import AppRecord, PlacementRecord
from pantala.wire.api import LaunchMachineRequest
from pantala.wire.machine import Machine
from pantala.wire.node import AppRef, CreateMachine, DestroyMachine, GetMachine, SealedSecrets, UpdateMachine

log = structlog.get_logger()

NODES_TRIED_MAX = 5
CREATE_WITHIN_S, PATIENCE_S, PATIENCE_LEAST_S = 10.0, 5.0, 1.0
"""How long hosts are asked for a new machine altogether, and how long one message waits for its answer."""
ASKED_MAX, ASK_AGAIN_S = 3, 0.1
HOLDER_WITHIN_S = 5.0
LEASE_TTL_S_MAX = 3600
MACHINE_NOT_FOUND = "machine not found"
NO_ROOM = "could not reserve resource for machine"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class _Launch(NamedTuple):
    """A checked request to create or update, on its way to a node."""

    principal: Principal
    app: AppRecord
    request: LaunchMachineRequest
    config: Document
    images: ResolvedImages


class Machines:
    def __init__(self, context: Context, access: Access, nodes: Nodes, images: Images, secrets: Secrets) -> None:
        self._context = context
        self._access = access
        self._nodes = nodes
        self._images = images
        self._secrets = secrets

    async def create(
        self, principal: Principal, app_name: str, request: LaunchMachineRequest, config: Document
    ) -> Document:
        """A machine whose creation its node has journaled. `config` is the document as it was sent."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        _check(app, request)
        await self._watched_exist(app, request)
        here, default = await self._nodes.regions()
        wanted = regions.expand(request.region, here=here, default=default)
        if request.name:
            await self._free_name(app, request.name)
        images = await self._images.resolve_all(principal, request.config)
        launch = _Launch(principal, app, request, config, images)
        ask = await self._ask(app, request, wanted)
        by = self._context.clock.monotonic() + CREATE_WITHIN_S
        why: DiskFull | NodeUnreachable | None = None
        for attempt in range(1, NODES_TRIED_MAX + 1):
            try:
                node = await self._nodes.choose(ask)
            except CapacityError as error:
                if why is not None:
                    raise why from error
                raise
            try:
                with self._nodes.sent(node.id, _held(ask, request)):
                    return await self._create_on(node, ask, launch, by)
            except (CapacityError, NodeUnreachable, DiskFull) as error:
                log.info("node passed over", node=node.id, app=app.name, reason=error.message)
                why = why if isinstance(error, CapacityError) else error
                if attempt == NODES_TRIED_MAX or self._left_s(by) <= 0:
                    raise
                ask = msgspec.structs.replace(ask, refused=ask.refused | {node.id})
        raise AssertionError("the loop above returns or raises")

    async def update(
        self,
        principal: Principal,
        app_name: str,
        machine_id: str,
        request: LaunchMachineRequest,
        config: Document,
        *,
        nonce: str,
    ) -> Document:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        placement = await self.placement(app, machine_id)
        _check(app, request)
        await self._watched_exist(app, request)
        for field, given, kept in (
            ("name", request.name, placement.name),
            ("region", request.region, placement.region),
        ):
            if given and given != kept:
                raise InvalidRequest(f"is {kept} and cannot be changed", field=field)
        images = await self._images.resolve_all(principal, request.config)
        given = None if request.skip_secrets else await self._secrets.sealed_for(app.id, placement.node)
        call = UpdateMachine(
            request_id=f"update-{ids.ulid()}",
            machine_id=machine_id,
            config=request.config,
            image=images.main,
            pull_token=images.pull_token,
            other_images=images.others,
            secrets=given,
            min_secrets_version=request.min_secrets_version or 0,
            skip_launch=request.skip_launch,
            current_version=request.current_version,
            lease_ttl_s=request.lease_ttl or 0,
            owner=principal.email,
            nonce=nonce,
        )
        try:
            machine: Machine = await self._context.nodes.call(placement.node, call)
        except CapacityError as error:
            # flyctl replaces the machine elsewhere when it reads this text.
            told = error.message.startswith(NO_ROOM)
            raise CapacityError(
                error.message if told else f"{NO_ROOM}: {error.message}", excluded=error.excluded, hint=error.hint
            ) from error
        launch = _Launch(principal, app, request, config, images)
        return await self._keep(launch, "machine.update", machine, given)

    async def destroy(self, principal: Principal, app_name: str, machine_id: str, *, force: bool, nonce: str) -> None:
        """With `force` also when its host does not answer: the sweep then destroys it as soon as the host is back."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        placement = await self.placement(app, machine_id)
        if placement.tombstone and not force:
            raise NotFound(MACHINE_NOT_FOUND)
        after = "destroyed"
        call = DestroyMachine(request_id=f"destroy-{ids.ulid()}", machine_id=machine_id, force=force, nonce=nonce)
        try:
            await self._context.nodes.call(placement.node, call)
        except NodeUnreachable:
            if not force:
                raise
            after = "destroying"
        except NotFound:
            log.info("machine was gone already", app=app.name, machine=machine_id)
        now_ms = self._context.now_ms()

        def bury(connection: Connection) -> None:
            if machines.move_phase(connection, machine_id, before=("placed",), after=after, now_ms=now_ms):
                self._context.audit_app(connection, principal, app, "machine.destroy", machine_id)

        await self._context.db.write(bury)

    async def placement(self, app: AppRecord, machine_id: str) -> PlacementRecord:
        """Raises NotFound with the words that clients match."""
        found = await self._find(app, machine_id)
        if found is None:
            raise NotFound(MACHINE_NOT_FOUND)
        return found

    async def _find(self, app: AppRecord, machine_id: str) -> PlacementRecord | None:
        return await self._context.db.read(lambda c: machines.find_placement(c, app.id, machine_id))

    async def _ask(self, app: AppRecord, request: LaunchMachineRequest, wanted: Sequence[frozenset[str]]) -> Ask:
        size = guests.resolve(request.config)
        present = await self._context.db.read(lambda c: machines.count_by_node(c, app.id))
        return Ask(
            org=app.org_id,
            regions=wanted,
            cpus=size.cpus,
            shared_cpu=size.cpu_kind == "shared",
            memory_mib=size.memory_mb,
            shared_kernel=self._context.settings.shared_kernel,
            isolation=size.isolation,
            present=present,
        )

    async def _create_on(self, node: Candidate, ask: Ask, launch: _Launch, by: float) -> Document:
        app, request = launch.app, launch.request
        given = None if request.skip_secrets else await self._secrets.sealed_for(app.id, node.id)
        machine_id, name = await self._place(app, node, request.name, launch.config)
        call = CreateMachine(
            request_id=f"create-{machine_id}",
            machine_id=machine_id,
            generation=1,
            app=AppRef(id=str(app.id), name=app.name, org=app.org_slug, network=app.network_id),
            name=name,
            region=node.region,
            config=request.config,
            image=launch.images.main,
            pull_token=launch.images.pull_token,
            other_images=launch.images.others,
            secrets=given,
            min_secrets_version=request.min_secrets_version or 0,
            skip_launch=request.skip_launch or bool(request.config.standbys),
            cordoned=request.skip_service_registration,
            lease_ttl_s=request.lease_ttl or 0,
            owner=launch.principal.email,
        )
        answered = False
        try:
            machine = await self._ask_node(node.id, ask, call, by)
            document = await self._keep(launch, "machine.create", machine, given)
            answered = True
        finally:
            if not answered:
                # Refused, lost, or the app was deleted meanwhile: whatever the node may have, the sweep removes.
                with anyio.CancelScope(shield=True):
                    await self._give_up(machine_id)
        return document

    async def _ask_node(self, node_id: str, ask: Ask, call: CreateMachine, by: float) -> Machine:
        """A message expires when its answer is waited for no longer: a host that stood still does not begin then what
        another one was asked for meanwhile. Raises NodeUnreachable, early where another host might do it."""
        attempt = 0
        while True:
            attempt, patience_s = attempt + 1, max(min(PATIENCE_S, self._left_s(by)), PATIENCE_LEAST_S)
            sent = msgspec.structs.replace(call, expires_at_ms=self._nodes.clock_ms(node_id, in_s=patience_s))
            try:
                return await self._context.nodes.call(node_id, sent, timeout_s=patience_s, once=True)
            except NodeUnreachable as error:
                if attempt == ASKED_MAX or self._left_s(by) <= 0 or self._nodes.is_better_left(node_id, ask):
                    self._nodes.avoid(node_id)
                    raise NodeUnreachable(
                        f"{error.message}; nothing was created", retry_after_s=error.retry_after_s
                    ) from error
                await self._context.clock.sleep(ASK_AGAIN_S)

    def _left_s(self, by: float) -> float:
        return by - self._context.clock.monotonic()

    async def _give_up(self, machine_id: str) -> None:
        now_ms = self._context.now_ms()
        # Also from `destroyed`: a sweep may have asked the node before our call got there.
        before = ("placing", "placed", "destroying", "destroyed")
        await self._context.db.write(
            lambda c: machines.move_phase(c, machine_id, before=before, after="destroying", now_ms=now_ms)
        )

    async def _place(self, app: AppRecord, node: Candidate, name: str | None, config: Document) -> tuple[str, str]:
        """A new placement, written before the node is asked; its machine id and name."""
        machine_id, chosen = ids.machine_id(), name or ids.generated_name()
        now_ms = self._context.now_ms()
        await self._context.db.write(
            lambda c: machines.insert_placement(
                c,
                machine_id=machine_id,
                app_id=app.id,
                name=chosen,
                node=node.id,
                region=node.region,
                boot=self._context.boot,
                config=msgspec.json.encode(config).decode(),
                now_ms=now_ms,
            )
        )
        return machine_id, chosen

    async def _keep(self, launch: _Launch, action: str, machine: Machine, given: SealedSecrets | None) -> Document:
        """The node has journaled it: keep the answer beside the submitted config; what the caller is answered."""
        app = launch.app
        now_ms = self._context.now_ms()
        snapshot = msgspec.json.encode(msgspec.structs.replace(machine, nonce=None, lease=None)).decode()
        submitted = msgspec.json.encode(launch.config).decode()

        def write(connection: Connection) -> PlacementRecord | None:
            machines.keep_answer(connection, machine.id, snapshot=snapshot, config=submitted, now_ms=now_ms)
            machines.move_phase(connection, machine.id, before=("placing",), after="placed", now_ms=now_ms)
            if given is not None:
                placed = machines.find_placement(connection, app.id, machine.id)
                assert placed is not None
                secrets.record_delivery(connection, app_id=app.id, node=placed.node, version=given.version)
            self._context.audit_app(connection, launch.principal, app, action, machine.id)
            return machines.find_placement(connection, app.id, machine.id)

        kept = await self._context.db.write(write)
        if kept is None or kept.tombstone:
            raise NotFound(f"app not found: {app.name}")  # deleted meanwhile
        return documents.answer(machine, kept)

    async def _watched_exist(self, app: AppRecord, request: LaunchMachineRequest) -> None:
        for machine_id in request.config.standbys or []:
            watched = await self._context.db.read(
                lambda c, wanted=machine_id: machines.find_placement(c, app.id, wanted)
            )
            if watched is None or watched.tombstone:
                raise InvalidRequest(f"{machine_id} is no machine of {app.name}", field="config.standbys")

    async def _free_name(self, app: AppRecord, name: str) -> None:
        """Raises NameTaken, unless the machine of that name has destroyed itself and we did not know."""
        holder = await self._context.db.read(lambda c: machines.find_placement_by_name(c, app.id, name))
        if holder is None:
            return
        try:
            call = GetMachine(machine_id=holder.machine_id)
            machine: Machine = await self._context.nodes.call(holder.node, call, timeout_s=HOLDER_WITHIN_S)
            gone = machine.state == "destroyed"
        except NotFound:
            gone = holder.phase == "placed"
        if not gone:
            raise NameTaken(f"name: a machine of this app is called {name} already")
        await self.bury(holder.machine_id)

    async def bury(self, machine_id: str) -> None:
        """Its owner says that it is destroyed (auto_destroy, or a destroy whose answer was lost)."""
        now_ms = self._context.now_ms()
        await self._context.db.write(
            lambda c: machines.move_phase(c, machine_id, before=("placed",), after="destroyed", now_ms=now_ms)
        )


def _held(ask: Ask, request: LaunchMachineRequest) -> Ask:
    """What of its node is gone once it is there: one that is not launched holds no room until it is started."""
    return msgspec.structs.replace(ask, cpus=0, memory_mib=0) if request.skip_launch else ask


def _check(app: AppRecord, request: LaunchMachineRequest) -> None:
    validate_config(request.config)
    if request.name and not _NAME.fullmatch(request.name):
        raise InvalidRequest(f"{request.name!r} must be letters, digits and dashes, at most 63", field="name")
    if request.lease_ttl is not None and not 0 <= request.lease_ttl <= LEASE_TTL_S_MAX:
        raise InvalidRequest(f"must be 0 to {LEASE_TTL_S_MAX} seconds", field="lease_ttl")
    if (request.min_secrets_version or 0) > app.secrets_version:
        raise InvalidRequest(
            f"{request.min_secrets_version} is asked for, but the newest version is {app.secrets_version}",
            field="min_secrets_version",
        )
