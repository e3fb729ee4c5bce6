"""SSH: whom a certificate lets in where, and the way to a machine, which ends with the right to it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import asyncssh
import pytest
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
    load_ssh_public_key,
)
from sqlalchemy import select, update

from pantala.client.tunnel import open_tunnel
from pantala.control.ssh_authority import SshAuthority
from pantala.errors import NotFound, PantalaError, Unauthenticated, WrongState
from pantala.kit.secret import Secret
from pantala.store.schema import audit, tokens
from pantala.testing.platform import TestPlatform, serve_http

pytestmark = pytest.mark.anyio

CERTIFICATES = "/v1/apps/web/ssh_certificates"


def _public_key(kind: str = "ssh-ed25519") -> str:
    return asyncssh.generate_private_key(kind).export_public_key().decode()


@pytest.fixture
async def web(platform: TestPlatform) -> TestPlatform:
    await platform.create_app("web")
    return platform


async def test_a_certificate_names_the_app_its_users_and_its_end(web: TestPlatform) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    public_key = key.export_public_key()
    body = {"public_key": public_key.decode(), "principals": ["root", "fly"], "hours": 2}
    answer = await web.http.post(CERTIFICATES, json=body, headers=web.auth)
    assert answer.status_code == 200, answer.text
    issued = answer.json()
    certificate = _read(issued["certificate"])
    assert certificate.type is SSHCertificateType.USER
    assert certificate.valid_principals == [b"root@acme/web", b"fly@acme/web"]
    assert certificate.public_key() == load_ssh_public_key(public_key)
    assert (certificate.critical_options, set(certificate.extensions)) == (
        {},
        {b"permit-pty", b"permit-port-forwarding"},
    )
    now = time.time()
    assert now - 120 < certificate.valid_after < now
    assert abs(certificate.valid_before - now - 2 * 3600) < 60
    assert certificate.key_id == b"ada@example.com for web"
    certificate.verify_cert_signature()
    (entry,) = await _audit(web, "ssh.certificate")
    assert (entry.actor, entry.target, entry.detail["serial"]) == ("ada@example.com", "web/ssh", issued["serial"])


async def test_machines_are_told_the_authority_and_its_successor(web: TestPlatform, tmp_path: Path) -> None:
    await web.control.publication.publish_all()
    told = web.rows.rows["ssh/authorities"]["authorities"]
    answer = await web.http.post(CERTIFICATES, json={"public_key": _public_key()}, headers=web.auth)
    signer = _read(answer.json()["certificate"]).signature_key()
    assert load_ssh_public_key(told[0].encode()) == signer
    assert len(set(told)) == 2

    folder = tmp_path / "other-ca"
    first = SshAuthority(folder).public_keys
    assert SshAuthority(folder).public_keys == first
    (folder / "current.key").unlink()
    rotated = SshAuthority(folder).public_keys
    assert rotated[0] == first[1]
    assert rotated[1] not in first


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"public_key": "nonsense"}, "public_key"),
        ({"public_key": _public_key("ecdsa-sha2-nistp256")}, "public_key"),
        ({"public_key": _public_key(), "hours": 25}, "hours"),
        ({"public_key": _public_key(), "hours": 0}, "hours"),
        ({"public_key": _public_key(), "principals": []}, "principals"),
        ({"public_key": _public_key(), "principals": ["root@acme/other"]}, "principals"),
        ({"public_key": _public_key(), "principals": ["a,b"]}, "principals"),
    ],
)
async def test_what_cannot_be_certified_is_refused_by_name(web: TestPlatform, body: Any, field: str) -> None:
    answer = await web.http.post(CERTIFICATES, json=body, headers=web.auth)
    assert answer.status_code in {400, 422}, answer.text
    assert answer.json()["error"].startswith(field)


async def test_somebody_else_gets_none_and_no_way(web: TestPlatform) -> None:
    machine = await web.create_machine("web")
    stranger = await web.admin("eve@example.com", "evil")
    answer = await web.http.post(CERTIFICATES, json={"public_key": _public_key()}, headers=stranger)
    assert answer.status_code == 404
    async with serve_http(web) as url:
        token = stranger["authorization"].removeprefix("Bearer ")
        assert isinstance(await _refusal(url, token, machine["id"]), NotFound)
        assert isinstance(await _refusal(url, "pantala_nobody", machine["id"]), Unauthenticated)
        assert isinstance(await _refusal(url, web.token, "0123456789abcd"), NotFound)
    assert await _audit(web, "ssh.begin") == []


async def test_bytes_go_both_ways_and_the_session_is_in_the_audit_log(web: TestPlatform) -> None:
    machine = await web.create_machine("web")
    data = bytes(range(256)) * 2000
    with anyio.fail_after(30):
        async with serve_http(web) as url:
            async with open_tunnel(url, Secret(web.token), app="web", machine=machine["id"]) as tunnel:
                async with await anyio.abc.SocketStream.from_socket(tunnel.local) as stream:
                    await stream.send(data)
                    heard = b""
                    while len(heard) < len(data):
                        heard += await stream.receive()
                    assert heard == data
                    await stream.send(b"bye")
                    with pytest.raises(anyio.EndOfStream):
                        await stream.receive()
                assert tunnel.refusal is None
    (begun,), (ended,) = await _audit(web, "ssh.begin"), await _audit(web, "ssh.end")
    target = f"web/{machine['id']}"
    assert (begun.actor, begun.target, begun.detail) == ("ada@example.com", target, {"from": "127.0.0.1"})
    assert (ended.target, ended.detail["reason"]) == (target, "it ended")


async def test_who_loses_the_right_is_out_within_ten_seconds(web: TestPlatform) -> None:
    machine = await web.create_machine("web")
    with anyio.fail_after(30):
        async with serve_http(web) as url:
            async with open_tunnel(url, Secret(web.token), app="web", machine=machine["id"]) as tunnel:
                async with await anyio.abc.SocketStream.from_socket(tunnel.local) as stream:
                    await stream.send(b"x")
                    await stream.receive()
                    await web.db.write(lambda c: c.execute(update(tokens).values(revoked_at_ms=1)))
                    began = time.monotonic()
                    with pytest.raises(anyio.EndOfStream):
                        await stream.receive()
                    assert time.monotonic() - began < 10
                assert isinstance(tunnel.refusal, Unauthenticated)
            assert isinstance(await _refusal(url, web.token, machine["id"]), Unauthenticated)
    (ended,) = await _audit(web, "ssh.end")
    assert "revoked" in ended.detail["reason"]


async def test_a_token_revoked_by_its_id_ends_its_session_and_no_other(web: TestPlatform) -> None:
    machine = await web.create_machine("web")
    body = {"name": "ci", "app": "web", "expiry": "1h"}
    token = (await web.http.post("/v1/tokens", json=body, headers=web.auth)).json()["token"]
    listed = (await web.http.get("/v1/tokens", headers=web.auth)).json()
    (token_id,) = [one["id"] for one in listed if one["name"] == "ci"]
    assert {(one["role"], one["app"], one["user"]) for one in listed if one["id"] == token_id} == {
        ("deploy", "web", "ada@example.com")
    }
    assert token not in json.dumps(listed)
    stranger = await web.admin("eve@example.com", "evil")
    ci = {"authorization": f"Bearer {token}"}
    for other in (stranger, ci):
        assert token_id not in {one["id"] for one in (await web.http.get("/v1/tokens", headers=other)).json()}
        assert (await web.http.delete(f"/v1/tokens/{token_id}", headers=other)).status_code == 404
    with anyio.fail_after(40):
        async with serve_http(web) as url:
            async with (
                open_tunnel(url, Secret(token), app="web", machine=machine["id"]) as tunnel,
                await anyio.abc.SocketStream.from_socket(tunnel.local) as stream,
            ):
                await stream.send(b"x")
                assert await stream.receive() == b"x"
                assert (await web.http.delete(f"/v1/tokens/{token_id}", headers=web.auth)).status_code == 204
                began = time.monotonic()
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
                assert time.monotonic() - began < 10
            assert isinstance(tunnel.refusal, Unauthenticated)
            answer = await web.http.post(CERTIFICATES, json={"public_key": _public_key()}, headers=ci)
            assert answer.status_code == 401
    again = await web.http.delete(f"/v1/tokens/{token_id}", headers=web.auth)
    assert (again.status_code, again.json()["error"]) == (404, "token not found")
    (entry,) = await _audit(web, "token.revoke")
    assert (entry.actor, entry.target) == ("ada@example.com", token_id)
    assert (await web.http.get("/v1/user", headers=web.auth)).status_code == 200


async def test_a_machine_that_is_not_started_says_so(web: TestPlatform) -> None:
    machine = await web.create_machine("web", skip_launch=True)
    async with serve_http(web) as url:
        refused = await _refusal(url, web.token, machine["id"])
    assert isinstance(refused, WrongState)
    assert "not started" in refused.message


def _read(text: str) -> SSHCertificate:
    certificate = load_ssh_public_identity(text.encode())
    assert isinstance(certificate, SSHCertificate)
    return certificate


class Entry(NamedTuple):
    actor: str
    target: str
    detail: dict[str, Any]


async def _audit(platform: TestPlatform, action: str) -> list[Entry]:
    statement = select(audit.c.actor, audit.c.target, audit.c.detail).where(audit.c.action == action)
    rows = await platform.db.read(lambda c: c.execute(statement).all())
    return [Entry(row[0], row[1], json.loads(row[2])) for row in rows]


async def _refusal(url: str, token: str, machine: str) -> PantalaError | None:
    with anyio.fail_after(10):
        async with open_tunnel(url, Secret(token), app="web", machine=machine) as tunnel:
            async with await anyio.abc.SocketStream.from_socket(tunnel.local) as stream:
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            return tunnel.refusal
