"""What the proxy is told: the catalogue's rows, with the keys of certificates and tickets opened by the edge key.
Keys leave only by the feed.

The edge key changes when an edge leaves. Control then says the new one in this node's own row `edge/<node>`, sealed to
its sealing key, and certificates sealed to it; in whichever order they come, a certificate is told once it opens.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from pantala.catalogue import View
from pantala.errors import InvalidRequest
from pantala.kit.sealing import Opener, b64
from pantala.wire.feed import FeedRow

log = structlog.get_logger()

STREAM = "certs"
KEPT = ("edge/", "ssh/")
POLICIES = "policy/"
"""With these, of another stream, what agents keep to themselves."""


class EdgeCertificates:
    """`first`: the edge key that the host joined with; None where it has none (it is no edge, or hears of it later)."""

    def __init__(self, view: View, node_key: Opener, *, node: str, first: Opener | None = None) -> None:
        self._view = view
        self._node_key = node_key
        self._own = f"edge/{node}"
        self._first = first
        self._sealed = ""
        self._newest: Opener | None = None

    def for_proxy(self, rows: Sequence[FeedRow]) -> list[FeedRow]:
        """Keys that this host cannot open are left out: it is no edge, or the edge key has changed."""
        self._learn()
        out: list[FeedRow] = []
        for row in rows:
            if row.stream != STREAM:
                if not row.key.startswith(POLICIES):
                    out.append(row)
            elif not row.key.startswith(KEPT) and (opened := self._opened(row)) is not None:
                out.append(opened)
        return out

    def changed(self, rows: Sequence[FeedRow]) -> list[FeedRow]:
        """The same for rows that changed; with a new edge key all certificates are told again."""
        if any(row.stream == STREAM and row.key == self._own for row in rows):
            told = {row.key for row in rows if row.stream == STREAM}
            more = [row for row in self._view.all() if row.stream == STREAM and row.key not in told]
            rows = [*rows, *more]
        return self.for_proxy(rows)

    def _opened(self, row: FeedRow) -> FeedRow | None:
        if row.value is None:
            return row
        value = dict(row.value)
        sealed = str(value.pop("sealed_key", ""))
        for opener in (self._newest, self._first):
            try:
                if opener is not None:
                    opened = opener.open(sealed)
                    if row.key.startswith("ticket/"):
                        value["key"] = b64(opened)
                    else:
                        value["key_pem"] = opened.decode()
                    return FeedRow(stream=row.stream, key=row.key, value=value)
            except (InvalidRequest, UnicodeDecodeError):
                continue
        if self._newest is not None or self._first is not None:
            log.warning("key cannot be opened", key=row.key)
        return None

    def _learn(self) -> None:
        row = self._view.get(STREAM, self._own)
        sealed = str(row["sealed_key"]) if row is not None else ""
        if sealed == self._sealed:
            return
        self._sealed = sealed
        try:
            self._newest = Opener(self._node_key.open(sealed)) if sealed else None
        except (InvalidRequest, ValueError) as error:
            log.warning("edge key cannot be opened", key=self._own, error=str(error))
