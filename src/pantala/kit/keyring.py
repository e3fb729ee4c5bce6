"""What a secret key of an app can do, by its type: encrypt and decrypt, or sign and verify. Pure, over PyNaCl and
cryptography.

    hs256 hs384 hs512   sign, verify       HMAC with SHA-2
    nacl_auth           sign, verify       HMAC-SHA-512, the first 32 bytes (crypto_auth)
    nacl_sign           sign, verify       Ed25519, detached; has a public key
    es256               sign, verify       ECDSA over P-256 with SHA-256, r and s of 32 bytes each; has a public key
    nacl_secretbox      encrypt, decrypt   XSalsa20-Poly1305, the nonce first
    nacl_box            encrypt, decrypt   sealed boxes to its own X25519 key; has a public key
    xaes256gcm          encrypt, decrypt   XAES-256-GCM with associated data, the nonce first

Types: `secrets_types.go` of superfly/fly-go. XAES-256-GCM: c2sp.org/XAES-256-GCM.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.cmac import CMAC
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.public import PrivateKey, SealedBox
from nacl.secret import SecretBox
from nacl.signing import SigningKey

from pantala.errors import InvalidRequest

NONCE_BYTES = 24
HMAC_KEY_BYTES_MAX = 1024
Verb = Literal["encrypt", "decrypt", "sign", "verify"]


class KeyType(NamedTuple):
    """`sizes`: how long a key that somebody brings may be, least and most; `made`: how long one of ours is."""

    sizes: tuple[int, int]
    made: int
    verbs: tuple[Verb, ...]


_SIGNS: Final[tuple[Verb, ...]] = ("sign", "verify")
_ENCRYPTS: Final[tuple[Verb, ...]] = ("encrypt", "decrypt")
TYPES: Mapping[str, KeyType] = {
    "hs256": KeyType((32, HMAC_KEY_BYTES_MAX), 32, _SIGNS),
    "hs384": KeyType((48, HMAC_KEY_BYTES_MAX), 48, _SIGNS),
    "hs512": KeyType((64, HMAC_KEY_BYTES_MAX), 64, _SIGNS),
    "es256": KeyType((32, 32), 32, _SIGNS),
    "nacl_auth": KeyType((32, 32), 32, _SIGNS),
    "nacl_sign": KeyType((32, 64), 32, _SIGNS),
    "nacl_box": KeyType((32, 32), 32, _ENCRYPTS),
    "nacl_secretbox": KeyType((32, 32), 32, _ENCRYPTS),
    "xaes256gcm": KeyType((32, 32), 32, _ENCRYPTS),
}
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def generate(kind: str) -> bytes:
    """A new key of that type, random."""
    size = _known(kind).made
    while True:
        key = os.urandom(size)
        if kind != "es256" or 0 < int.from_bytes(key) < _P256_ORDER:
            return key


def checked(kind: str, value: bytes) -> bytes:
    """A key that somebody brings. Raises InvalidRequest saying what would be right, never what was given."""
    low, high = _known(kind).sizes
    if not low <= len(value) <= high:
        told = f"{low}" if low == high else f"{low} to {high}"
        raise InvalidRequest(f"a {kind} key has {told} bytes, not {len(value)}", field="value")
    if kind == "nacl_sign" and len(value) not in (32, 64):
        raise InvalidRequest(
            f"a nacl_sign key has 32 bytes, or 64 with its public half, not {len(value)}", field="value"
        )
    if kind == "nacl_sign" and len(value) == 64:
        if bytes(SigningKey(value[:32]).verify_key) != value[32:]:
            raise InvalidRequest("its second half is not the public key of the first", field="value")
        return value[:32]
    if kind == "es256" and not 0 < int.from_bytes(value) < _P256_ORDER:
        raise InvalidRequest("is no scalar of P-256", field="value")
    return value


def public_key(kind: str, key: bytes) -> bytes:
    """Empty for types without one; of es256 the point, uncompressed."""
    match kind:
        case "nacl_sign":
            return bytes(SigningKey(key).verify_key)
        case "nacl_box":
            return bytes(PrivateKey(key).public_key)
        case "es256":
            point, form = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
            return _es256(key).public_key().public_bytes(point, form)
        case _:
            return b""


def encrypt(kind: str, key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    _can(kind, "encrypt")
    _no_associated_data(kind, associated)
    match kind:
        case "nacl_box":
            return SealedBox(PrivateKey(key).public_key).encrypt(plaintext)
        case "nacl_secretbox":
            return bytes(SecretBox(key).encrypt(plaintext))
        case _:
            nonce = os.urandom(NONCE_BYTES)
            return nonce + xaes(key, nonce).encrypt(nonce[12:], plaintext, associated)


def decrypt(kind: str, key: bytes, ciphertext: bytes, associated: bytes) -> bytes:
    """Raises InvalidRequest for what another key encrypted, or what was changed since."""
    _can(kind, "decrypt")
    _no_associated_data(kind, associated)
    try:
        match kind:
            case "nacl_box":
                return SealedBox(PrivateKey(key)).decrypt(ciphertext)
            case "nacl_secretbox":
                return SecretBox(key).decrypt(ciphertext)
            case _:
                nonce, sealed = ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:]
                return xaes(key, nonce).decrypt(nonce[12:], sealed, associated)
    except (CryptoError, InvalidTag, ValueError) as error:
        raise InvalidRequest("was encrypted with another key, or altered since", field="ciphertext") from error


def sign(kind: str, key: bytes, text: bytes) -> bytes:
    _can(kind, "sign")
    match kind:
        case "nacl_sign":
            return SigningKey(key).sign(text).signature
        case "es256":
            r, s = decode_dss_signature(_es256(key).sign(text, ec.ECDSA(hashes.SHA256())))
            return r.to_bytes(32) + s.to_bytes(32)
        case _:
            return _MACS[kind](key, text)


def verify(kind: str, key: bytes, text: bytes, signature: bytes) -> bool:
    _can(kind, "verify")
    try:
        match kind:
            case "nacl_sign":
                SigningKey(key).verify_key.verify(text, signature)
            case "es256":
                if len(signature) != 64:
                    return False
                der = encode_dss_signature(int.from_bytes(signature[:32]), int.from_bytes(signature[32:]))
                _es256(key).public_key().verify(der, text, ec.ECDSA(hashes.SHA256()))
            case _:
                return hmac.compare_digest(_MACS[kind](key, text), signature)
    except (BadSignatureError, InvalidSignature, ValueError):
        return False
    return True


def xaes(key: bytes, nonce: bytes) -> AESGCM:
    """The AES-256-GCM of this nonce's first half; it is used with the second."""
    return AESGCM(b"".join(_derive(key, number, nonce[:12]) for number in (1, 2)))


def _derive(key: bytes, number: int, context: bytes) -> bytes:
    mac = CMAC(AES(key))
    mac.update(number.to_bytes(2) + b"X\x00" + context)
    return mac.finalize()


_MACS: Mapping[str, Callable[[bytes, bytes], bytes]] = {
    "hs256": lambda key, text: hmac.digest(key, text, "sha256"),
    "hs384": lambda key, text: hmac.digest(key, text, "sha384"),
    "hs512": lambda key, text: hmac.digest(key, text, "sha512"),
    "nacl_auth": lambda key, text: hmac.digest(key, text, "sha512")[:32],
}


def _es256(key: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(key), ec.SECP256R1())


def _known(kind: str) -> KeyType:
    if kind not in TYPES:
        raise InvalidRequest(f"{kind!r} is not one of {', '.join(TYPES)}", field="type")
    return TYPES[kind]


def _can(kind: str, verb: Verb) -> None:
    if verb not in _known(kind).verbs:
        able = ", ".join(name for name, one in TYPES.items() if verb in one.verbs)
        raise InvalidRequest(f"a {kind} key cannot {verb}; those of type {able} can", field="type")


def _no_associated_data(kind: str, associated: bytes) -> None:
    if associated and kind != "xaes256gcm":
        raise InvalidRequest(f"a {kind} key takes none; one of type xaes256gcm does", field="associated_data")
