"""An endpoint as a value: what it takes and answers, and the function that carries it out.

`app.py` makes a Litestar route of each, `openapi.py` a description; so what is served and what is described is one
table.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from litestar import Request

from pantala.auth.grants import Principal
from pantala.control.service import Control
from pantala.errors import InvalidRequest

_TRUE, _FALSE = ("true", "1", "t", "yes"), ("false", "0", "f", "no", "")


class Stream(msgspec.Struct, frozen=True):
    """An answer that is sent as it comes; each item is one line of JSON."""

    items: AsyncIterator[Any]


class Call:
    """One request as a route sees it: who asks, path and query, the typed body and the raw one."""

    def __init__(self, request: Request[Any, Any, Any], control: Control, principal: Principal | None) -> None:
        self.request = request
        self.control = control
        self._principal = principal
        self.raw = b""
        self.body: Any = None

    @property
    def principal(self) -> Principal:
        assert self._principal is not None, "this endpoint takes anybody"
        return self._principal

    @property
    def app(self) -> str:
        return self.path("app")

    @property
    def machine(self) -> str:
        return self.path("machine")

    @property
    def nonce(self) -> str:
        return self.request.headers.get("fly-machine-lease-nonce", "")

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])

    def query(self, name: str) -> str | None:
        """The first value; an empty one counts as none."""
        return next((value for value in self.queries(name) if value), None)

    def queries(self, name: str) -> list[str]:
        return [str(value) for value in self.request.query_params.getall(name, [])]

    def flag(self, name: str) -> bool:
        value = (self.query(name) or "").lower()
        if value not in _TRUE + _FALSE:
            raise InvalidRequest(f"{value!r} is neither true nor false", field=name)
        return value in _TRUE

    def number(self, name: str, *, default: int) -> int:
        value = self.query(name)
        if value is None:
            return default
        if not value.isdigit() or len(value) > 19:
            raise InvalidRequest(f"{value!r} is not a whole number", field=name)
        return int(value)

    def words(self, name: str) -> list[str]:
        """Values given several times or separated by commas."""
        return [word.strip() for value in self.queries(name) for word in value.split(",") if word.strip()]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`body` None: none is read. `answer` None: `{"ok": true}`, or nothing with 204. `optional_body`: may be missing.
    `streams`: the answer is lines of JSON of that type; `upload`: the route reads the body itself."""

    method: str
    path: str
    run: Callable[[Call], Awaitable[Any]]
    summary: str
    tag: str
    body: Any = None
    answer: Any = None
    status: int = 200
    query: tuple[str, ...] = ()
    public: bool = False
    optional_body: bool = False
    streams: bool = False
    upload: bool = False


def decode_body(raw: bytes, kind: Any, *, optional: bool) -> Any:
    """The typed body. Raises InvalidRequest whose field is the path of the value that is wrong."""
    if not raw.strip():
        if optional:
            return kind()
        raise InvalidRequest("a JSON body is required", field="body")
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"is not JSON: {error}", field="body") from error


def _invalid(text: str) -> InvalidRequest:
    """msgspec says `Expected `int`, got `str` - at `$.config.services[0].internal_port``."""
    what, _, where = text.partition(" - at `$")
    field = where.rstrip("`").lstrip(".")
    return InvalidRequest(what[:1].lower() + what[1:], field=field or "body")
