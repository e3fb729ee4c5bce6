"""`GET /api/v1/apps/{app}/logs`: an app's lines in the shape in which stock clients poll for them."""

from __future__ import annotations

import msgspec

from pantala.wire.api import LogLine


class _Whole(msgspec.Struct, frozen=True, kw_only=True):
    """Every field is sent, also an empty one: clients sort and print without looking."""


class LogEvent(_Whole, frozen=True, kw_only=True):
    provider: str


class LogMeta(_Whole, frozen=True, kw_only=True):
    instance: str
    region: str
    event: LogEvent


class LogAttributes(_Whole, frozen=True, kw_only=True):
    timestamp: str
    message: str
    level: str
    instance: str
    region: str
    meta: LogMeta


class LogEntry(_Whole, frozen=True, kw_only=True):
    id: str
    attributes: LogAttributes

    @classmethod
    def of(cls, line: LogLine) -> LogEntry:
        meta = LogMeta(instance=line.instance, region=line.region, event=LogEvent(provider=line.provider))
        attributes = LogAttributes(
            timestamp=line.timestamp,
            message=line.message,
            level=line.level,
            instance=line.instance,
            region=line.region,
            meta=meta,
        )
        return cls(id=f"{line.timestamp}-{line.instance}", attributes=attributes)


class PolledLogsMeta(_Whole, frozen=True, kw_only=True):
    next_token: str


class PolledLogs(_Whole, frozen=True, kw_only=True):
    """`data` is empty when nothing came after the token: a client that got lines asks again at once."""

    data: list[LogEntry]
    meta: PolledLogsMeta
