"""Bodies of `/v1/apps/{app}/certificates`, with the names of the original.

Source: networking reference, section 6; flyctl-protocol reference, section 4.10.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["pending_validation", "pending_ownership", "active"]


class _Whole(msgspec.Struct, frozen=True, kw_only=True):
    """Answers whose every field is always there."""


class AddAcmeRequest(msgspec.Struct, frozen=True, kw_only=True):
    hostname: str


class AddCustomRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`fullchain`: PEM, the certificate first; `private_key`: PEM, not encrypted."""

    hostname: str
    fullchain: str
    private_key: str

    def __repr__(self) -> str:
        return f"AddCustomRequest(hostname={self.hostname!r})"


class Issued(_Whole, frozen=True, kw_only=True):
    type: Literal["ecdsa", "rsa"]
    expires_at: str
    certificate_authority: str


class Certificate(_Whole, frozen=True, kw_only=True):
    """`fly` is what the platform had issued, whoever the authority is."""

    source: Literal["fly", "custom"]
    status: str
    created_at: str
    expires_at: str
    issuer: str
    issued: list[Issued]


class Validation(_Whole, frozen=True, kw_only=True):
    dns_configured: bool = False
    alpn_configured: bool = False
    http_configured: bool = False
    ownership_txt_configured: bool = False


class ChallengeName(_Whole, frozen=True, kw_only=True):
    """A CNAME record, from `name` to `target`."""

    name: str
    target: str


class Ownership(_Whole, frozen=True, kw_only=True):
    """A TXT record that proves who may use the name: either value."""

    name: str
    app_value: str
    org_value: str


class DnsRequirements(_Whole, frozen=True, kw_only=True):
    """`a`, `aaaa`: addresses of the app; `cname` instead of them where the name is no apex."""

    a: list[str]
    aaaa: list[str]
    cname: str
    acme_challenge: ChallengeName
    ownership: Ownership


class DnsRecords(_Whole, frozen=True, kw_only=True):
    """What public DNS said just now. `resolved_addresses`: those behind a CNAME too."""

    a: list[str] = []
    aaaa: list[str] = []
    cname: list[str] = []
    resolved_addresses: list[str] = []
    soa: str = ""
    acme_challenge_cname: str = ""
    ownership_txt: list[str] = []


class ValidationError(_Whole, frozen=True, kw_only=True):
    """`code` for programs, `message` what is wrong, `remediation` what to do about it."""

    code: str
    message: str
    remediation: str = ""
    timestamp: str = ""


class CertificateDetail(_Whole, frozen=True, kw_only=True):
    """`dns_records` only in the answer of a check, `warning` only where there is one."""

    hostname: str
    configured: bool
    acme_requested: bool
    status: Status
    dns_provider: str
    rate_limited_until: str | None
    certificates: list[Certificate]
    validation: Validation
    dns_requirements: DnsRequirements
    validation_errors: list[ValidationError]
    dns_records: DnsRecords | msgspec.UnsetType = msgspec.UNSET
    warning: str | msgspec.UnsetType = msgspec.UNSET


class CertificateSummary(_Whole, frozen=True, kw_only=True):
    hostname: str
    status: Status
    dns_provider: str
    configured: bool
    acme_requested: bool
    acme_dns_configured: bool
    acme_alpn_configured: bool
    acme_http_configured: bool
    ownership_txt_configured: bool
    has_custom_certificate: bool
    has_fly_certificate: bool
    created_at: str
    updated_at: str


class CertificateList(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    certificates: list[CertificateSummary]
    total_count: int
    next_cursor: str | None = None
