"""Rows of the catalogue that hosts apply network policies by, made from SQL. Called by `publication.py`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pantala.domain import policies
from pantala.kit.rows import Row
from pantala.store.records import NetworkPolicyRecord
from pantala.wire.network_policies import PolicyRule, PolicySelector


class PolicyDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What the column `document` holds."""

    selector: PolicySelector
    rules: list[PolicyRule]


def read(record: NetworkPolicyRecord) -> PolicyDocument:
    return msgspec.json.decode(record.document, type=PolicyDocument)


def policy_rows(records: Iterable[NetworkPolicyRecord]) -> list[Row]:
    rows: list[Row] = []
    for record in records:
        document = read(record)
        for part, row in enumerate(policies.rows(record.app, document.selector, document.rules)):
            rows.append(Row("routes", f"policy/{record.app}/{record.id}/{part}", msgspec.to_builtins(row)))
    return rows
