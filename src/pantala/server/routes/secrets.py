"""`/v1/apps/{app}/secrets` and `/v1/apps/{app}/secretkeys`: what goes in there does not come out again."""

from __future__ import annotations

from typing import Any

from pantala.kit.keyring import TYPES
from pantala.server.endpoint import Call, Endpoint, flag, whole, words
from pantala.wire.api import (
    SecretInfo,
    SecretsResponse,
    SecretsVersion,
    SetSecretRequest,
    SetSecretResponse,
    SetSecretsRequest,
)
from pantala.wire.secret_keys import (
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


async def list_secrets(call: Call) -> Any:
    return await call.control.secrets.list_secrets(
        call.principal, call.app, min_version=_min_version(call), show=call.flag("show_secrets")
    )


async def get_secret(call: Call) -> Any:
    return await call.control.secrets.get(
        call.principal, call.app, call.path("name"), min_version=_min_version(call), show=call.flag("show_secrets")
    )


async def set_secrets(call: Call) -> Any:
    return await call.control.secrets.set_values(call.principal, call.app, call.body.values)


async def set_secret(call: Call) -> Any:
    return await call.control.secrets.set_one(call.principal, call.app, call.path("name"), call.body.value)


async def remove_secret(call: Call) -> Any:
    return await call.control.secrets.remove(call.principal, call.app, call.path("name"))


# -- secret keys -------------------------------------------------------------------------------------------------


async def list_keys(call: Call) -> Any:
    return await call.control.secret_keys.list_keys(
        call.principal, call.app, types=call.words("types"), min_version=_min_version(call)
    )


async def get_key(call: Call) -> Any:
    return await call.control.secret_keys.get(
        call.principal, call.app, call.path("name"), min_version=_min_version(call)
    )


async def set_key(call: Call) -> Any:
    return await call.control.secret_keys.set_value(call.principal, call.app, call.path("name"), call.body)


async def generate_key(call: Call) -> Any:
    return await call.control.secret_keys.generate(call.principal, call.app, call.path("name"), call.body)


async def delete_key(call: Call) -> Any:
    return await call.control.secret_keys.delete(call.principal, call.app, call.path("name"))


async def encrypt(call: Call) -> Any:
    return await call.control.secret_keys.encrypt(
        call.principal, call.app, call.path("name"), call.body, min_version=_min_version(call)
    )


async def decrypt(call: Call) -> Any:
    return await call.control.secret_keys.decrypt(
        call.principal, call.app, call.path("name"), call.body, min_version=_min_version(call)
    )


async def sign(call: Call) -> Any:
    return await call.control.secret_keys.sign(
        call.principal, call.app, call.path("name"), call.body, min_version=_min_version(call)
    )


async def verify(call: Call) -> None:
    await call.control.secret_keys.verify(
        call.principal, call.app, call.path("name"), call.body, min_version=_min_version(call)
    )


def _min_version(call: Call) -> int:
    """Two spellings, of which flyctl sends the older."""
    return max(call.number("min_version", default=0), call.number("version", default=0))


_APP = "/v1/apps/{app}"
_SECRET = f"{_APP}/secrets/{{name}}"
_KEY = f"{_APP}/secretkeys/{{name}}"
_MIN = whole("min_version", "A version that an earlier write answered; a newer one than there is is refused")
_READ = (_MIN, whole("version", "The same, as flyctl spells it"))
_SHOW = flag("show_secrets", "Refused: values are never read back")


def _secret(method: str, path: str, run: Any, summary: str, **more: Any) -> Endpoint:
    return Endpoint(method=method, path=path, run=run, summary=summary, tag="Secrets", **more)


def _key(method: str, path: str, run: Any, summary: str, **more: Any) -> Endpoint:
    return Endpoint(method=method, path=path, run=run, summary=summary, tag="Secret keys", **more)


ENDPOINTS = [
    _secret(
        "GET",
        f"{_APP}/secrets",
        list_secrets,
        "Names, digests and dates; never values",
        answer=SecretsResponse,
        query=(*_READ, _SHOW),
    ),
    _secret(
        "POST",
        f"{_APP}/secrets",
        set_secrets,
        "Set secrets; null removes",
        body=SetSecretsRequest,
        answer=SecretsResponse,
    ),
    _secret("GET", _SECRET, get_secret, "Name, digest and dates of one", answer=SecretInfo, query=(*_READ, _SHOW)),
    _secret("POST", _SECRET, set_secret, "Set one secret", body=SetSecretRequest, answer=SetSecretResponse, status=201),
    _secret("DELETE", _SECRET, remove_secret, "Remove one secret", answer=SecretsVersion),
    _key(
        "GET",
        f"{_APP}/secretkeys",
        list_keys,
        "Names, types and public halves",
        answer=ListSecretKeysResponse,
        query=(*_READ, words("types", "Only these", allowed=tuple(TYPES))),
    ),
    _key("GET", _KEY, get_key, "Name, type and public half of one", answer=SecretKeyInfo, query=_READ),
    _key(
        "POST",
        _KEY,
        set_key,
        "Set a secret key that one brings; it replaces one of the same name",
        body=SetSecretKeyRequest,
        answer=SetSecretKeyResponse,
        status=201,
    ),
    _key(
        "POST",
        f"{_KEY}/generate",
        generate_key,
        "Make a secret key that nobody has seen",
        body=SetSecretKeyRequest,
        answer=SetSecretKeyResponse,
        status=201,
    ),
    _key("DELETE", _KEY, delete_key, "Delete a secret key; what it encrypted is lost", answer=SecretsVersion),
    _key("POST", f"{_KEY}/encrypt", encrypt, "Encrypt", body=EncryptRequest, answer=Encrypted, query=_READ),
    _key("POST", f"{_KEY}/decrypt", decrypt, "Decrypt", body=DecryptRequest, answer=Decrypted, query=_READ),
    _key("POST", f"{_KEY}/sign", sign, "Sign", body=SignRequest, answer=Signed, query=_READ),
    _key(
        "POST",
        f"{_KEY}/verify",
        verify,
        "Check a signature; 400 when it is not this key's of this text",
        body=VerifyRequest,
        status=204,
        query=_READ,
    ),
]
