"""Secret keys of apps: they encrypt and sign here and are never shown. Sealed to the cluster key from the moment they
arrive or are made; in the clear only while one is used. Owns the table secret_keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from sqlalchemy import Connection

from pantala.auth.grants import Action, Principal
from pantala.control.access import Access
from pantala.control.context import Context
from pantala.control.secrets import check_version
from pantala.errors import Conflict, InvalidRequest, NotFound
from pantala.kit import keyring
from pantala.kit.clock import rfc3339_ms
from pantala.kit.sealing import b64, unb64
from pantala.store import secrets
from pantala.store.records import AppRecord, SecretKeyRecord
from pantala.wire.api import SecretsVersion
from pantala.wire.secret_keys import (
    Bytes,
    Decrypted,
    DecryptRequest,
    Encrypted,
    EncryptRequest,
    ListSecretKeysResponse,
    SecretKeyInfo,
    SetSecretKeyRequest,
    SetSecretKeyResponse,
    Signed,
    SignRequest,
    VerifyRequest,
)

KEYS_MAX = 1000
"""Of one app: a bound, not a price."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class SecretKeys:
    def __init__(self, context: Context, access: Access) -> None:
        self._context = context
        self._access = access

    async def list_keys(
        self, principal: Principal, app_name: str, *, types: Collection[str], min_version: int
    ) -> ListSecretKeysResponse:
        app = await self._access.app(principal, app_name, Action.READ)
        check_version(app, min_version)
        found = await self._context.db.read(lambda c: secrets.list_keys(c, app.id))
        return ListSecretKeysResponse(
            secret_keys=[_info(record) for record in found if not types or record.type in types]
        )

    async def get(self, principal: Principal, app_name: str, name: str, *, min_version: int) -> SecretKeyInfo:
        app = await self._access.app(principal, app_name, Action.READ)
        check_version(app, min_version)
        return _info(await self._find(app, name))

    async def set_value(
        self, principal: Principal, app_name: str, name: str, request: SetSecretKeyRequest
    ) -> SetSecretKeyResponse:
        """A key that the caller brings; it replaces one of the same name."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        if request.value is None:
            raise InvalidRequest("is required; `generate` makes a key", field="value")
        key = keyring.checked(request.type, _bytes(request.value, "value"))
        return await self._keep(principal, app, action="secretkey.set", name=name, kind=request.type, key=key)

    async def generate(
        self, principal: Principal, app_name: str, name: str, request: SetSecretKeyRequest
    ) -> SetSecretKeyResponse:
        """A key that nobody has seen. One that is there is not replaced: what it encrypted would be lost."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        if request.value is not None:
            raise InvalidRequest("is not read here; leave it out", field="value")
        key = keyring.generate(request.type)
        return await self._keep(
            principal, app, action="secretkey.generate", name=name, kind=request.type, key=key, replace=False
        )

    async def delete(self, principal: Principal, app_name: str, name: str) -> SecretsVersion:
        app = await self._access.app(principal, app_name, Action.DEPLOY)

        def remove(connection: Connection) -> int:
            if not secrets.delete_key(connection, app.id, name):
                raise NotFound(f"secret key not found: {name}")
            self._context.audit_app(connection, principal, app, "secretkey.delete", name)
            return secrets.bump_version(connection, app.id)

        version = await self._context.db.write(remove)
        return SecretsVersion(version=version, Version=version)

    # -- use -----------------------------------------------------------------------------------------------------------

    async def encrypt(
        self, principal: Principal, app_name: str, name: str, request: EncryptRequest, *, min_version: int
    ) -> Encrypted:
        plaintext = _bytes(request.plaintext, "plaintext")
        associated = _bytes(request.associated_data or "", "associated_data")

        def use(kind: str, key: bytes) -> bytes:
            return keyring.encrypt(kind, key, plaintext, associated)

        return Encrypted(ciphertext=b64(await self._use(principal, app_name, name, use, min_version=min_version)))

    async def decrypt(
        self, principal: Principal, app_name: str, name: str, request: DecryptRequest, *, min_version: int
    ) -> Decrypted:
        ciphertext = _bytes(request.ciphertext, "ciphertext")
        associated = _bytes(request.associated_data or "", "associated_data")

        def use(kind: str, key: bytes) -> bytes:
            return keyring.decrypt(kind, key, ciphertext, associated)

        return Decrypted(plaintext=b64(await self._use(principal, app_name, name, use, min_version=min_version)))

    async def sign(
        self, principal: Principal, app_name: str, name: str, request: SignRequest, *, min_version: int
    ) -> Signed:
        text = _bytes(request.plaintext, "plaintext")

        def use(kind: str, key: bytes) -> bytes:
            return keyring.sign(kind, key, text)

        return Signed(signature=b64(await self._use(principal, app_name, name, use, min_version=min_version)))

    async def verify(
        self, principal: Principal, app_name: str, name: str, request: VerifyRequest, *, min_version: int
    ) -> None:
        """Raises InvalidRequest when the signature is not this key's."""
        text, signature = _bytes(request.plaintext, "plaintext"), _bytes(request.signature, "signature")

        def use(kind: str, key: bytes) -> bytes:
            if not keyring.verify(kind, key, text, signature):
                raise InvalidRequest(f"was not made of this text by the key {name}", field="signature")
            return b""

        await self._use(principal, app_name, name, use, min_version=min_version)

    async def _use(
        self, principal: Principal, app_name: str, name: str, use: Callable[[str, bytes], bytes], *, min_version: int
    ) -> bytes:
        """The only place where a kept key is in the clear."""
        app = await self._access.app(principal, app_name, Action.DEPLOY)
        check_version(app, min_version)
        record = await self._find(app, name)
        return use(record.type, self._context.key.open(record.sealed))

    # -- keeping -------------------------------------------------------------------------------------------------------

    async def _find(self, app: AppRecord, name: str) -> SecretKeyRecord:
        found = await self._context.db.read(lambda c: secrets.find_key(c, app.id, name))
        if found is None:
            raise NotFound(f"secret key not found: {name}")
        return found

    async def _keep(
        self,
        principal: Principal,
        app: AppRecord,
        *,
        action: str,
        name: str,
        kind: str,
        key: bytes,
        replace: bool = True,
    ) -> SetSecretKeyResponse:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "must be 1 to 128 letters, digits, _, - and ., not beginning with - or .", field="name"
            )
        now_ms = self._context.now_ms()
        record = SecretKeyRecord(
            name=name,
            type=kind,
            sealed=self._context.key.seal(key),
            public_key=b64(keyring.public_key(kind, key)),
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
        )

        def put(connection: Connection) -> tuple[SecretKeyRecord, int]:
            there = {known.name for known in secrets.list_keys(connection, app.id)}
            if name in there and not replace:
                raise Conflict(f"there is a secret key {name} already", hint="delete it first, or choose another name")
            if name not in there and len(there) >= KEYS_MAX:
                raise InvalidRequest(f"an app may have {KEYS_MAX} secret keys", field="name")
            secrets.put_key(connection, app.id, record)
            self._context.audit_app(connection, principal, app, action, name)
            kept = secrets.find_key(connection, app.id, name)
            assert kept is not None
            return kept, secrets.bump_version(connection, app.id)

        kept, version = await self._context.db.write(put)
        info = _info(kept)
        return SetSecretKeyResponse(
            name=info.name,
            type=info.type,
            created_at=info.created_at,
            updated_at=info.updated_at,
            public_key=info.public_key,
            version=version,
            Version=version,
        )


def _info(record: SecretKeyRecord) -> SecretKeyInfo:
    return SecretKeyInfo(
        name=record.name,
        type=record.type,
        public_key=record.public_key,
        created_at=rfc3339_ms(record.created_at_ms),
        updated_at=rfc3339_ms(record.updated_at_ms),
    )


def _bytes(value: Bytes, field: str) -> bytes:
    if isinstance(value, list):
        return bytes(value)
    try:
        return unb64(value)
    except ValueError as error:
        raise InvalidRequest("is not base64", field=field) from error
