"""The audit log: who did what to what, from where, when, and how it ended. `GET /v1/audit` shows it in pages."""

from __future__ import annotations

from typing import Any

import msgspec


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`actor`: an e-mail address, or what acted by itself. `org`: slug; empty for acts on the platform. `target`: the
    app, `app/machine`, host or id. `origin`: address of the client; empty where nobody asked by the API. `outcome`: how
    it ended, `done` when nothing more is to say. `detail` never holds a secret's value."""

    id: int
    at: str
    actor: str
    org: str
    action: str
    target: str
    origin: str
    outcome: str
    request_id: str
    detail: dict[str, Any]


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first. `next_cursor`: where the next page begins; empty at the end."""

    entries: list[AuditEntry]
    next_cursor: str
