"""How many requests are served at once. What comes on top is told so at once, with 429 and when to ask again, before
anything of it is done: what is accepted is answered in time, whatever is asked besides.

Outside the routes (`app.py`), because finding a route and a caller is most of what a refusal would cost. Requests that
wait for something to happen (`wait`, `exec`, lines as they come, uploads) have a bound of their own: they are slow by
nature and cost little while they wait. Bodies that are on their way have one too (`bodies.py`).
"""

from __future__ import annotations

import anyio
import msgspec
from litestar.types import ASGIApp, Receive, Scope, Send

from pantala.server import bodies
from pantala.server.refusals import refuse
from pantala.wire.api import ErrorBody

RETRY_AFTER_S = 1
READ_WITHIN_S, READ_BYTES_MAX = 1.0, 1024 * 1024
"""Of the body of a request that is refused: a client that still sends may not see the answer."""
BODIES_AT_ONCE_MAX = 128
"""Of `bodies.BYTES_MAX` each."""
_UPLOADS = ("/builds", "/files", "/statics")
_WAITS = ("/wait", "/exec", "/logs", *_UPLOADS)

_REFUSAL = msgspec.json.encode(
    ErrorBody(error="the platform is busy with other requests; nothing was done", status="rate_limited")
)


class _Room:
    """How many more there may be."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __enter__(self) -> None:
        self.left -= 1

    def __exit__(self, *_: object) -> None:
        self.left += 1


def bounded(
    app: ASGIApp,
    *,
    at_once: int,
    waits: int,
    bodies_at_once: int = BODIES_AT_ONCE_MAX,
    body_within_s: float = bodies.WITHIN_S,
    upload_silent_s: float = bodies.SILENT_S,
) -> ASGIApp:
    """`app`, with so many requests in it at a time, and so many that wait for something."""
    serving, waiting, arriving = _Room(at_once), _Room(waits), _Room(bodies_at_once)

    def room_for(path: str) -> _Room:
        return waiting if path.endswith(_WAITS) else serving

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        room = room_for(scope["path"])
        if scope["path"].endswith(_UPLOADS):
            receive, send = bodies.never_silent(receive, silent_s=upload_silent_s), bodies.closing(send)
        elif room.left > 0 and bodies.has_one(scope):
            if arriving.left <= 0:
                await _refuse(receive, send)
                return
            with arriving:
                body = await bodies.whole(receive, within_s=body_within_s)
            if body is None:
                await bodies.refuse_slow(send)
                return
            receive = bodies.again(body, receive)
        if room.left <= 0:
            await _refuse(receive, send)
            return
        with room:
            await app(scope, receive, send)

    async def serve_unless_gone(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await serve(scope, receive, send)
        except bodies.Gone:
            return  # nobody is there to be told

    return serve_unless_gone


async def _refuse(receive: Receive, send: Send) -> None:
    with anyio.move_on_after(READ_WITHIN_S):
        size, more = 0, True
        while more and size < READ_BYTES_MAX:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            size, more = size + len(message["body"]), message["more_body"]
    await refuse(send, 429, _REFUSAL, [(b"retry-after", str(RETRY_AFTER_S).encode())])
