"""The reconciler of users' certificates: for each name that is due it looks at DNS and carries one order to its end.

An order is a row before the authority hears of it and keeps the authority's URL, so that the next life of this process
goes on where this one ended. Owns the tables acme_orders, acme_answers and acme_accounts.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Connection

from pantala.control.account import AcmeAccount
from pantala.control.acme import Order, Refused, Task, load_key, signing_request
from pantala.control.answers import Answers
from pantala.control.context import Context
from pantala.control.custom_certificates import names_of, read_chain
from pantala.control.dns_lookup import Lookup
from pantala.control.edge_keys import EdgeKeys
from pantala.control.edge_rows import certificate_name
from pantala.control.name_records import NameRecords
from pantala.control.own_names import OwnNames
from pantala.control.publication import Publication
from pantala.control.registry_tokens import private_pem
from pantala.domain.hostnames import covers
from pantala.errors import InvalidRequest, PantalaError, TransientError
from pantala.kit.clock import rfc3339, unix_ms
from pantala.kit.sealing import seal
from pantala.planner import certificates as plan
from pantala.store import apps, certificates, hostnames
from pantala.store.records import CertificateRecord, HostnameRecord, OrderRecord
from pantala.wire.certificates import ValidationError

log = structlog.get_logger()

LOOK_S = 5.0
AT_ONCE_MAX = 8
ORDER_WITHIN_S = 180.0
"""Of one turn; an order that needs longer is taken up again."""
ORDER_LIVES_MS = plan.DAY_MS
AGAIN_MS = 30 * plan.SECOND_MS
SETTLE_S = 1.0
"""Until what was published is on every edge."""
POLLS_S = (0.5, 1.0, 2.0, 3.0, 5.0)
ORDERS_PER_HOUR_MAX = 100
PER_HOUR_MS = plan.HOUR_MS


class Issuance:
    """`own_names`: the authority where no directory is set; None: users bring their own certificates."""

    def __init__(
        self,
        context: Context,
        publication: Publication,
        edge_keys: EdgeKeys,
        lookup: Lookup,
        records: NameRecords,
        *,
        own_names: OwnNames | None = None,
    ) -> None:
        self._context = context
        self._own_names = own_names
        self._publication = publication
        self._edge_keys = edge_keys
        self._lookup = lookup
        self._records = records
        self._account = AcmeAccount(context)
        self._answers = Answers(context, publication, edge_keys, records)
        self._busy: set[str] = set()
        self._begun_ms: deque[int] = deque()
        self._poked = anyio.Event()

    def poke(self) -> None:
        """Something is due earlier than it was."""
        self._poked.set()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                self._poked = anyio.Event()
                try:
                    for record in await self._due():
                        self._busy.add(record.hostname)
                        tasks.start_soon(self._one, record.hostname)
                except PantalaError:
                    log.exception("names that are due could not be read")
                with anyio.move_on_after(LOOK_S):
                    await self._poked.wait()

    async def cycle(self) -> None:
        """Everything that is due now, one after the other."""
        for record in await self._due():
            await self._one(record.hostname)

    async def _due(self) -> list[HostnameRecord]:
        now_ms = self._context.now_ms()
        limit = AT_ONCE_MAX + len(self._busy)
        found = await self._context.db.read(lambda c: hostnames.list_due(c, now_ms=now_ms, limit=limit))
        return [record for record in found if record.hostname not in self._busy][: AT_ONCE_MAX - len(self._busy)]

    async def _one(self, hostname: str) -> None:
        try:
            outcome = await self.advance(hostname)
            log.info("name looked at", hostname=hostname, outcome=outcome)
        except PantalaError as error:
            log.warning("name not looked at", hostname=hostname, error=error.message)
            await self._look_again(hostname, self._context.now_ms() + AGAIN_MS)
        finally:
            self._busy.discard(hostname)

    # -- one name ----------------------------------------------------------------------------------------------------

    async def advance(self, hostname: str) -> str:
        """One turn of one name; what came of it, in a sentence."""
        record, order, served = await self._context.db.read(partial(_load, hostname=hostname))
        if record is None:
            return "gone"
        if order is not None and (not record.acme_requested or self._too_old(order)):
            await self._answers.take_down(hostname)
            order = None
        if order is not None:
            return await self._carry(record, order)
        now_ms = self._context.now_ms()
        renew_at_ms = _renew_at_ms(served)
        if not record.acme_requested or (renew_at_ms is not None and renew_at_ms > now_ms):
            return await self._look_only(record, renew_at_ms)
        if self._own_names is not None and not self._context.settings.acme_directory:
            return await self._sign(record, self._own_names)
        judged = await self._judge(record)
        if not self._context.settings.acme_directory:
            await self._wait_for_records(record, renew_at_ms)
            return "no authority is set up"
        if record.limited_until_ms > now_ms:
            await self._look_again(hostname, record.limited_until_ms)
            return "the authority wants us to wait"
        challenge = plan.choose(hostname, judged.validation, failures=record.failures)
        if challenge is None:
            await self._wait_for_records(record, renew_at_ms)
            return f"waits for DNS: {judged.errors[0].message if judged.errors else 'no challenge can succeed'}"
        if not self._may_begin(now_ms):
            await self._look_again(hostname, now_ms + plan.MINUTE_MS)
            return f"{ORDERS_PER_HOUR_MAX} orders were begun within the hour"
        key = ec.generate_private_key(ec.SECP256R1())
        order = OrderRecord(
            hostname=hostname,
            directory=self._context.settings.acme_directory,
            challenge=challenge,
            url="",
            kept_key=self._context.key.seal(private_pem(key)),
            created_at_ms=now_ms,
        )
        await self._context.db.write(partial(certificates.insert_order, order=order))
        return await self._carry(record, order)

    async def _sign(self, record: HostnameRecord, authority: OwnNames) -> str:
        """Nobody else is asked, and DNS may say what it likes."""
        key = ec.generate_private_key(ec.SECP256R1())
        chain = await anyio.to_thread.run_sync(authority.issue, record.hostname, key.public_key())
        return await self._keep(record, private_pem(key), chain)

    async def _look_only(self, record: HostnameRecord, renew_at_ms: int | None) -> str:
        """A custom certificate waits until DNS shows whose the name is; all others until their renewal."""
        if not record.owned and self._own_names is not None:
            await self._update(record.hostname, owned=True)
            await self._publication.publish_hostname(record.hostname)
        elif not record.owned:
            judged = await self._judge(record)
            if not judged.owned:
                await self._wait_for_records(record, None)
                return "waits for a proof of ownership"
        await self._look_again(record.hostname, renew_at_ms if record.acme_requested and renew_at_ms else 0)
        return "nothing to do until renewal"

    async def _judge(self, record: HostnameRecord) -> plan.Judged:
        app = await self._context.db.read(lambda c: apps.get_app_by_id(c, record.app_id))
        wanted = await self._records.requirements(app, record.hostname)
        seen = await self._lookup.records(record.hostname)
        judged = plan.judge(
            record.hostname, wanted, seen, ours=await self._records.ours(app), at=rfc3339(self._context.clock.now())
        )
        owned = judged.owned or record.owned  # what was proved once stays until the name is removed
        errors = judged.errors or [error for error in _errors(record) if not error.code.startswith(("dns_", "acme_"))]
        await self._update(
            record.hostname,
            validation=msgspec.json.encode(judged.validation).decode(),
            owned=owned,
            errors=msgspec.json.encode(errors).decode(),
        )
        if owned != record.owned:
            await self._publication.publish_hostname(record.hostname)
        return msgspec.structs.replace(judged, owned=owned)

    # -- one order ---------------------------------------------------------------------------------------------------

    async def _carry(self, record: HostnameRecord, order: OrderRecord) -> str:
        try:
            with anyio.fail_after(ORDER_WITHIN_S):
                key_pem, chain_pem = await self._to_its_end(record, order)
            return await self._keep(record, key_pem, chain_pem)  # what is kept is published: no deadline in between
        except Refused as error:
            return await self._failed(record, error)
        except TimeoutError:
            await self._look_again(record.hostname, self._context.now_ms() + AGAIN_MS)
            return "the authority has not decided yet"

    async def _to_its_end(self, record: HostnameRecord, order: OrderRecord) -> tuple[bytes, str]:
        """Key and chain, both PEM."""
        authority = await self._account.client(order.directory)
        key_pem = self._context.key.open(order.kept_key)
        request = signing_request(load_key(key_pem), record.hostname)
        if not order.url:
            url = await authority.begin(request)
            await self._context.db.write(lambda c: certificates.set_order_url(c, record.hostname, url))
            order = msgspec.structs.replace(order, url=url)
        answered = finalized = False
        polls = 0
        while True:
            state = await authority.order(order.url)
            if state.status == "pending" and not answered:
                task = _task(state, order)
                await self._answers.put_up(record, order, task)
                await self._context.clock.sleep(SETTLE_S)
                await authority.answer(task)
                answered = True
            elif state.status == "ready" and not finalized:
                await authority.finalize(state, request)
                finalized = True
            elif state.status == "valid":
                return key_pem, await authority.download(state)
            elif state.status == "invalid":
                raise state.refusal or Refused("the authority gave no reason", code="invalid")
            else:
                await self._context.clock.sleep(POLLS_S[min(polls, len(POLLS_S) - 1)])
                polls += 1

    async def _keep(self, record: HostnameRecord, key_pem: bytes, chain_pem: str) -> str:
        """The certificate and the end of its order, in one step."""
        leaf = _leaf(chain_pem, record.hostname)
        edge_key = await self._edge_keys.public()
        kept = CertificateRecord(
            name=certificate_name("acme", record.hostname),
            names=msgspec.json.encode([record.hostname]).decode(),
            chain_pem=chain_pem,
            sealed_key=seal(edge_key, key_pem),
            sealed_to=edge_key,
            not_after_ms=unix_ms(leaf.not_valid_after_utc),
            issued_at_ms=unix_ms(leaf.not_valid_before_utc),
            hostname=record.hostname,
            source="acme",
            kept_key=self._context.key.seal(key_pem),
        )
        renew_at_ms = plan.renew_at_ms(issued_at_ms=kept.issued_at_ms, not_after_ms=kept.not_after_ms)
        now_ms = self._context.now_ms()

        def keep(connection: Connection) -> Any:
            gone = certificates.end_order(connection, record.hostname)
            values = {"failures": 0, "errors": "[]", "owned": True, "look_at_ms": renew_at_ms, "updated_at_ms": now_ms}
            if hostnames.update_hostname(connection, record.hostname, **values):
                certificates.put_certificate(connection, kept)
            return gone

        gone = await self._context.db.write(keep)
        await self._publication.publish_hostname(record.hostname, gone=gone)
        return f"certificate until {leaf.not_valid_after_utc:%Y-%m-%d}"

    async def _failed(self, record: HostnameRecord, error: Refused) -> str:
        now_ms = self._context.now_ms()
        await self._answers.take_down(record.hostname)
        limited_until_ms = unix_ms(error.again_at) if error.again_at else 0
        failures = record.failures if limited_until_ms else record.failures + 1
        said = ValidationError(
            code=error.code,
            message=error.message,
            remediation=REMEDIES.get(error.code, ""),
            timestamp=rfc3339(self._context.clock.now()),
        )
        await self._update(
            record.hostname,
            failures=failures,
            errors=msgspec.json.encode([said]).decode(),
            failed_at_ms=now_ms,
            limited_until_ms=limited_until_ms,
            look_at_ms=limited_until_ms or plan.retry_at_ms(now_ms, failures=failures),
            updated_at_ms=now_ms,
        )
        return f"refused ({error.code}): {error.message}"

    # -- small steps -------------------------------------------------------------------------------------------------

    def _too_old(self, order: OrderRecord) -> bool:
        """Also one at an authority that is not asked any more."""
        elsewhere = order.directory != self._context.settings.acme_directory
        return elsewhere or order.created_at_ms + ORDER_LIVES_MS < self._context.now_ms()

    def _may_begin(self, now_ms: int) -> bool:
        while self._begun_ms and self._begun_ms[0] <= now_ms - PER_HOUR_MS:
            self._begun_ms.popleft()
        if len(self._begun_ms) >= ORDERS_PER_HOUR_MAX:
            return False
        self._begun_ms.append(now_ms)
        return True

    async def _wait_for_records(self, record: HostnameRecord, renew_at_ms: int | None) -> None:
        """From when on it waits: since it was added, or since its certificate should have been renewed."""
        now_ms = self._context.now_ms()
        since_ms = renew_at_ms or max(record.created_at_ms, record.updated_at_ms)
        await self._look_again(record.hostname, plan.look_again_ms(now_ms, since_ms=since_ms))

    async def _look_again(self, hostname: str, at_ms: int) -> None:
        await self._update(hostname, look_at_ms=at_ms)

    async def _update(self, hostname: str, **values: Any) -> None:
        await self._context.db.write(lambda c: hostnames.update_hostname(c, hostname, **values))


_BINDING = "the operator binds the platform's account (acme_eab_kid and acme_eab_key_file of the server's settings)"
REMEDIES = {
    "externalAccountRequired": _BINDING,
    "binding": _BINDING,
    "connection": "the authority could not reach an edge by this name: look at its A and AAAA records and at firewalls",
    "dns": "the authority could not resolve the name: look at its records at the provider's own name servers",
    "unauthorized": "somebody else answered the authority: look at the name's A and AAAA records, all of them",
    "caa": "a CAA record of the domain does not allow this authority",
    "rateLimited": "nothing to do: the order is repeated when the authority allows it",
    "rejectedIdentifier": "this authority does not sign for the name; import a certificate of your own",
}


def _load(
    connection: Connection, hostname: str
) -> tuple[HostnameRecord | None, OrderRecord | None, CertificateRecord | None]:
    served = certificate_name("acme", hostname)
    kept = certificates.list_certificates(connection, hostname=hostname)
    return (
        hostnames.find_hostname(connection, hostname),
        certificates.find_order(connection, hostname),
        next((record for record in kept if record.name == served), None),
    )


def _renew_at_ms(served: CertificateRecord | None) -> int | None:
    if served is None:
        return None
    return plan.renew_at_ms(issued_at_ms=served.issued_at_ms, not_after_ms=served.not_after_ms)


def _task(state: Order, order: OrderRecord) -> Task:
    task = state.tasks.get(order.challenge)
    if task is None:
        offered = ", ".join(state.tasks) or "none"
        raise Refused(f"the authority does not offer {order.challenge}, but {offered}", code="challenge")
    return task


def _leaf(chain_pem: str, hostname: str) -> x509.Certificate:
    try:
        leaf = read_chain(chain_pem)[0]
    except InvalidRequest as error:
        raise TransientError("the certificate authority sent something else than certificates") from error
    if not covers(names_of(leaf), hostname):
        raise Refused(f"the authority signed for {', '.join(names_of(leaf))}", code="names")
    return leaf


def _errors(record: HostnameRecord) -> list[ValidationError]:
    return msgspec.json.decode(record.errors, type=list[ValidationError])
