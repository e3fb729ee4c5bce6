"""The bus over core NATS. Reconnects for ever; what was published meanwhile is lost, as the protocols above expect."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import nats
import nats.errors
import structlog
from anyio.abc import TaskGroup
from nats.aio.client import Client
from nats.aio.msg import Msg

from pantala.errors import InternalError, InvalidRequest, NodeUnreachable
from pantala.kit.bus import HANDLERS_MAX, Handler
from pantala.kit.nkeys import read_credentials

log = structlog.get_logger()

PENDING_BYTES_MAX = 8 * 1024 * 1024
CLOSED_WITHIN_S = 2.0


class NatsBus:
    """Made by `connect`; lives as long as that scope."""

    def __init__(self, client: Client, tasks: TaskGroup) -> None:
        self._client = client
        self._tasks = tasks

    async def publish(self, subject: str, payload: bytes) -> None:
        try:
            await self._client.publish(subject, payload)
        except nats.errors.MaxPayloadError as error:
            raise InternalError(f"{len(payload)} bytes for {subject} are more than the bus carries") from error
        except (nats.errors.ConnectionClosedError, nats.errors.OutboundBufferLimitError) as error:
            raise NodeUnreachable(f"the bus took no message for {subject}") from error

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        try:
            reply = await self._client.request(subject, payload, timeout=timeout_s)
        except nats.errors.NoRespondersError as error:
            raise NodeUnreachable(f"nobody serves {subject}") from error
        except (TimeoutError, nats.errors.TimeoutError) as error:
            raise NodeUnreachable(f"no answer on {subject} within {timeout_s:g} s") from error
        except nats.errors.MaxPayloadError as error:
            raise InternalError(f"{len(payload)} bytes for {subject} are more than the bus carries") from error
        except (nats.errors.ConnectionClosedError, nats.errors.OutboundBufferLimitError) as error:
            raise NodeUnreachable("the bus is not connected") from error
        return reply.data

    async def serve(self, subject: str, handler: Handler) -> None:
        limiter = anyio.CapacityLimiter(HANDLERS_MAX)

        async def handle(message: Msg) -> None:
            async with limiter:
                try:
                    answer = await handler(message.subject, message.data)
                except Exception:
                    log.exception("bus handler failed", subject=message.subject)
                    return
                if answer is None or not message.reply:
                    return
                try:
                    await self._client.publish(message.reply, answer)
                except nats.errors.Error as error:  # who asked hears nothing, as when this process had ended
                    log.warning("answer not sent", subject=message.subject, size=len(answer), error=str(error))

        async def receive(message: Msg) -> None:
            self._tasks.start_soon(handle, message)

        await self._client.subscribe(subject, cb=receive, pending_bytes_limit=PENDING_BYTES_MAX)
        await self._client.flush()


@asynccontextmanager
async def connect(
    url: str,
    *,
    user: str = "",
    password: str = "",
    credentials: str = "",
    inbox: str = "",
    name: str = "",
    wait_s: float = 30.0,
    echo: bool = True,
) -> AsyncGenerator[NatsBus]:
    """A connected bus; waits up to `wait_s` for the server at first, reconnects for ever afterwards.

    `credentials`: a NATS credentials file instead of user and password, read again at each connection, so that a
    renewed one is used. `inbox`: answers are heard on `_INBOX.<inbox>.>` only. Without `echo` nothing comes back that
    was said over this connection itself: an owner does not read its own beats.
    """

    async def failed(error: Exception) -> None:
        log.warning("bus connection", error=str(error), name=name)

    def user_jwt() -> bytearray:
        return bytearray(read_credentials(Path(credentials))[0].encode())

    def signature(nonce: str) -> bytes:
        return base64.b64encode(read_credentials(Path(credentials))[1].sign(nonce.encode()))

    client = Client()
    with anyio.fail_after(wait_s):
        while True:
            try:
                await client.connect(
                    servers=[url],
                    user=user or None,
                    password=password or None,
                    user_jwt_cb=user_jwt if credentials else None,
                    signature_cb=signature if credentials else None,
                    inbox_prefix=f"_INBOX.{inbox}" if inbox else "_INBOX",
                    name=name,
                    no_echo=not echo,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                    ping_interval=5,
                    max_outstanding_pings=2,
                    allow_reconnect=True,
                    error_cb=failed,
                )
                break
            except (OSError, InvalidRequest, nats.errors.Error) as error:
                log.debug("bus not connected yet", error=str(error), name=name)
                await _end(client)
                await anyio.sleep(0.1)
                client = Client()
    try:
        async with anyio.create_task_group() as tasks:
            yield NatsBus(client, tasks)
            tasks.cancel_scope.cancel()
    finally:
        await _end(client)


async def _end(client: Client) -> None:
    """Closes it, and ends the tasks that it forgets when its connection breaks while it connects again."""
    with anyio.CancelScope(shield=True):
        # A connection that breaks at this moment has nothing more to say.
        with anyio.move_on_after(CLOSED_WITHIN_S), contextlib.suppress(OSError, nats.errors.Error):
            await client.close()
        with anyio.move_on_after(CLOSED_WITHIN_S):
            while left := [task for task in asyncio.all_tasks() if _works_for(task, client)]:
                for task in left:
                    task.cancel()
                await asyncio.wait(left)


def _works_for(task: asyncio.Task[Any], client: Client) -> bool:
    coroutine = task.get_coro()
    return inspect.iscoroutine(coroutine) and inspect.getcoroutinelocals(coroutine).get("self") is client
