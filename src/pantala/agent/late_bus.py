"""The bus for an agent that must start without it: subscriptions wait until it is there, messages are refused
meanwhile, as they are whenever it is away. Machines and proxy need none of it.
"""

from __future__ import annotations

import anyio
import structlog

from pantala.errors import NodeUnreachable
from pantala.kit.bus import Bus, Handler
from pantala.wire.server import BusSettings

log = structlog.get_logger()

CONNECT_WAIT_S = 3600.0


class LateBus:
    def __init__(self) -> None:
        self._bus: Bus | None = None
        self._wanted: list[tuple[str, Handler]] = []
        self.connected = anyio.Event()

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._get().publish(subject, payload)

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        return await self._get().request(subject, payload, timeout_s=timeout_s)

    async def serve(self, subject: str, handler: Handler) -> None:
        self._wanted.append((subject, handler))
        if self._bus is not None:
            await self._bus.serve(subject, handler)

    async def use(self, bus: Bus) -> None:
        """The bus is there: subscribe to what was asked for until now."""
        for subject, handler in list(self._wanted):
            await bus.serve(subject, handler)
        self._bus = bus
        self.connected.set()

    async def run(self, settings: BusSettings, name: str) -> None:
        """Connect, however long it takes, and stay connected."""
        from pantala.kit import bus_nats

        while True:
            try:
                async with bus_nats.connect(
                    settings.url,
                    user=settings.user,
                    password=settings.password,
                    credentials=settings.credentials,
                    inbox=settings.inbox,
                    name=name,
                    wait_s=CONNECT_WAIT_S,
                    echo=False,
                ) as bus:
                    await self.use(bus)
                    await anyio.sleep_forever()
            except TimeoutError:
                log.warning("bus is not there; trying again", url=settings.url)

    def _get(self) -> Bus:
        if self._bus is None:
            raise NodeUnreachable("the bus is not connected yet")
        return self._bus
