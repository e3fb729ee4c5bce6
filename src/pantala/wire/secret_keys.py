"""Bodies of `/v1/apps/{app}/secretkeys`: keys that encrypt and sign for an app without ever being shown.

Source: flyctl-protocol reference, sections 4.8 and 4.13. Bytes are base64 text, as superfly/fly-go sends and reads
them; lists of numbers, as the original's description has them, are read too.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Bytes = Annotated[str, msgspec.Meta(description="base64")] | list[Byte]
"""`kit.sealing.unb64` or `bytes` makes it bytes."""


class _Hidden(msgspec.Struct, frozen=True, kw_only=True):
    """Requests whose values no log shows."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class SetSecretKeyRequest(_Hidden, frozen=True, kw_only=True):
    """`value`: the key itself; for generating it is left out."""

    type: str
    value: Bytes | None = None


class EncryptRequest(_Hidden, frozen=True, kw_only=True):
    plaintext: Bytes
    associated_data: Bytes | None = None


class DecryptRequest(_Hidden, frozen=True, kw_only=True):
    ciphertext: Bytes
    associated_data: Bytes | None = None


class SignRequest(_Hidden, frozen=True, kw_only=True):
    plaintext: Bytes


class VerifyRequest(_Hidden, frozen=True, kw_only=True):
    plaintext: Bytes
    signature: Bytes


class Encrypted(msgspec.Struct, frozen=True, kw_only=True):
    ciphertext: str


class Decrypted(msgspec.Struct, frozen=True, kw_only=True):
    plaintext: str


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    signature: str


class SecretKeyInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`public_key` (base64): only of types that have one."""

    name: str
    type: str
    created_at: str
    updated_at: str
    public_key: str = ""


class SetSecretKeyResponse(SecretKeyInfo, frozen=True, kw_only=True):
    """`version` is the app's secrets version."""

    version: int
    Version: int


class ListSecretKeysResponse(msgspec.Struct, frozen=True, kw_only=True):
    secret_keys: list[SecretKeyInfo]
