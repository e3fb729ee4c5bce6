"""Secret keys and the single forms of secrets: names and codes of flyctl-protocol reference 4.8 and 4.13."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pantala.testing.platform import TestPlatform, running

pytestmark = pytest.mark.anyio

SECRETS = "/v1/apps/web/secrets"
KEYS = "/v1/apps/web/secretkeys"


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def post(web: TestPlatform, path: str, body: dict[str, Any]) -> httpx2.Response:
    return await web.http.post(f"{KEYS}/{path}", json=body, headers=web.auth)


# -- single secrets ------------------------------------------------------------------------------------------------


async def test_one_secret_has_digest_dates_and_both_versions(web: TestPlatform) -> None:
    made = await web.http.post(f"{SECRETS}/A", json={"value": "v"}, headers=web.auth)
    assert made.status_code == 201
    assert made.json().keys() == {"name", "digest", "created_at", "updated_at", "version", "Version"}
    assert (made.json()["name"], made.json()["version"], made.json()["Version"]) == ("A", 1, 1)
    shown = await web.http.get(f"{SECRETS}/A?min_version=1", headers=web.auth)
    assert shown.json() == {key: made.json()[key] for key in ("name", "digest", "created_at", "updated_at")}
    removed = await web.http.delete(f"{SECRETS}/A", headers=web.auth)
    assert (removed.status_code, removed.json()) == (200, {"version": 2, "Version": 2})
    missing = await web.http.get(f"{SECRETS}/A", headers=web.auth)
    assert (missing.status_code, missing.json()["error"]) == (404, "secret not found: A")


@pytest.mark.parametrize("path", [SECRETS, f"{SECRETS}/A"], ids=["list", "one"])
async def test_values_are_never_read_back(web: TestPlatform, path: str) -> None:
    await web.http.post(f"{SECRETS}/A", json={"value": "hidden-value"}, headers=web.auth)
    answer = await web.http.get(f"{path}?show_secrets=true", headers=web.auth)
    assert (answer.status_code, answer.json()["status"]) == (403, "forbidden")
    assert answer.json()["error"].startswith("show_secrets: ")
    assert "hidden-value" not in answer.text
    assert (await web.http.get(f"{path}?show_secrets=false", headers=web.auth)).status_code == 200


@pytest.mark.parametrize("name", ["version", "min_version"])
async def test_a_version_that_never_was_is_refused(web: TestPlatform, name: str) -> None:
    await web.http.post(f"{SECRETS}/A", json={"value": "v"}, headers=web.auth)
    assert (await web.http.get(f"{SECRETS}?{name}=1", headers=web.auth)).status_code == 200
    answer = await web.http.get(f"{SECRETS}?{name}=2", headers=web.auth)
    assert (answer.status_code, answer.json()["error"].partition(":")[0]) == (400, "min_version")


# -- keys --------------------------------------------------------------------------------------------------------------


async def test_generate_list_get_delete(web: TestPlatform) -> None:
    made = await post(web, "box/generate", {"type": "nacl_box", "value": None})
    assert made.status_code == 201
    assert made.json().keys() == {"name", "type", "public_key", "created_at", "updated_at", "version", "Version"}
    assert len(base64.b64decode(made.json()["public_key"])) == 32
    mac = await post(web, "mac/generate", {"type": "hs256"})
    assert "public_key" not in mac.json()
    assert (mac.json()["version"], mac.json()["Version"]) == (2, 2)
    listed = await web.http.get(f"{KEYS}?min_version=2", headers=web.auth)
    assert [(key["name"], key["type"]) for key in listed.json()["secret_keys"]] == [
        ("box", "nacl_box"),
        ("mac", "hs256"),
    ]
    some = await web.http.get(f"{KEYS}?types=hs256,hs512", headers=web.auth)
    assert [key["name"] for key in some.json()["secret_keys"]] == ["mac"]
    one = await web.http.get(f"{KEYS}/box", headers=web.auth)
    assert one.json()["public_key"] == made.json()["public_key"]
    gone = await web.http.delete(f"{KEYS}/box", headers=web.auth)
    assert gone.json() == {"version": 3, "Version": 3}
    for method in ("GET", "DELETE"):
        answer = await web.http.request(method, f"{KEYS}/box", headers=web.auth)
        assert (answer.status_code, answer.json()["error"]) == (404, "secret key not found: box")


async def test_a_generated_key_does_not_replace_one_that_is_there(web: TestPlatform) -> None:
    first = (await post(web, "box/generate", {"type": "nacl_box"})).json()
    again = await post(web, "box/generate", {"type": "nacl_box"})
    assert again.status_code == 409
    assert (await web.http.get(f"{KEYS}/box", headers=web.auth)).json()["public_key"] == first["public_key"]


@pytest.mark.parametrize("form", [b64, list], ids=["base64", "numbers"])
async def test_encrypt_and_decrypt(web: TestPlatform, form: Any) -> None:
    await post(web, "data/generate", {"type": "xaes256gcm"})
    sealed = await post(web, "data/encrypt", {"plaintext": form(b"attack"), "associated_data": form(b"row 1")})
    assert sealed.status_code == 200
    ciphertext = sealed.json()["ciphertext"]
    assert isinstance(ciphertext, str)
    opened = await post(web, "data/decrypt", {"ciphertext": ciphertext, "associated_data": form(b"row 1")})
    assert opened.json() == {"plaintext": b64(b"attack")}
    other = await post(web, "data/decrypt", {"ciphertext": ciphertext})
    assert (other.status_code, other.json()["error"].partition(":")[0]) == (400, "ciphertext")


async def test_sign_and_verify_with_a_key_of_ones_own(web: TestPlatform) -> None:
    assert (await post(web, "mac", {"type": "hs256", "value": b64(b"k" * 32)})).status_code == 201
    signed = await post(web, "mac/sign", {"plaintext": b64(b"release")})
    import hashlib
    import hmac

    signature = signed.json()["signature"]
    assert signature == b64(hmac.new(b"k" * 32, b"release", hashlib.sha256).digest())
    right = await post(web, "mac/verify", {"plaintext": b64(b"release"), "signature": signature})
    assert (right.status_code, right.content) == (204, b"")
    wrong = await post(web, "mac/verify", {"plaintext": b64(b"other"), "signature": signature})
    assert (wrong.status_code, wrong.json()["error"].partition(":")[0]) == (400, "signature")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("k/generate", {"type": "rot13"}, "type"),
        ("k/generate", {"type": "hs256", "value": b64(b"x" * 32)}, "value"),
        ("k", {"type": "hs256"}, "value"),
        ("k", {"type": "hs256", "value": b64(b"short")}, "value"),
        ("k", {"type": "hs256", "value": "not base64!"}, "value"),
        ("k", {"type": "hs256", "value": [256]}, "value[0]"),
        ("-k/generate", {"type": "hs256"}, "name"),
    ],
    ids=["type", "brought", "none", "short", "base64", "byte", "name"],
)
async def test_bad_keys_are_refused_by_field(web: TestPlatform, path: str, body: dict[str, Any], field: str) -> None:
    answer = await post(web, path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"].startswith(f"{field}: "), answer.text
    assert (await web.http.get(KEYS, headers=web.auth)).json() == {"secret_keys": []}


async def test_others_and_read_tokens_cannot_use_a_key(web: TestPlatform) -> None:
    await post(web, "mac/generate", {"type": "hs256"})
    others = await web.admin("eve@example.com", "evil")
    answer = await web.http.post(f"{KEYS}/mac/sign", json={"plaintext": ""}, headers=others)
    assert answer.status_code == 404


async def test_a_deleted_app_takes_its_keys_along(web: TestPlatform) -> None:
    await post(web, "mac/generate", {"type": "hs256"})
    await web.http.delete("/v1/apps/web", headers=web.auth)
    await web.create_app("web")
    assert (await web.http.get(KEYS, headers=web.auth)).json() == {"secret_keys": []}


async def test_no_key_is_in_the_database(tmp_path: Path) -> None:
    key = b"sixteen bytes of"[:16] * 2
    async with running(tmp_path) as web:
        await web.create_app("web")
        headers = web.auth | {"idempotency-key": "k1"}
        await web.http.post(f"{KEYS}/mac", json={"type": "hs256", "value": b64(key)}, headers=headers)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for needle in (key, b64(key).encode()):
        assert [str(path) for path, content in files.items() if needle in content] == []
