"""A local socket that leads to a machine's SSH port, through the API's WebSocket (`wire/ssh.py`)."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import quote, urlsplit, urlunsplit

import anyio
import anyio.abc
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

from pantala import errors
from pantala.client.api import error_of
from pantala.kit.secret import Secret
from pantala.wire.ssh import CLOSE_ERROR

CONNECT_S = 20.0
BLOCK = 64 * 1024
MESSAGE_BYTES_MAX = 1024 * 1024


class Tunnel:
    """`local` is this side's socket; `refusal` why the API closed the connection, once it did."""

    def __init__(self, local: socket.socket) -> None:
        self.local = local
        self.refusal: errors.PantalaError | None = None


@asynccontextmanager
async def open_tunnel(base_url: str, token: Secret, *, app: str, machine: str) -> AsyncGenerator[Tunnel]:
    """Raises what the API refuses with; the tunnel's socket just ends when it is closed later."""
    url = _websocket_url(base_url, f"/v1/apps/{quote(app, safe='')}/machines/{quote(machine, safe='')}/ssh")
    headers = {"authorization": f"Bearer {token.reveal()}"}
    try:
        remote = await connect(
            url, additional_headers=headers, open_timeout=CONNECT_S, max_size=MESSAGE_BYTES_MAX, compression=None
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidMessage) as error:
        raise errors.TransientError(f"the API at {base_url} opens no way to the machine: {error}") from error
    ours, theirs = _pair()
    tunnel = Tunnel(ours)
    async with remote:
        near = await anyio.abc.SocketStream.from_socket(theirs)
        async with near, anyio.create_task_group() as tasks:
            tasks.start_soon(_to_local, remote, near, tunnel)
            tasks.start_soon(_to_remote, near, remote)
            try:
                yield tunnel
            finally:
                tasks.cancel_scope.cancel()
                ours.close()


async def _to_local(remote: ClientConnection, near: anyio.abc.SocketStream, tunnel: Tunnel) -> None:
    try:
        async for message in remote:
            await near.send(message if isinstance(message, bytes) else message.encode())
    except ConnectionClosed:
        pass
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return
    code, reason = remote.close_code or 1006, remote.close_reason or ""
    if code >= CLOSE_ERROR:
        tunnel.refusal = error_of(code - CLOSE_ERROR, reason.encode(), "")
    elif code != 1000:
        tunnel.refusal = errors.TransientError(f"the API closed the connection ({code}) {reason}".strip())
    await near.aclose()


async def _to_remote(near: anyio.abc.SocketStream, remote: ClientConnection) -> None:
    try:
        while True:
            await remote.send(await near.receive(BLOCK))
    except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, ConnectionClosed):
        await remote.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Of TCP, because SSH libraries want to know whom they speak to; nobody else can have got in between."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, peer = listener.accept()
    if peer != ours.getsockname():
        raise errors.TransientError("another program on this machine took the connection")
    return ours, theirs


def _websocket_url(base_url: str, path: str) -> str:
    parts = urlsplit(base_url)
    scheme = "wss" if parts.scheme == "https" else "ws"
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + path, "", ""))
