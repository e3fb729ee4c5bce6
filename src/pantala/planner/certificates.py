"""Decisions about certificates of users' host names: is DNS right, which challenge, when to look again. Pure.

The reconciler (`control/issuance.py`) and `certs check` (`control/hostnames.py`) ask; both act on the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from pantala.domain.hostnames import base, is_wildcard
from pantala.wire.certificates import DnsRecords, DnsRequirements, Validation, ValidationError

Challenge = Literal["tls-alpn-01", "http-01", "dns-01"]

SECOND_MS, MINUTE_MS, HOUR_MS, DAY_MS = 1_000, 60_000, 3_600_000, 86_400_000
LOOK_NEW_MS = 15 * SECOND_MS
"""How often DNS is looked at for a name that was added within the hour."""
RETRY_FIRST_MS = 5 * MINUTE_MS
"""After a failed order, doubled with each: authorities bear five failed validations of a name in an hour."""
RETRY_MAX_MS = 6 * HOUR_MS
ON_DEMAND_MS = 12 * MINUTE_MS
"""A user who asks is not kept waiting longer than this: five in an hour."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """`owned`: public DNS shows that whoever has the name wants it here."""

    validation: Validation
    owned: bool
    errors: list[ValidationError]


def judge(hostname: str, wanted: DnsRequirements, seen: DnsRecords, *, ours: frozenset[str], at: str) -> Judged:
    """What public DNS says against what the name needs. `ours`: all addresses that lead to this app."""
    resolved = set(seen.resolved_addresses)
    strange = sorted(resolved - ours)
    leads_here = bool(resolved & ours)
    delegated = seen.acme_challenge_cname == wanted.acme_challenge.target
    texts = {part.strip() for text in seen.ownership_txt for part in text.split(";")}
    txt = bool(texts & {wanted.ownership.app_value, wanted.ownership.org_value})
    by_address = leads_here and not strange and not is_wildcard(hostname)
    errors: list[ValidationError] = []

    def complain(code: str, message: str, remediation: str) -> None:
        errors.append(ValidationError(code=code, message=message, remediation=remediation, timestamp=at))

    if is_wildcard(hostname) and not delegated:
        complain(*_delegation(hostname, wanted, seen))
    if not resolved:
        # Told even where a delegation gets the certificate: without it nobody arrives.
        complain("dns_missing", f"{hostname} has no address", _address_records(hostname, wanted, verb="add "))
    elif not is_wildcard(hostname) and not by_address and not delegated:
        if strange and leads_here:
            complain(
                "dns_foreign_address",
                f"{hostname} leads here, but also to {', '.join(strange)}",
                f"remove {_records(hostname, strange)}",
            )
        else:
            complain(
                "dns_elsewhere",
                f"{hostname} leads to {', '.join(strange)} and not here",
                f"replace the records of {hostname}: {_address_records(hostname, wanted)}",
            )
    return Judged(
        validation=Validation(
            dns_configured=delegated,
            alpn_configured=by_address,
            http_configured=by_address,
            ownership_txt_configured=txt,
        ),
        owned=leads_here or delegated or txt or wanted.cname in seen.cname,
        errors=errors,
    )


def _delegation(hostname: str, wanted: DnsRequirements, seen: DnsRecords) -> tuple[str, str, str]:
    name, target = wanted.acme_challenge.name, wanted.acme_challenge.target
    if seen.acme_challenge_cname:
        message = f"{name} is a CNAME to {seen.acme_challenge_cname}, not to {target}"
        return "acme_challenge_elsewhere", message, f"change the record: {name} CNAME {target}"
    message = f"{hostname} needs the record {name}, which is missing: wildcards are validated by DNS only"
    return "acme_challenge_missing", message, f"add {name} CNAME {target}"


def _address_records(hostname: str, wanted: DnsRequirements, *, verb: str = "") -> str:
    records = [f"{hostname} A {ip}" for ip in wanted.a] + [f"{hostname} AAAA {ip}" for ip in wanted.aaaa]
    target = f"{hostname} CNAME {wanted.cname}"
    if not records:
        return f"{verb}{target}"
    return f"{verb}{' and '.join(records)}; or, unless it is the top of its zone, {target}"


def _records(hostname: str, addresses: Sequence[str]) -> str:
    return " and ".join(f"{hostname} {'AAAA' if ':' in ip else 'A'} {ip}" for ip in addresses)


def challenges(hostname: str, validation: Validation) -> list[Challenge]:
    """Those that can succeed, the preferred one first."""
    usable: list[Challenge] = []
    if not is_wildcard(hostname) and validation.http_configured:
        usable.append("http-01")
    if not is_wildcard(hostname) and validation.alpn_configured:
        usable.append("tls-alpn-01")
    if validation.dns_configured:
        usable.append("dns-01")
    return usable


def choose(hostname: str, validation: Validation, *, failures: int) -> Challenge | None:
    """After a failure the next one has its turn."""
    usable = challenges(hostname, validation)
    return usable[failures % len(usable)] if usable else None


def renew_at_ms(*, issued_at_ms: int, not_after_ms: int) -> int:
    """At two thirds of its life."""
    return issued_at_ms + 2 * (not_after_ms - issued_at_ms) // 3


def look_again_ms(now_ms: int, *, since_ms: int) -> int:
    """When DNS is looked at again for a name that waits for its records since `since_ms`."""
    age_ms = now_ms - since_ms
    if age_ms < HOUR_MS:
        return now_ms + LOOK_NEW_MS
    return now_ms + (5 * MINUTE_MS if age_ms < DAY_MS else HOUR_MS)


def retry_at_ms(now_ms: int, *, failures: int) -> int:
    """After the `failures`-th failed order in a row (from 1)."""
    return now_ms + min(RETRY_FIRST_MS << min(failures - 1, 16), RETRY_MAX_MS)


def asked_at_ms(now_ms: int, *, failures: int, failed_at_ms: int, limited_until_ms: int) -> int:
    """When an order may begin for a user who asks now: at once, unless the last one has just failed."""
    after_failure_ms = failed_at_ms + ON_DEMAND_MS if failures else 0
    return max(now_ms, after_failure_ms, limited_until_ms)


def challenge_name(hostname: str) -> str:
    """Where an authority looks for the TXT record of a DNS-01 challenge."""
    return f"_acme-challenge.{base(hostname)}"
