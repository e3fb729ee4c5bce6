"""Body of `/v1/traces/{id}`: what the proxies know of one request."""

from __future__ import annotations

import msgspec

from pantala.wire.feed import TraceRecord


class TracePart(msgspec.Struct, frozen=True, kw_only=True):
    """Of one host: its tries in order."""

    host: str
    region: str
    records: list[TraceRecord]


class UnheardHost(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    reason: str


class RequestTrace(msgspec.Struct, frozen=True, kw_only=True):
    """The edge first. `unheard`: hosts that did not answer, which may know more."""

    id: str
    parts: list[TracePart]
    unheard: list[UnheardHost]
