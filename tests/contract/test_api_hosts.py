"""Hosts join with one-time tokens, are listed, renew by signed calls; who may not is refused and changes nothing."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from pantala.agent.identity import ControlClient
from pantala.errors import Conflict, Forbidden, InvalidRequest
from pantala.kit.clock import unix_ms
from pantala.kit.nkeys import claims_of
from pantala.kit.sealing import Signer
from pantala.testing.clock import ManualClock
from pantala.testing.host_keys import HostKeys, csr_of
from pantala.testing.platform import TestPlatform, running
from pantala.wire.hosts import CONTROL_CALL, CallBody, Joined, JoinRequest, NewEpoch, SignedCall, TokenText
from pantala.wire.node import NodeReply

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def platform(tmp_path: Path, clock: ManualClock) -> AsyncGenerator[TestPlatform]:
    async with running(tmp_path, clock=clock) as made:
        yield made


async def token(platform: TestPlatform, **body: Any) -> str:
    answer = await platform.http.post("/v1/hosts/tokens", json=body, headers=platform.auth)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["token"])


async def join(platform: TestPlatform, request: JoinRequest) -> httpx2.Response:
    return await platform.http.post("/v1/hosts/join", content=msgspec.json.encode(request))


async def joined(platform: TestPlatform, keys: HostKeys, **more: Any) -> Joined:
    answer = await join(platform, keys.request(token=await token(platform), **more))
    assert answer.status_code == 201, answer.text
    return msgspec.json.decode(answer.content, type=Joined)


# -- joining ---------------------------------------------------------------------------------------------------------


async def test_a_host_joins_with_a_token_and_gets_all_it_needs(platform: TestPlatform, tmp_path: Path) -> None:
    keys = HostKeys()
    host = await joined(platform, keys, region="lhr", zone="a")
    assert (host.node, host.region, host.zone, host.epoch) == ("lhr-1", "lhr", "a", 1)
    assert host.members == ["lhr-1", "node-1"]
    assert len(keys.sealing.open(host.edge_key_sealed)) == 32
    leaf = x509.load_pem_x509_certificate(host.certificate_pem.encode())
    authority = x509.load_pem_x509_certificate(host.authority_pem.encode())
    name = x509.DNSName("lhr-1.node.pantala.internal")
    moment = platform.control.context.clock.now()
    policy = PolicyBuilder().store(Store([authority])).time(moment)
    policy.build_server_verifier(name).verify(leaf, [])
    assert policy.build_client_verifier().verify(leaf, []).subjects == [name, x509.IPAddress(ip_address("10.0.0.9"))]
    assert leaf.public_key() == keys.tls.public_key()
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert (leaf.not_valid_after_utc - moment).days == 30
    assert claims_of(host.bus.user_jwt)["sub"] == keys.bus.public
    assert (tmp_path / "cluster-ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    assert platform.rows.rows["member/lhr-1"] == {
        "id": "lhr-1",
        "region": "lhr",
        "zone": "a",
        "address": "10.0.0.9",
        "verify_key": keys.signer.verify_key,
        "sealing_key": keys.sealing.public_key,
        "edge": True,
    }


async def test_a_new_region_is_listed_and_placeable_at_once(platform: TestPlatform) -> None:
    await platform.add_agent("nrt-1", region="nrt")
    listed = (await platform.http.get("/v1/platform/regions", headers=platform.auth)).json()
    assert [region["code"] for region in listed["Regions"]] == ["iad", "lhr", "nrt"]
    await platform.create_app("web")
    assert (await platform.create_machine("web", region="nrt"))["region"] == "nrt"


async def test_a_token_is_for_one_host(platform: TestPlatform) -> None:
    text = await token(platform)
    assert (await join(platform, HostKeys().request(token=text, address="10.0.0.8"))).status_code == 201
    again = await join(platform, HostKeys().request(token=text, address="10.0.0.9"))
    assert again.status_code == 403
    assert "already used" in again.json()["error"]


async def test_of_two_hosts_with_one_token_one_is_in(platform: TestPlatform) -> None:
    text = await token(platform)
    codes: list[int] = []

    async def attempt(number: int) -> None:
        codes.append((await join(platform, HostKeys().request(token=text, address=f"10.0.1.{number}"))).status_code)

    async with anyio.create_task_group() as tasks:
        for number in range(1, 6):
            tasks.start_soon(attempt, number)
    assert sorted(codes) == [201, 403, 403, 403, 403]


async def test_a_token_expires(platform: TestPlatform, clock: ManualClock) -> None:
    text = await token(platform, expires_in_s=60)
    await clock.advance(61)
    assert (await join(platform, HostKeys().request(token=text))).status_code == 403


async def test_a_wrong_request_leaves_the_token_good(platform: TestPlatform) -> None:
    text = await token(platform, region="lhr")
    wrong = await join(platform, HostKeys().request(token=text, region="iad"))
    assert (wrong.status_code, wrong.json()["error"]) == (
        400,
        "region: this token is for a host in lhr, not in iad",
    )
    assert (await join(platform, HostKeys().request(token=text, region="lhr"))).status_code == 201


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("region", "jfk", "there is no region 'jfk'; the nearest that exist are ewr"),
        ("region", "lhx", "lhr (London"),
        ("address", "host.example", "not an IP address"),
        ("address", "127.0.0.1", "cannot reach 127.0.0.1"),
        ("address", "10.0.0.1", "is that of node-1"),
        ("verify_key", "AAAA", "has 3 bytes, not 32"),
        ("sealing_key", "?", "is not base64"),
        ("bus_key", "UABC", "nkey"),
        ("csr_pem", "nonsense", "not a certificate request"),
        ("zone", "a b", "letters, digits"),
        ("node", "iad-9", "chosen by the platform"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_what_is_wrong_in_a_request_is_named(platform: TestPlatform, field: str, value: str, told: str) -> None:
    request = msgspec.structs.replace(HostKeys().request(token=await token(platform)), **{field: value})
    answer = await join(platform, request)
    assert answer.status_code in (400, 409)
    assert answer.json()["error"].startswith(f"{field}: ")
    assert told in answer.json()["error"]


async def test_a_certificate_request_for_somebody_else_s_key_is_refused(platform: TestPlatform) -> None:
    """A request whose signature was made by another key proves nothing."""
    keys, other = HostKeys(), HostKeys()
    der = bytearray(x509.load_pem_x509_csr(csr_of(keys.tls).encode()).public_bytes(_der()))
    stolen = x509.load_pem_x509_csr(csr_of(other.tls).encode())
    der[-len(stolen.signature) :] = stolen.signature
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(der)).decode()
    request = msgspec.structs.replace(
        keys.request(token=await token(platform)), csr_pem=pem + "-----END CERTIFICATE REQUEST-----\n"
    )
    answer = await join(platform, request)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("csr_pem: ")


def _der() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


async def test_keys_belong_to_one_host(platform: TestPlatform) -> None:
    keys = HostKeys()
    await joined(platform, keys)
    again = await join(platform, keys.request(token=await token(platform), address="10.0.0.10"))
    assert again.status_code == 409
    assert again.json()["error"].startswith("verify_key: iad-1 joined with it")


async def test_an_id_is_never_given_twice(platform: TestPlatform) -> None:
    first = await joined(platform, HostKeys())
    await platform.control.hosts.withdraw(first.node, "lost", actor="ada")
    assert "member/iad-1" not in platform.rows.rows
    second = await joined(platform, HostKeys())
    assert (first.node, second.node) == ("iad-1", "iad-2")
    assert claims_of(next(reversed(second.bus.accounts.values())))["nats"]["revocations"]


async def test_the_first_hosts_are_admitted_again_with_the_same_keys_only(platform: TestPlatform) -> None:
    keys = HostKeys()
    hosts = platform.control.hosts
    first = await hosts.admit_first(keys.request(node="iad-1"))
    again = await hosts.admit_first(keys.request(node="iad-1", address="10.0.0.77"))
    assert (again.node, again.epoch) == (first.node, first.epoch)
    assert platform.rows.rows["member/iad-1"]["address"] == "10.0.0.77"
    with pytest.raises(Conflict, match="joined with another"):
        await hosts.admit_first(HostKeys().request(node="iad-1"))
    for node in ("iad.1", "control", "hold"):
        with pytest.raises(InvalidRequest, match="lower-case"):
            await hosts.admit_first(HostKeys().request(node=node))
    await hosts.withdraw("iad-1", "removed", actor="ada")
    with pytest.raises(Conflict, match="was removed"):
        await hosts.admit_first(keys.request(node="iad-1"))


# -- who may ---------------------------------------------------------------------------------------------------------


async def test_only_operators_make_tokens_and_list(platform: TestPlatform) -> None:
    await platform.create_app("web")
    answer = await platform.http.post(
        "/v1/tokens", json={"name": "ci", "expiry": "1h", "app": "web"}, headers=platform.auth
    )
    deploy = {"authorization": f"Bearer {answer.json()['token']}"}
    stranger = await platform.admin("eve@example.com", "evil")
    for headers, code in ((deploy, 403), (stranger, 404), ({}, 401)):
        assert (await platform.http.get("/v1/hosts", headers=headers)).status_code == code
        assert (await platform.http.post("/v1/hosts/tokens", json={}, headers=headers)).status_code == code


async def test_hosts_are_listed_with_what_they_have(platform: TestPlatform) -> None:
    await joined(platform, HostKeys(), region="lhr")
    await platform.create_app("web")
    await platform.create_machine("web")
    hosts = (await platform.http.get("/v1/hosts", headers=platform.auth)).json()
    assert [(host["id"], host["status"], host["reachable"], host["machines"]) for host in hosts] == [
        ("lhr-1", "active", False, 0),
        ("node-1", "active", True, 1),
    ]
    assert hosts[1]["memory_mib"] >= hosts[1]["memory_mib_free"] > 0


async def test_a_token_says_where_to_join(platform: TestPlatform) -> None:
    text = await token(platform)
    assert text.startswith("pjt_")
    decoded = base64.urlsafe_b64decode(text[4:] + "=" * (-len(text[4:]) % 4))
    told = msgspec.json.decode(decoded, type=TokenText)
    assert (told.api, told.address, told.authority) == ("http://192.0.2.1:4280", "192.0.2.1:4280", "")
    for seconds in (0, 8 * 24 * 3600):
        answer = await platform.http.post("/v1/hosts/tokens", json={"expires_in_s": seconds}, headers=platform.auth)
        assert answer.status_code == 400


# -- calls of hosts --------------------------------------------------------------------------------------------------


def client(platform: TestPlatform, keys: HostKeys, node: str) -> ControlClient:
    return ControlClient(platform.bus, keys.signer, platform.control.context.clock, node=node)


async def test_a_member_renews_its_certificate(platform: TestPlatform, clock: ManualClock) -> None:
    keys = HostKeys()
    host = await joined(platform, keys)
    await clock.advance(21 * 24 * 3600)
    renewed = await client(platform, keys, host.node).renew(csr_of(keys.tls))
    before = x509.load_pem_x509_certificate(host.certificate_pem.encode())
    after = x509.load_pem_x509_certificate(renewed.certificate_pem.encode())
    assert (after.not_valid_after_utc - before.not_valid_after_utc).days == 21
    assert claims_of(renewed.user_jwt)["exp"] > claims_of(host.bus.user_jwt)["exp"]


async def test_epochs_only_grow(platform: TestPlatform) -> None:
    keys = HostKeys()
    host = await joined(platform, keys)
    control = client(platform, keys, host.node)
    assert await control.new_epoch(host.epoch) == 2
    assert await control.new_epoch(7) == 8
    assert await control.new_epoch(1) == 9


async def test_a_call_that_is_not_the_node_s_is_refused(platform: TestPlatform) -> None:
    keys = HostKeys()
    host = await joined(platform, keys)
    with pytest.raises(Forbidden, match="not signed by iad-1"):
        await client(platform, HostKeys(), host.node).new_epoch(1)
    with pytest.raises(Forbidden, match="no member"):
        await client(platform, keys, "iad-7").new_epoch(1)
    await platform.control.hosts.withdraw(host.node, "lost", actor="ada")
    with pytest.raises(Forbidden, match="no member"):
        await client(platform, keys, host.node).renew(csr_of(keys.tls))


async def test_a_call_counts_once_and_only_while_it_is_fresh(platform: TestPlatform, clock: ManualClock) -> None:
    keys = HostKeys()
    host = await joined(platform, keys)
    call = signed(keys.signer, host.node, unix_ms(clock.now()))
    first = await platform.bus.request(CONTROL_CALL, call, timeout_s=1)
    assert await platform.bus.request(CONTROL_CALL, call, timeout_s=1) == first
    await clock.advance(301)
    late = msgspec.json.decode(await platform.bus.request(CONTROL_CALL, call, timeout_s=1), type=NodeReply)
    assert late.error is not None
    assert "differs by 301 s" in late.error.message
    assert await client(platform, keys, host.node).new_epoch(0) == 3


def signed(signer: Signer, node: str, at_ms: int) -> bytes:
    body = msgspec.json.encode(CallBody(node=node, at_ms=at_ms, request_id="r1", request=NewEpoch(above=1)))
    return msgspec.json.encode(SignedCall(node=node, payload=body, signature=signer.sign(body)))
