"""The parts that only this process joins: catalogue publisher, registry client, builder; imported when needed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from pantala.control.ports import Builder, Registry
from pantala.errors import NotOffered
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock
from pantala.kit.rows import RowSink
from pantala.kit.sealing import Signer, ensure_key
from pantala.server.settings import signing_key_path
from pantala.wire.api import BuildEvent, BuildOptions
from pantala.wire.server import ServerSettings

OWNER = "control"
"""Whose rows control's are in the catalogue."""


class Parts(NamedTuple):
    sink: RowSink
    registry: Registry
    builder: Builder


class NoBuilder:
    """Where the operator has set no builder."""

    def build(self, *, app: str, context_dir: Path, options: BuildOptions, image: str) -> AsyncIterator[BuildEvent]:
        raise NotOffered(f"no builder is set up here, so {image} cannot be built", hint="deploy a ready-made image")


async def compose(settings: ServerSettings, *, bus: Bus, clock: Clock, epoch: int) -> Parts:
    from pantala.catalogue import Publisher  # pyright: ignore[reportMissingImports]
    from pantala.images.registry import RegistryClient  # pyright: ignore[reportMissingImports]

    signer = Signer(ensure_key(signing_key_path(settings)))
    sink: RowSink = Publisher(bus, OWNER, epoch=epoch, signer=signer, clock=clock)
    registry: Registry = RegistryClient(settings.registry.url, name=settings.registry.name)
    builder: Builder = NoBuilder()
    if settings.builder:
        from pantala.builds.service import BuildkitBuilder  # pyright: ignore[reportMissingImports]

        builder = BuildkitBuilder(settings.builder)
    return Parts(sink=sink, registry=registry, builder=builder)
