"""For whom a request is: the control plane and the limits of the application that it came by.

Routes are made once a process (`app.py`), applications as many as are asked for; what is an application's own travels
in the scope of its requests.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from litestar.connection import ASGIConnection
from litestar.types import ASGIApp, Receive, Scope, Send

from pantala.control.service import Control
from pantala.server.limits import RateLimits

_KEY = "pantala.served"


class Served(NamedTuple):
    control: Control
    limits: RateLimits


def serving(app: ASGIApp, control: Control, limits: RateLimits) -> ASGIApp:
    mine = Served(control, limits)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        cast(dict[str, Any], scope)[_KEY] = mine
        await app(scope, receive, send)

    return call


def served(connection: ASGIConnection[Any, Any, Any, Any]) -> Served:
    return cast(dict[str, Served], connection.scope)[_KEY]
