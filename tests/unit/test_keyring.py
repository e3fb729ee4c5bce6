"""Secret keys: published vectors, and that nothing else opens or verifies."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantala.errors import InvalidRequest
from pantala.kit import keyring

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
SIGNING = [kind for kind, what in keyring.TYPES.items() if "sign" in what.verbs]
ENCRYPTING = [kind for kind, what in keyring.TYPES.items() if "encrypt" in what.verbs]


@pytest.mark.parametrize(
    ("key", "associated", "expected"),
    [
        (b"\1" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\3" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
    ids=["plain", "associated"],
)
def test_xaes256gcm_is_that_of_its_specification(key: bytes, associated: bytes, expected: str) -> None:
    sealed = bytes.fromhex(expected)
    assert keyring.xaes(key, NONCE).encrypt(NONCE[12:], b"XAES-256-GCM", associated) == sealed
    assert keyring.decrypt("xaes256gcm", key, NONCE + sealed, associated) == b"XAES-256-GCM"


def test_hs256_is_hmac() -> None:
    """RFC 4231, test case 1, with a key of the length that is asked for."""
    key = b"\x0b" * 32
    assert keyring.sign("hs256", key, b"Hi There") == hmac.new(key, b"Hi There", hashlib.sha256).digest()


def test_nacl_sign_is_ed25519() -> None:
    """RFC 8032, section 7.1, test 1."""
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )
    assert keyring.public_key("nacl_sign", seed) == public
    assert keyring.sign("nacl_sign", seed, b"") == signature
    assert keyring.checked("nacl_sign", seed + public) == seed


@pytest.mark.parametrize("kind", SIGNING)
@given(text=st.binary(max_size=64), other=st.binary(max_size=64))
def test_a_signature_is_of_one_key_and_one_text(kind: str, text: bytes, other: bytes) -> None:
    key = keyring.generate(kind)
    signature = keyring.sign(kind, key, text)
    assert keyring.verify(kind, key, text, signature)
    assert keyring.verify(kind, key, other, signature) == (text == other)
    assert not keyring.verify(kind, keyring.generate(kind), text, signature)
    assert not keyring.verify(kind, key, text, signature[:-1])


@pytest.mark.parametrize("kind", ENCRYPTING)
@given(text=st.binary(max_size=64), at=st.integers(min_value=0, max_value=39))
def test_only_the_key_opens_and_only_what_nobody_altered(kind: str, text: bytes, at: int) -> None:
    key = keyring.generate(kind)
    sealed = keyring.encrypt(kind, key, text, b"")
    assert keyring.decrypt(kind, key, sealed, b"") == text
    altered = bytearray(sealed)
    altered[at % len(altered)] ^= 1
    for wrong, bad in ((keyring.generate(kind), sealed), (key, bytes(altered)), (key, sealed[:10]), (key, b"")):
        with pytest.raises(InvalidRequest, match="ciphertext"):
            keyring.decrypt(kind, wrong, bad, b"")


def test_associated_data_binds() -> None:
    key = keyring.generate("xaes256gcm")
    sealed = keyring.encrypt("xaes256gcm", key, b"text", b"row 1")
    assert keyring.decrypt("xaes256gcm", key, sealed, b"row 1") == b"text"
    with pytest.raises(InvalidRequest, match="ciphertext"):
        keyring.decrypt("xaes256gcm", key, sealed, b"row 2")
    with pytest.raises(InvalidRequest, match="associated_data"):
        keyring.encrypt("nacl_box", keyring.generate("nacl_box"), b"text", b"row 1")


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("hs256", b"x" * 31, "32 to 1024 bytes"),
        ("nacl_box", b"x" * 33, "has 32 bytes"),
        ("nacl_sign", b"x" * 40, "32 bytes, or 64"),
        ("nacl_sign", b"x" * 64, "second half"),
        ("es256", b"\xff" * 32, "scalar"),
        ("rot13", b"x", "is not one of hs256"),
    ],
    ids=["short", "long", "between", "halves", "scalar", "type"],
)
def test_a_key_that_cannot_be_is_refused_without_being_shown(kind: str, value: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        keyring.checked(kind, value)
    assert "xxx" not in refused.value.message


def test_what_a_type_cannot_do_names_those_that_can() -> None:
    with pytest.raises(InvalidRequest, match="xaes256gcm"):
        keyring.encrypt("hs256", keyring.generate("hs256"), b"x", b"")
    with pytest.raises(InvalidRequest, match="nacl_sign"):
        keyring.sign("nacl_box", keyring.generate("nacl_box"), b"x")
