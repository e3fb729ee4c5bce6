"""Host names that users bring and the certificates for them. Owns the tables hostnames and, with `issuance.py`,
certificates.

A name belongs to the app that added it first, from then on the app answers to it. `issuance.py` orders certificates and
looks at DNS; here is what users ask.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import Literal, cast

import msgspec
from cryptography import x509
from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control import custom_certificates
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.dns_lookup import Lookup
from pantala.control.edge_keys import EdgeKeys
from pantala.control.edge_rows import certificate_name
from pantala.control.name_records import NameRecords
from pantala.control.publication import Publication
from pantala.domain.hostnames import base, is_under, is_wildcard, normalise, parent_wildcard
from pantala.errors import InvalidRequest, NameTaken, NotFound
from pantala.kit.clock import rfc3339, rfc3339_ms
from pantala.kit.sealing import seal
from pantala.planner import certificates as plan
from pantala.store import certificates, hostnames
from pantala.store.records import AppRecord, CertificateRecord, HostnameRecord
from pantala.wire.certificates import (
    AddCustomRequest,
    Certificate,
    CertificateDetail,
    CertificateList,
    CertificateSummary,
    DnsRecords,
    Issued,
    Status,
    Validation,
    ValidationError,
)

LIMIT, LIMIT_MAX = 25, 500
NAMES_MAX = 50_000
"""Of one app: a bound, not a price."""


class Hostnames:
    """`poke` wakes the reconciler. `sign` gives a name its certificate at once, where our own authority does it."""

    def __init__(
        self,
        context: Context,
        *,
        access: Access,
        publication: Publication,
        edge_keys: EdgeKeys,
        lookup: Lookup,
        records: NameRecords,
        poke: Callable[[], None],
        sign: Callable[[str], Awaitable[object]] | None = None,
    ) -> None:
        self._sign = sign
        self._context = context
        self._access = access
        self._publication = publication
        self._edge_keys = edge_keys
        self._lookup = lookup
        self._records = records
        self._poke = poke

    # -- adding ------------------------------------------------------------------------------------------------------

    async def add_acme(self, principal: Principal, app_name: str, hostname: str) -> CertificateDetail:
        """The app answers to the name from now on; a certificate follows as soon as DNS is right."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        name = normalise(hostname)
        now_ms = self._context.now_ms()

        def add(connection: Connection) -> None:
            known = self._claim(connection, app, name, now_ms=now_ms)
            if not known.acme_requested:
                hostnames.update_hostname(
                    connection, name, acme_requested=True, look_at_ms=now_ms, failures=0, updated_at_ms=now_ms
                )
                self._context.audit_app(connection, principal, app, "certificate.add", name)

        await self._context.db.write(add)
        await self._publication.publish_hostname(name)
        await self._go_on(name)
        return await self._detail(app, name)

    async def add_custom(self, principal: Principal, app_name: str, request: AddCustomRequest) -> CertificateDetail:
        """Served once public DNS shows that the name is the app's."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        name = normalise(request.hostname)
        checked = custom_certificates.check(
            name, fullchain=request.fullchain, private_key=request.private_key, now=self._context.clock.now()
        )
        edge_key = await self._edge_keys.public()
        now_ms = self._context.now_ms()
        record = CertificateRecord(
            name=certificate_name("custom", name),
            names=msgspec.json.encode([name]).decode(),
            chain_pem=checked.chain_pem,
            sealed_key=seal(edge_key, checked.key_pem),
            sealed_to=edge_key,
            not_after_ms=checked.not_after_ms,
            issued_at_ms=now_ms,
            hostname=name,
            source="custom",
            kept_key=self._context.key.seal(checked.key_pem),
        )

        def add(connection: Connection) -> None:
            self._claim(connection, app, name, now_ms=now_ms)
            certificates.put_certificate(connection, record)
            hostnames.update_hostname(connection, name, look_at_ms=now_ms, updated_at_ms=now_ms)
            self._context.audit_app(connection, principal, app, "certificate.add_custom", name)

        await self._context.db.write(add)
        await self._publication.publish_hostname(name)
        await self._go_on(name)
        return await self._detail(app, name)

    async def _go_on(self, name: str) -> None:
        if self._sign is not None:
            await self._sign(name)
        else:
            self._poke()

    def _claim(self, connection: Connection, app: AppRecord, name: str, *, now_ms: int) -> HostnameRecord:
        """The name is the app's; a new one unless somebody else has it. Raises NameTaken."""
        settings = self._context.settings
        if is_under(name, settings.app_domain) or is_under(name, settings.platform_domain):
            raise NameTaken(
                f"{name} is the platform's own; names under {settings.platform_domain} have certificates already",
                hint="add a name of a domain of yours",
            )
        known = hostnames.find_hostname(connection, name)
        if known is not None and known.app_id == app.id:
            return known
        if known is not None:
            whose = f"the app {known.app}" if known.org_id == app.org_id else "another app"
            raise NameTaken(f"{name} belongs to {whose}", hint="remove it there first")
        covering = [hostnames.find_hostname(connection, parent_wildcard(name))]
        if is_wildcard(name):
            covering = list(hostnames.list_under(connection, base(name)))
        if other := next((found for found in covering if found is not None and found.org_id != app.org_id), None):
            raise NameTaken(f"{name} overlaps with {other.hostname}, which belongs to another organization")
        if hostnames.page_hostnames(connection, app.id, containing="", after="", limit=1)[1] >= NAMES_MAX:
            raise InvalidRequest(f"an app may have {NAMES_MAX} names", field="hostname")
        hostnames.insert_hostname(connection, name, app_id=app.id, now_ms=now_ms)
        made = hostnames.find_hostname(connection, name)
        assert made is not None
        return made

    # -- looking -----------------------------------------------------------------------------------------------------

    async def list_names(
        self, principal: Principal, app_name: str, *, containing: str, cursor: str, limit: int
    ) -> CertificateList:
        app = await self._access.app(principal, app_name, Action.READ)
        if not 1 <= limit <= LIMIT_MAX:
            raise InvalidRequest(f"must be 1 to {LIMIT_MAX}", field="limit")
        after = _open_cursor(cursor)

        def load(connection: Connection) -> tuple[list[tuple[HostnameRecord, list[CertificateRecord]]], int]:
            page, total = hostnames.page_hostnames(connection, app.id, containing=containing, after=after, limit=limit)
            return [(one, certificates.list_certificates(connection, hostname=one.hostname)) for one in page], total

        found, total = await self._context.db.read(load)
        more = len(found) == limit and found[-1][0].hostname
        return CertificateList(
            certificates=[self._summary(record, kept) for record, kept in found],
            total_count=total,
            next_cursor=_cursor(more) if more else None,
        )

    async def show(self, principal: Principal, app_name: str, hostname: str) -> CertificateDetail:
        app = await self._access.app(principal, app_name, Action.READ)
        return await self._detail(app, normalise(hostname))

    async def check(self, principal: Principal, app_name: str, hostname: str) -> CertificateDetail:
        """Looks at DNS now; if that was what was missing, the order begins at once."""
        app = await self._access.app(principal, app_name, Action.READ)
        name = normalise(hostname)
        record = await self._get(app, name)
        wanted = await self._records.requirements(app, name)
        seen = await self._lookup.records(name)
        judged = plan.judge(name, wanted, seen, ours=await self._records.ours(app), at=self._now())
        now_ms = self._context.now_ms()
        begin = plan.asked_at_ms(
            now_ms,
            failures=record.failures,
            failed_at_ms=record.failed_at_ms,
            limited_until_ms=record.limited_until_ms,
        )
        usable = bool(plan.challenges(name, judged.validation)) or judged.owned
        soon = usable and record.look_at_ms > begin and not await self._settled(record)

        def keep(connection: Connection) -> None:
            values = {"validation": msgspec.json.encode(judged.validation).decode(), "owned": judged.owned}
            hostnames.update_hostname(connection, name, **values | ({"look_at_ms": begin} if soon else {}))

        await self._context.db.write(keep)
        if judged.owned != record.owned:
            await self._publication.publish_hostname(name)
        if soon:
            self._poke()
        return await self._detail(app, name, seen=seen, now_wrong=judged.errors)

    async def _settled(self, record: HostnameRecord) -> bool:
        """Has the certificate that was asked for."""
        name = certificate_name("acme", record.hostname)
        kept = await self._context.db.read(lambda c: certificates.list_certificates(c, hostname=record.hostname))
        return not record.acme_requested or any(one.name == name for one in kept)

    # -- removing ----------------------------------------------------------------------------------------------------

    async def delete(self, principal: Principal, app_name: str, hostname: str) -> None:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        name = normalise(hostname)
        await self._get(app, name)

        def remove(connection: Connection) -> None:
            hostnames.delete_hostname(connection, name)
            self._context.audit_app(connection, principal, app, "certificate.delete", name)

        gone = await self._context.db.read(lambda c: certificates.list_answers(c, hostname=name))
        await self._context.db.write(remove)
        await self._publication.publish_hostname(name, gone=gone)

    async def delete_acme(self, principal: Principal, app_name: str, hostname: str) -> CertificateDetail:
        """No more orders; the name stays with the app."""
        return await self._delete_one(principal, app_name, hostname, "acme")

    async def delete_custom(self, principal: Principal, app_name: str, hostname: str) -> CertificateDetail:
        detail = await self._delete_one(principal, app_name, hostname, "custom")
        if any(one.source == "fly" for one in detail.certificates):
            return detail
        warning = f"{detail.hostname} has no certificate now; browsers cannot reach it by HTTPS"
        return msgspec.structs.replace(detail, warning=warning)

    async def _delete_one(
        self, principal: Principal, app_name: str, hostname: str, source: Literal["acme", "custom"]
    ) -> CertificateDetail:
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        name = normalise(hostname)
        record = await self._get(app, name)
        now_ms = self._context.now_ms()

        def remove(connection: Connection) -> bool:
            there = certificates.delete_certificate(connection, certificate_name(source, name))
            if source == "acme":
                there = there or record.acme_requested
                hostnames.update_hostname(
                    connection, name, acme_requested=False, errors="[]", failures=0, updated_at_ms=now_ms
                )
            if there:
                self._context.audit_app(connection, principal, app, f"certificate.delete_{source}", name)
            return there

        if not await self._context.db.write(remove):
            raise NotFound(f"{name} has no {source} certificate")
        await self._publication.publish_hostname(name)
        self._poke()
        return await self._detail(app, name)

    # -- answers -----------------------------------------------------------------------------------------------------

    async def _get(self, app: AppRecord, name: str) -> HostnameRecord:
        record = await self._context.db.read(lambda c: hostnames.find_hostname(c, name))
        if record is None or record.app_id != app.id:
            raise NotFound(f"{app.name} has no certificate for {name}", hint=f"`pantala certs add {name}` adds it")
        return record

    async def _detail(
        self,
        app: AppRecord,
        name: str,
        *,
        seen: DnsRecords | None = None,
        now_wrong: list[ValidationError] | None = None,
    ) -> CertificateDetail:
        """`now_wrong`: what a look at DNS has just found, in place of what was kept of the last one."""
        record = await self._get(app, name)
        kept = await self._context.db.read(lambda c: certificates.list_certificates(c, hostname=name))
        shown = [one for one in kept if one.source in ("acme", "custom")]
        kept_errors = msgspec.json.decode(record.errors, type=list[ValidationError])
        errors = kept_errors
        if now_wrong is not None:
            errors = [*now_wrong, *(error for error in kept_errors if not error.code.startswith(("dns_", "acme_")))]
        if record.acme_requested and self._sign is None and not self._context.settings.acme_directory:
            errors = [*errors, _no_authority(self._now())]
        status = self._status(record, kept)
        return CertificateDetail(
            hostname=name,
            configured=_configured(record),
            acme_requested=record.acme_requested,
            status=status,
            dns_provider=_provider(seen),
            rate_limited_until=self._limited(record),
            certificates=[
                self._certificate(record, one) for one in sorted(shown, key=lambda one: one.source != "custom")
            ],
            validation=msgspec.json.decode(record.validation, type=Validation),
            dns_requirements=await self._records.requirements(app, name),
            validation_errors=errors if status != "active" or now_wrong else [],
            dns_records=msgspec.UNSET if seen is None else seen,
        )

    def _summary(self, record: HostnameRecord, kept: list[CertificateRecord]) -> CertificateSummary:
        validation = msgspec.json.decode(record.validation, type=Validation)
        sources = {one.source for one in kept}
        return CertificateSummary(
            hostname=record.hostname,
            status=self._status(record, kept),
            dns_provider="",
            configured=_configured(record),
            acme_requested=record.acme_requested,
            acme_dns_configured=validation.dns_configured,
            acme_alpn_configured=validation.alpn_configured,
            acme_http_configured=validation.http_configured,
            ownership_txt_configured=validation.ownership_txt_configured,
            has_custom_certificate="custom" in sources,
            has_fly_certificate="acme" in sources,
            created_at=rfc3339_ms(record.created_at_ms),
            updated_at=rfc3339_ms(record.updated_at_ms),
        )

    def _status(self, record: HostnameRecord, kept: list[CertificateRecord]) -> Status:
        valid = {one.source for one in kept if one.not_after_ms > self._context.now_ms()}
        if "acme" in valid or ("custom" in valid and record.owned):
            return "active"
        return "pending_ownership" if "custom" in valid else "pending_validation"

    def _certificate(self, record: HostnameRecord, kept: CertificateRecord) -> Certificate:
        leaf = x509.load_pem_x509_certificate(kept.chain_pem.encode())
        custom, ended = kept.source == "custom", kept.not_after_ms <= self._context.now_ms()
        status = "expired" if ended else "pending_ownership" if custom and not record.owned else "active"
        issuer, expires_at = custom_certificates.issuer_of(leaf), rfc3339_ms(kept.not_after_ms)
        kind = cast('Literal["ecdsa", "rsa"]', custom_certificates.kind_of(leaf))
        return Certificate(
            source="custom" if custom else "fly",
            status=status,
            created_at=rfc3339_ms(kept.issued_at_ms),
            expires_at=expires_at,
            issuer=issuer,
            issued=[Issued(type=kind, expires_at=expires_at, certificate_authority=issuer)],
        )

    def _limited(self, record: HostnameRecord) -> str | None:
        return rfc3339_ms(record.limited_until_ms) if record.limited_until_ms > self._context.now_ms() else None

    def _now(self) -> str:
        return rfc3339(self._context.clock.now())


def _configured(record: HostnameRecord) -> bool:
    validation = msgspec.json.decode(record.validation, type=Validation)
    return bool(plan.challenges(record.hostname, validation))


def _no_authority(at: str) -> ValidationError:
    return ValidationError(
        code="no_authority",
        message="this platform has no certificate authority for names of its users",
        remediation="the operator names one (acme_directory of the server's settings); or import one of your own",
        timestamp=at,
    )


def _provider(seen: DnsRecords | None) -> str:
    """The registrable part of the name server in charge, such as `cloudflare.com`."""
    return ".".join(seen.soa.split(".")[-2:]) if seen is not None and seen.soa else ""


def _cursor(hostname: str) -> str:
    return base64.urlsafe_b64encode(hostname.encode()).decode("ascii")


def _open_cursor(cursor: str) -> str:
    try:
        return base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except ValueError as error:
        raise InvalidRequest("is none that this list gave", field="cursor") from error
