"""uvicorn inside our own task group: it serves, signals and shutdown are its caller's."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import anyio
import uvicorn
from anyio.abc import TaskStatus
from litestar.types import ASGIApp

GRACE_S = 10


class HttpServer(uvicorn.Server):
    """`address` is known once `run` has started. `stop` lets requests in flight end, for `GRACE_S` at most."""

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # pyright: ignore[reportArgumentType]  # Litestar's and uvicorn's ASGI types differ in name only
                host=host,
                port=port,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """uvicorn would raise the signal again after serving, and end the process before its tasks have ended."""
        yield

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return str(host), int(port)

    async def run_in(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell, task_status)
            await self.serve()
            tasks.cancel_scope.cancel()

    async def _tell(self, task_status: TaskStatus[None]) -> None:
        while not self.started:
            await anyio.sleep(0.01)
        task_status.started()

    def stop(self, *, now: bool = False) -> None:
        """`now` waits for no request."""
        self.should_exit = True
        self.force_exit = now
