"""`/v1/audit`."""

from __future__ import annotations

from typing import Any

from pantala.control.audit import LIMIT_MAX, AuditChoice
from pantala.server.endpoint import Call, Endpoint, text, whole
from pantala.wire.audit import AuditPage

LIMIT = 100


async def list_audit(call: Call) -> Any:
    choice = AuditChoice(
        app=call.query("app") or "",
        org=call.query("org_slug") or "",
        since_s=call.seconds("since", default=0.0),
        limit=call.number("limit", default=LIMIT),
        cursor=call.query("cursor") or "",
    )
    return await call.control.audit.page(call.principal, choice)


ENDPOINTS = [
    Endpoint(
        method="GET",
        path="/v1/audit",
        run=list_audit,
        answer=AuditPage,
        query=(
            text("app", "Only what was done to this app and its parts"),
            text("org_slug", "Only what was done in this org"),
            text("since", "How long ago at most: 1h, 30m, or seconds; all that is kept when left out"),
            whole("limit", "Entries in a page", low=1, high=LIMIT_MAX, default=LIMIT),
            text("cursor", "`next_cursor` of the page before"),
        ),
        tag="Orgs",
        summary="Who did what to what, newest first: members see their orgs', operators all",
    ),
]
