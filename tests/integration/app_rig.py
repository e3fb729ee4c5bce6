"""An app that speaks for itself, byte by byte, behind both ports of a rig."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from mesh_rig import HOST
from proxy_rig import Rig, app_rows, machine_row, service_row

from pantala.testing.ports import free_port
from pantala.wire.machine import HTTPOptions, Port

IP = "127.0.5.3"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""One connection to the app."""


@contextlib.asynccontextmanager
async def app(rig: Rig, serve: Talk, options: HTTPOptions | None = None) -> AsyncGenerator[None]:
    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    port = free_port()
    async with await asyncio.start_server(converse, IP, port):
        ports = [
            Port(port=rig.ports.http, handlers=["http"], http_options=options),
            Port(port=rig.ports.https, handlers=["tls", "http"], http_options=options),
        ]
        service = service_row(rig.ports, "web", port, ports=ports)
        await rig.agent.rows(*app_rows("web", HOST), service, machine_row("web", "m1", IP))
        yield
