"""An endpoint as a value: what it takes and answers, and the function that carries it out.

`app.py` makes a Litestar route of each, `openapi.py` a description; so what is served and what is described is one
table. Query parameters are values too (`text`, `flag`, `whole`, `words`): the description says what they may be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import msgspec
from litestar import Request

from pantala.auth.grants import Principal
from pantala.control.service import Control
from pantala.domain.durations import seconds
from pantala.errors import InvalidRequest, NotOffered
from pantala.server import bodies

Rate = Literal["action", "machine_read", "app_deletion"]
BYTES = "application/octet-stream"
_TRUE, _FALSE = ("true", "1", "t", "yes"), ("false", "0", "f", "no", "")


class Stream(msgspec.Struct, frozen=True):
    """An answer that is sent as it comes; each item is one line of JSON."""

    items: AsyncIterator[Any]


class Raw(msgspec.Struct, frozen=True):
    """An answer of bytes as they are."""

    body: bytes


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

    @property
    def wants_bytes(self) -> bool:
        """The client takes bytes and does not ask for a document."""
        accepted = {
            kind.partition(";")[0].strip().lower() for kind in self.request.headers.get("accept", "").split(",")
        }
        return BYTES in accepted and not accepted & {"application/json", "*/*"}

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

    def seconds(self, name: str, *, default: float) -> float:
        """A bare number counts seconds (the original's `timeout`); a Go duration says its unit."""
        value = self.query(name)
        if value is not None and value.isdigit() and len(value) <= 19:
            return float(value)
        return seconds(value, field=name, default=default)

    def words(self, name: str) -> list[str]:
        """Values given several times or separated by commas."""
        return [word.strip() for value in self.queries(name) for word in value.split(",") if word.strip()]


class Param(msgspec.Struct, frozen=True, kw_only=True):
    """A query parameter; `schema` is JSON Schema. `repeats`: given several times or as one list with commas."""

    name: str
    schema: dict[str, Any]
    summary: str = ""
    required: bool = False
    repeats: bool = False


def text(name: str, summary: str = "", *, required: bool = False) -> Param:
    return Param(name=name, schema={"type": "string"}, summary=summary, required=required)


def choice(name: str, *allowed: str, summary: str = "") -> Param:
    return Param(name=name, schema={"type": "string", "enum": list(allowed)}, summary=summary)


def flag(name: str, summary: str = "") -> Param:
    return Param(name=name, schema={"type": "boolean"}, summary=summary)


def whole(name: str, summary: str = "", *, low: int = 0, high: int | None = None, default: int | None = None) -> Param:
    schema: dict[str, Any] = {"type": "integer", "minimum": low}
    schema |= {} if high is None else {"maximum": high}
    schema |= {} if default is None else {"default": default}
    return Param(name=name, schema=schema, summary=summary)


def words(name: str, summary: str = "", *, allowed: tuple[str, ...] = ()) -> Param:
    item: dict[str, Any] = {"type": "string"} | ({"enum": list(allowed)} if allowed else {})
    return Param(name=name, schema={"type": "array", "items": item}, summary=summary, repeats=True)


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """`body` None: none is read. `answer` None: `{"ok": true}`, or nothing with 204. `optional_body`: may be missing.
    `streams`: the answer is lines of JSON of that type; `bytes_too`: it is bytes for who asks for those; `upload`:
    the route reads the body itself, whose type is `upload_type`. `codes`: refusals besides those that follow from
    the rest. `rate`: which of the limits counts. `later`: not offered yet, and why; it answers 501 to whoever may
    ask."""

    method: str
    path: str
    run: Callable[[Call], Awaitable[Any]]
    summary: str
    tag: str
    body: Any = None
    answer: Any = None
    status: int = 200
    query: tuple[Param, ...] = ()
    codes: tuple[int, ...] = ()
    rate: Rate = "action"
    public: bool = False
    optional_body: bool = False
    streams: bool = False
    bytes_too: bool = False
    upload: bool = False
    upload_type: str = "application/gzip"
    body_bytes_max: int = bodies.BYTES_MAX
    later: str = ""


def not_offered(method: str, path: str, *, tag: str, summary: str, later: str) -> Endpoint:
    """An operation of the original that this version refuses in words. `later` says why, and what does it instead."""

    async def refuse(call: Call) -> None:
        del call
        raise NotOffered(later)

    return Endpoint(method=method, path=path, run=refuse, summary=summary, tag=tag, later=later)


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
