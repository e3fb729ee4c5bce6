"""Bodies of requests, bounded in time: a client that sends slowly, or stops, holds up nobody else and is told.

Used by `overload.py`: a body is taken in whole before the request gets its turn. Uploads are read by their route as
they come, and may be long, but not silent.
"""

from __future__ import annotations

import anyio
import msgspec
from litestar.types import HTTPReceiveMessage, HTTPScope, Message, Receive, Send, WebSocketReceiveMessage

from pantala.errors import RequestTimeout
from pantala.server.refusals import refuse
from pantala.wire.api import ErrorBody

WITHIN_S = 10.0
"""A whole body, as large as one may be: what a modem can send."""
SILENT_S = 30.0
"""Between two pieces of an upload."""
BYTES_MAX = 1024 * 1024
_TOO_SLOW = msgspec.json.encode(
    ErrorBody(error=f"the body of the request did not come within {WITHIN_S:g} s; nothing was done", status="timeout")
)


class Gone(Exception):
    """The client left before its body was whole."""


def has_one(scope: HTTPScope) -> bool:
    for name, value in scope["headers"]:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return True
    return False


async def whole(receive: Receive, *, within_s: float = WITHIN_S) -> bytes | None:
    """The body, or more than `BYTES_MAX` of it (which its reader refuses); None when it did not come in time. Raises
    Gone."""
    body = bytearray()
    with anyio.move_on_after(within_s):
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise Gone
            body += message["body"]
            if not message["more_body"] or len(body) > BYTES_MAX:
                return bytes(body)
    return None


def again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives what was taken in, then what comes after it: that the client is gone."""
    given = False

    async def replay() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def never_silent(receive: Receive, *, silent_s: float = SILENT_S) -> Receive:
    """For uploads: raises RequestTimeout when nothing comes for so long."""
    whole = False

    async def piece() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        nonlocal whole
        if whole:  # from now on it is waited for the client to leave
            return await receive()
        with anyio.move_on_after(silent_s):
            message = await receive()
            whole = message["type"] != "http.request" or not message["more_body"]
            return message
        raise RequestTimeout(f"nothing of the upload came for {silent_s:g} s")

    return piece


def closing(send: Send) -> Send:
    """For uploads: who is refused may have more to send, which nobody reads."""

    async def say(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
        await send(message)

    return say


async def refuse_slow(send: Send) -> None:
    await refuse(send, 408, _TOO_SLOW, [(b"connection", b"close")])
