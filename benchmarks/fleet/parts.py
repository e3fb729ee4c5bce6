"""Parts of the fleet's processes that are in memory: the server's registry, the agent's driver, network and images."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio

from pantala.agent.settings import AgentSettings
from pantala.kit.bus import Bus
from pantala.kit.clock import Clock
from pantala.server import settings as read_settings
from pantala.server.compose import Parts, compose
from pantala.server.main import serve
from pantala.telemetry import configure
from pantala.testing.driver import ScriptedDriver
from pantala.testing.fake_registry import FakeRegistry
from pantala.testing.host import FakeImages, FakeNetwork
from pantala.wire.server import ServerSettings


class VmDriver(ScriptedDriver):
    """Isolated as where orgs share hosts."""

    isolation: Literal["vm", "container", "none"] = "vm"


_DRIVER = VmDriver()


def driver(settings: AgentSettings, clock: Clock) -> VmDriver:
    del settings, clock
    return _DRIVER


def network(settings: AgentSettings, clock: Clock) -> FakeNetwork:
    del settings, clock
    return FakeNetwork(_DRIVER)


def images(settings: AgentSettings, clock: Clock) -> FakeImages:
    del settings, clock
    return FakeImages()


@asynccontextmanager
async def _composed(settings: ServerSettings, *, bus: Bus, clock: Clock, epoch: int) -> AsyncGenerator[Parts]:
    async with compose(settings, bus=bus, clock=clock, epoch=epoch) as parts:
        yield parts._replace(registry=FakeRegistry())


def run_server(path: Path) -> None:
    configure(program="server")
    anyio.run(serve, read_settings.read(path), _composed, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    run_server(Path(sys.argv[1]))
