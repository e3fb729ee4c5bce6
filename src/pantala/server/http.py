"""uvicorn inside our own task group: it serves, signals and shutdown are its caller's."""

from __future__ import annotations

import socket
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import uvicorn
from litestar.types import ASGIApp

from pantala.errors import InvalidRequest
from pantala.server.connections import Bounds, Ended, made

GRACE_S = 10
TICK_S = 1.0
"""How old the `date` of an answer may be."""
LAST_BYTES_MS = 100
BACKLOG = 1024
WS_BYTES_MAX = 1024 * 1024


class HttpServer(uvicorn.Server):
    """Listens as soon as it is made; `run` answers. `stop` lets requests in flight end, for `GRACE_S` at most."""

    def __init__(self, app: ASGIApp, host: str, port: int, bounds: Bounds = Bounds()) -> None:  # noqa: B008  # frozen
        self.ended = Ended()
        super().__init__(
            uvicorn.Config(
                app,  # pyright: ignore[reportArgumentType]  # Litestar's and uvicorn's ASGI types differ in name only
                http=made(bounds, self.ended),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=WS_BYTES_MAX,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._listener = listen(host, port)
        self._stopping = anyio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn would raise the signal again after serving, and end the process before its tasks have ended."""
        yield

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    async def run_until_stopped(self) -> None:
        await self.serve(sockets=[self._listener])

    def stop(self, *, now: bool = False) -> None:
        """`now` waits for no request."""
        self.should_exit = True
        self.force_exit = now
        self._stopping.set()

    async def main_loop(self) -> None:
        """uvicorn's looks ten times a second whether it should end; this one is told."""
        while not await self.on_tick(0):
            with anyio.move_on_after(TICK_S):
                await self._stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:
            await super().shutdown(sockets)
            return
        for listener in [*self.servers, *(sockets or [])]:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        for _ in range(LAST_BYTES_MS):  # uvicorn always waits so long
            if not self.server_state.connections:
                return
            await anyio.sleep(0.001)


def listen(host: str, port: int) -> socket.socket:
    """Raises InvalidRequest when the address cannot be had (uvicorn itself would end the process)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by its number: asyncio turns Nagle's algorithm off only where it reads that, and with it on an answer
    # of two writes waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidRequest(f"cannot listen on {host}:{port}: {error.strerror}", field="listen") from error
    return listener
