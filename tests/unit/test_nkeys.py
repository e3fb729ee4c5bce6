"""nkeys and credentials as NATS writes them, against its published example."""

from __future__ import annotations

from pathlib import Path

import pytest

from pantala.errors import InvalidRequest
from pantala.kit import nkeys
from pantala.kit.files import write_private
from pantala.kit.nkeys import NKey

# From the documentation of nats-server (authentication by nkey).
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"


def test_the_published_seed_has_the_published_key() -> None:
    key = NKey.from_seed(SEED)
    assert (key.kind, key.public, key.seed) == ("user", PUBLIC, SEED)
    nkeys.check_public(PUBLIC, "user", field="bus_key")


@pytest.mark.parametrize(
    "text", ["", "U", PUBLIC[:-1] + "A", PUBLIC.lower(), SEED, NKey("account", b"a" * 32).public], ids=str
)
def test_what_is_no_user_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        nkeys.check_public(text, "user", field="bus_key")
    assert refused.value.field == "bus_key"


def test_a_jwt_says_who_issued_it_and_cannot_be_altered() -> None:
    account = NKey("account", b"a" * 32)
    text = account.jwt(subject=PUBLIC, name="iad-1", issued_at_s=1, nats={"type": "user"})
    assert nkeys.claims_of(text)["iss"] == account.public
    head, claims, signature = text.split(".")
    with pytest.raises(InvalidRequest):
        nkeys.claims_of(f"{head}.{claims[:-2]}AA.{signature}")


def test_a_credentials_file_holds_jwt_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "bus.creds"
    write_private(path, nkeys.credentials_text("a.b.c", NKey.from_seed(SEED)).encode())
    assert path.stat().st_mode & 0o777 == 0o600
    jwt, key = nkeys.read_credentials(path)
    assert (jwt, key.public) == ("a.b.c", PUBLIC)
    with pytest.raises(InvalidRequest, match="absent"):
        nkeys.read_credentials(tmp_path / "absent")


def test_a_key_is_made_once(tmp_path: Path) -> None:
    made = NKey.ensure("operator", tmp_path / "keys" / "operator.seed")
    assert made.public == NKey.ensure("operator", tmp_path / "keys" / "operator.seed").public
    assert made.public.startswith("O")
