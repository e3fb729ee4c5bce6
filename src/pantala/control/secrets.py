"""Secrets of apps: write-only, sealed from the moment they arrive. Owns the tables secrets and secret_deliveries.

A value is in the clear only inside `set_values` (until it is sealed to the cluster key) and inside `_seal_for` (while
it is sealed anew to the key of a node that needs it).
"""

from __future__ import annotations

import re

import anyio
import msgspec
import structlog
from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.nodes import Nodes
from pantala.errors import Forbidden, InvalidRequest, NotFound, PantalaError
from pantala.kit import ids
from pantala.kit.clock import rfc3339_ms
from pantala.kit.sealing import seal
from pantala.store import apps, secrets
from pantala.store.records import AppRecord, SecretRecord
from pantala.wire.api import SecretInfo, SecretsResponse, SecretsVersion, SetSecretResponse
from pantala.wire.node import PutSecrets, SealedSecrets

log = structlog.get_logger()

NAME_LENGTH_MAX = 256
VALUE_BYTES_MAX = 64 * 1024
TOTAL_BYTES_MAX = 512 * 1024
DELIVERY_TIMEOUT_S = 5.0
DELIVERIES_AT_ONCE_MAX = 32
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Secrets:
    def __init__(self, context: Context, access: Access, nodes: Nodes) -> None:
        self._context = context
        self._access = access
        self._nodes = nodes

    async def list_secrets(
        self, principal: Principal, app_name: str, *, min_version: int = 0, show: bool = False
    ) -> SecretsResponse:
        app = await self._access.app(principal, app_name, Action.READ)
        check_version(app, min_version)
        _check_hidden(show)
        return await self._answer(app.id)

    async def get(
        self, principal: Principal, app_name: str, name: str, *, min_version: int = 0, show: bool = False
    ) -> SecretInfo:
        """Raises NotFound."""
        known = await self.list_secrets(principal, app_name, min_version=min_version, show=show)
        return _named(known, name)

    async def set_values(self, principal: Principal, app_name: str, values: dict[str, str | None]) -> SecretsResponse:
        """Set and (None) remove; a new version in any case. Nodes that hold machines of the app get them now or,
        if they do not answer, from the sweep."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        for name, value in values.items():
            _check(name, value)
        sealed = {
            name: None
            if value is None
            else (self._context.key.seal(value.encode()), self._context.key.digest(value.encode(), purpose="secret"))
            for name, value in values.items()
        }
        now_ms = self._context.now_ms()

        def put(connection: Connection) -> None:
            secrets.put_secrets(connection, app.id, sealed, now_ms=now_ms)
            if sum(len(record.sealed) for record in secrets.list_secrets(connection, app.id)) > TOTAL_BYTES_MAX:
                raise InvalidRequest(f"the secrets of one app may have {TOTAL_BYTES_MAX // 1024} KiB", field="values")
            self._context.audit(
                connection,
                actor=principal.email,
                org_id=app.org_id,
                action="secrets.set",
                target=app.name,
                detail={"names": sorted(values)},
            )

        await self._context.db.write(put)
        await self.deliver(app.id)
        return await self._answer(app.id)

    async def sealed_for(self, app_id: int, node: str) -> SealedSecrets | None:
        """All secrets of an app for one node; None while the app never had any."""
        app, records = await self._context.db.read(
            lambda c: (apps.get_app_by_id(c, app_id), secrets.list_secrets(c, app_id))
        )
        if app.secrets_version == 0:
            return None
        return await self._seal_for(app, records, node)

    async def record_delivery(self, app_id: int, node: str, given: SealedSecrets | None) -> None:
        if given is not None:
            await self._context.db.write(
                lambda c: secrets.record_delivery(c, app_id=app_id, node=node, version=given.version)
            )

    async def deliver(self, app_id: int | None = None) -> int:
        """Send newer secrets to every node that lacks them (of one app, or all); how many are still missing."""
        missing = await self._context.db.read(secrets.list_undelivered)
        wanted = [(app, node) for app, node in missing if app_id is None or app == app_id]
        limiter = anyio.CapacityLimiter(DELIVERIES_AT_ONCE_MAX)
        failed: list[str] = []

        async def send(app: int, node: str) -> None:
            async with limiter:
                try:
                    given = await self.sealed_for(app, node)
                    if given is not None:
                        call = PutSecrets(request_id=f"secrets-{ids.ulid()}", secrets=given)
                        await self._context.nodes.call(node, call, timeout_s=DELIVERY_TIMEOUT_S)
                    await self.record_delivery(app, node, given)
                except PantalaError as error:
                    log.warning("secrets not delivered", node=node, error=error.message)
                    failed.append(node)

        async with anyio.create_task_group() as tasks:
            for app, node in wanted:
                tasks.start_soon(send, app, node)
        return len(failed)

    async def _seal_for(self, app: AppRecord, records: list[SecretRecord], node: str) -> SealedSecrets:
        key = await self._nodes.sealing_key(node)
        opened = {record.name: self._context.key.open(record.sealed).decode() for record in records}
        return SealedSecrets(
            app=app.name, version=app.secrets_version, sealed=seal(key, msgspec.json.encode(opened, order="sorted"))
        )

    async def _answer(self, app_id: int) -> SecretsResponse:
        app, records = await self._context.db.read(
            lambda c: (apps.get_app_by_id(c, app_id), secrets.list_secrets(c, app_id))
        )
        version = app.secrets_version
        return SecretsResponse(secrets=[_info(record) for record in records], version=version, Version=version)

    async def set_one(self, principal: Principal, app_name: str, name: str, value: str) -> SetSecretResponse:
        done = await self.set_values(principal, app_name, {name: value})
        info = _named(done, name)
        return SetSecretResponse(**msgspec.structs.asdict(info), version=done.version, Version=done.version)

    async def remove(self, principal: Principal, app_name: str, name: str) -> SecretsVersion:
        """Raises NotFound."""
        _named(await self.list_secrets(principal, app_name), name)
        done = await self.set_values(principal, app_name, {name: None})
        return SecretsVersion(version=done.version, Version=done.version)


def check_version(app: AppRecord, wanted: int) -> None:
    """Reads here are never older than the last write, so what is asked for can only be too new."""
    if wanted > app.secrets_version:
        raise InvalidRequest(
            f"{wanted} is asked for, but the newest version is {app.secrets_version}", field="min_version"
        )


def _check_hidden(show: bool) -> None:
    if show:
        raise Forbidden(
            "show_secrets: values are written and never read back",
            hint="machines of the app have them; leave show_secrets out for names and digests",
        )


def _named(known: SecretsResponse, name: str) -> SecretInfo:
    for secret in known.secrets:
        if secret.name == name:
            return secret
    raise NotFound(f"secret not found: {name}")


def _info(record: SecretRecord) -> SecretInfo:
    return SecretInfo(
        name=record.name,
        digest=record.digest,
        created_at=rfc3339_ms(record.created_at_ms),
        updated_at=rfc3339_ms(record.updated_at_ms),
    )


def _check(name: str, value: str | None) -> None:
    """Messages never repeat a value."""
    if not _NAME.fullmatch(name) or len(name) > NAME_LENGTH_MAX:
        raise InvalidRequest("a secret's name is letters, digits and _, not beginning with a digit", field="values")
    if value is None:
        return
    if len(value.encode()) > VALUE_BYTES_MAX:
        raise InvalidRequest(f"is longer than {VALUE_BYTES_MAX // 1024} KiB", field=f"values.{name}")
    if "\0" in value:
        raise InvalidRequest("contains a NUL character, which no environment variable can", field=f"values.{name}")
