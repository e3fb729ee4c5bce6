"""The parts that only this process joins: catalogue, registry client, builder; imported when needed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio

from pantala.control.ports import Builder, Objects, Registry, Sightings
from pantala.errors import NotOffered
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock
from pantala.kit.rows import RowSink
from pantala.kit.sealing import Signer, ensure_key
from pantala.kit.secret import Secret
from pantala.server.settings import signing_key_path
from pantala.wire.api import BuildEvent, BuildOptions
from pantala.wire.server import ServerSettings

OWNER = "control"
"""Whose rows control's are in the catalogue."""


class Parts(NamedTuple):
    sink: RowSink
    registry: Registry
    builder: Builder
    sightings: Sightings
    objects: Objects | None = None


class NoBuilder:
    """Where the operator has set no builder."""

    def build(
        self, *, app: str, context_dir: Path, options: BuildOptions, image: str, push_token: Secret
    ) -> AsyncIterator[BuildEvent]:
        raise NotOffered(f"no builder is set up here, so {image} cannot be built", hint="deploy a ready-made image")


@asynccontextmanager
async def compose(settings: ServerSettings, *, bus: Bus, clock: Clock, epoch: int) -> AsyncGenerator[Parts]:
    """The parts, for as long as the scope lasts; the publisher answers and beats, the replica reads, meanwhile.

    Nodes are believed by the member rows that this process publishes itself."""
    from pantala.buckets.store import BucketStore
    from pantala.catalogue import Publisher, Replica, Trust, View
    from pantala.catalogue.sightings import Sightings as CatalogueSightings
    from pantala.catalogue.store import CatalogueStore
    from pantala.images.registry import RegistryClient

    signer = Signer(ensure_key(signing_key_path(settings)))
    registry = RegistryClient(endpoints={settings.registry.name: settings.registry.url})
    builder: Builder = NoBuilder()
    if settings.builder:
        from pantala.builds.service import BuildkitBuilder

        builder = BuildkitBuilder(
            socket=Path(settings.builder),
            push_registry=settings.registry.backend,
            registry_name=settings.registry.name,
            folder=Path(settings.builder_folder) if settings.builder_folder else None,
            registry_folder=Path(settings.registry.folder) if settings.registry.folder else None,
        )
    objects = BucketStore(settings.buckets) if settings.buckets else None
    async with CatalogueStore.open(Path(settings.state_dir) / "catalogue.db") as store:
        view = View(control=OWNER)
        trust = Trust(view, {OWNER: signer.verify_key}, own=OWNER)
        publisher = Publisher(store, view, bus, signer, clock, owner=OWNER, epoch=epoch, holders=trust.others)
        replica = Replica(store, view, bus, clock, trust.key_of, own=OWNER, holders=trust.others)
        await publisher.open()
        await replica.open()
        sightings = CatalogueSightings(view, replica)
        async with anyio.create_task_group() as tasks:
            await tasks.start(publisher.run)
            await tasks.start(replica.run)
            tasks.start_soon(trust.follow, replica)
            try:
                yield Parts(sink=publisher, registry=registry, builder=builder, sightings=sightings, objects=objects)
            finally:
                tasks.cancel_scope.cancel()
    await registry.aclose()
