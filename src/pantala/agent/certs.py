"""What the proxy is told: the catalogue's rows, certificates opened with the edge key. Keys leave only by the feed."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from pantala.errors import InvalidRequest
from pantala.kit.sealing import Opener
from pantala.wire.feed import FeedRow

log = structlog.get_logger()


def for_proxy(rows: Sequence[FeedRow], edge: Opener | None) -> list[FeedRow]:
    """Certificates that this host cannot open are left out: it is no edge, or the key has changed."""
    out: list[FeedRow] = []
    for row in rows:
        if row.stream != "certs" or row.value is None:
            out.append(row)
            continue
        if edge is None:
            continue
        value = dict(row.value)
        try:
            value["key_pem"] = edge.open(str(value.pop("sealed_key", ""))).decode()
        except (InvalidRequest, UnicodeDecodeError) as error:
            log.warning("certificate cannot be opened", key=row.key, error=str(error))
            continue
        out.append(FeedRow(stream=row.stream, key=row.key, value=value))
    return out
