"""How many requests are served at once. What comes on top is told so at once, with 429 and when to ask again, before
anything of it is done: what is accepted is answered in time, whatever is asked besides.

Outside the routes (`app.py`), because finding a route and a caller is most of what a refusal would cost. Requests that
wait for something to happen (`wait`, `exec`, lines as they come, uploads) have a bound of their own: they are slow by
nature and cost little while they wait.
"""

from __future__ import annotations

import anyio
import msgspec
from litestar.types import ASGIApp, Receive, Scope, Send

from pantala.wire.api import ErrorBody

RETRY_AFTER_S = 1
READ_WITHIN_S, READ_BYTES_MAX = 1.0, 1024 * 1024
"""Of the body of a request that is refused: a client that still sends may not see the answer."""
_WAITS = ("/wait", "/exec", "/logs", "/builds")

_REFUSAL = msgspec.json.encode(
    ErrorBody(error="the platform is busy with other requests; nothing was done", status="rate_limited")
)


def bounded(app: ASGIApp, *, at_once: int, waits: int) -> ASGIApp:
    """`app`, with so many requests in it at a time, and so many that wait for something."""
    left = {False: at_once, True: waits}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        waits = scope["path"].endswith(_WAITS)
        if left[waits] <= 0:
            await _refuse(receive, send)
            return
        left[waits] -= 1
        try:
            await app(scope, receive, send)
        finally:
            left[waits] += 1

    return serve


async def _refuse(receive: Receive, send: Send) -> None:
    with anyio.move_on_after(READ_WITHIN_S):
        size, more = 0, True
        while more and size < READ_BYTES_MAX:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client is gone
            size, more = size + len(message["body"]), message["more_body"]
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_REFUSAL)).encode()),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSAL, "more_body": False})
