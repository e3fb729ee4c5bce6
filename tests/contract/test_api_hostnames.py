"""Host names and their certificates over the API: who may have them, what DNS must say, what is served."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from golden import check

from pantala.kit.sealing import Opener
from pantala.testing.clock import ManualClock
from pantala.testing.platform import SETTINGS, FakeDns, TestPlatform, running

pytestmark = pytest.mark.anyio

EDGE = "192.0.2.1"
CERTIFICATES = "/v1/apps/web/certificates"


class World:
    """A platform whose public DNS is the test's."""

    def __init__(self, platform: TestPlatform, dns: FakeDns, clock: ManualClock) -> None:
        self.platform, self.dns, self.clock = platform, dns, clock

    async def post(self, path: str, body: dict[str, Any] | None = None, *, app: str = "web") -> httpx2.Response:
        url = f"/v1/apps/{app}/certificates/{path}"
        return await self.platform.http.post(url, json=body, headers=self.platform.auth)

    async def add(self, hostname: str, *, app: str = "web") -> httpx2.Response:
        return await self.post("acme", {"hostname": hostname}, app=app)

    async def get(self, path: str = "", **params: Any) -> httpx2.Response:
        url = f"{CERTIFICATES}/{path}" if path else CERTIFICATES
        return await self.platform.http.get(url, params=params, headers=self.platform.auth)

    async def delete(self, path: str) -> httpx2.Response:
        return await self.platform.http.delete(f"{CERTIFICATES}/{path}", headers=self.platform.auth)

    def served(self) -> set[str]:
        """Names of certificates that edges have."""
        rows = self.platform.rows.rows
        return {
            name
            for key, row in rows.items()
            if key.startswith("cert/") and not key.startswith(("cert/*.apps", "cert/api."))
            for name in row["names"]
        }


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    clock, dns = ManualClock(), FakeDns()
    settings = msgspec.structs.replace(SETTINGS, edge_addresses=(EDGE,))
    async with running(tmp_path, settings=settings, clock=clock, lookup=dns) as platform:
        await platform.create_app("web")
        yield World(platform, dns, clock)


def chain(clock: ManualClock, *names: str, begins: float = -1.0, ends: float = 90.0) -> tuple[str, str]:
    """Signed by itself, from and until so many days from now; with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a company")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(clock.now() + timedelta(days=begins))
        .not_valid_after(clock.now() + timedelta(days=ends))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem).decode(), private.decode()


# -- names -----------------------------------------------------------------------------------------------------------


async def test_an_added_name_leads_to_the_app_at_once(world: World) -> None:
    check("certificate_added", await world.add("WWW.Example.com."))
    assert world.platform.rows.rows["host/www.example.com"] == {"app": "web"}
    assert (await world.add("www.example.com")).status_code == 201
    assert (await world.add("*.example.com")).json()["hostname"] == "*.example.com"
    assert world.platform.rows.rows["host/*.example.com"] == {"app": "web"}
    listed = await world.get()
    check("certificate_list", listed)
    assert (await world.get("%2A.example.com")).json()["hostname"] == "*.example.com"
    assert (await world.delete("%2A.example.com")).status_code == 204
    assert "host/*.example.com" not in world.platform.rows.rows
    assert (await world.get("*.example.com")).status_code == 404


@pytest.mark.parametrize(
    ("name", "ascii_name"), [("bücher.example", "xn--bcher-kva.example"), ("Straße.example", "xn--strae-oqa.example")]
)
async def test_names_of_other_scripts(world: World, name: str, ascii_name: str) -> None:
    assert (await world.add(name)).json()["hostname"] == ascii_name
    assert f"host/{ascii_name}" in world.platform.rows.rows


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is required"),
        ("localhost", "full name"),
        ("192.0.2.1", "is an address"),
        ("a..example.com", "is no host name"),
        ("www.*.example.com", "whole first label"),
        ("x.internal", "not public"),
        ("-a.example.com", "inner dashes"),
        (f"{'a' * 64}.example.com", "is no host name"),
        (".".join(["a" * 60] * 5), "full name"),
    ],
)
async def test_what_is_no_name_is_refused(world: World, name: str, why: str) -> None:
    answer = await world.add(name)
    assert answer.status_code == 400
    assert why in answer.json()["error"]


async def test_names_of_others_and_of_the_platform_are_taken(world: World) -> None:
    await world.platform.create_app("blog")
    await world.add("www.example.com")
    taken = await world.add("www.example.com", app="blog")
    assert (taken.status_code, taken.json()["status"]) == (422, "name_taken")
    assert "belongs to the app web" in taken.json()["error"]
    for name in ("api.pantala.test", "pantala.test", "x.apps.pantala.test", "*.apps.pantala.test"):
        assert (await world.add(name)).status_code == 422
    eve = await world.platform.admin("eve@example.com", "evil")
    await world.platform.http.post("/v1/apps", json={"app_name": "hers", "org_slug": "evil"}, headers=eve)
    for name in ("www.example.com", "*.example.com"):
        answer = await world.platform.http.post("/v1/apps/hers/certificates/acme", json={"hostname": name}, headers=eve)
        assert answer.status_code == 422
        assert "web" not in answer.json()["error"].replace("www", "")
    assert (await world.add("shop.example.com", app="blog")).status_code == 201


async def test_an_app_that_is_deleted_gives_its_names_back(world: World) -> None:
    await world.add("www.example.com")
    await world.platform.http.delete("/v1/apps/web", headers=world.platform.auth)
    assert "host/www.example.com" not in world.platform.rows.rows
    await world.platform.create_app("next")
    assert (await world.add("www.example.com", app="next")).status_code == 201


async def test_pages_and_filter(world: World) -> None:
    for number in range(5):
        await world.add(f"n{number}.example.com")
    first = (await world.get(limit=2)).json()
    assert ([one["hostname"] for one in first["certificates"]], first["total_count"]) == (
        ["n0.example.com", "n1.example.com"],
        5,
    )
    second = (await world.get(limit=3, cursor=first["next_cursor"])).json()
    assert [one["hostname"] for one in second["certificates"]] == [f"n{n}.example.com" for n in (2, 3, 4)]
    assert (await world.get(filter="n3")).json()["total_count"] == 1
    assert (await world.get(limit=501)).status_code == 400
    assert (await world.get(cursor="%%%")).status_code == 400


# -- DNS -------------------------------------------------------------------------------------------------------------


async def test_a_check_names_the_record_that_is_missing(world: World) -> None:
    await world.add("www.example.com")
    missing = (await world.post("www.example.com/check")).json()
    assert [error["code"] for error in missing["validation_errors"]] == ["dns_missing", "no_authority"]
    assert missing["validation_errors"][0]["remediation"] == (
        "add www.example.com A 192.0.2.1; or, unless it is the top of its zone, "
        "www.example.com CNAME web.apps.pantala.test"
    )
    world.dns.says("www.example.com", a=["203.0.113.9"])
    elsewhere = (await world.post("www.example.com/check")).json()["validation_errors"][0]
    assert (elsewhere["code"], "203.0.113.9" in elsewhere["message"]) == ("dns_elsewhere", True)
    world.dns.says("www.example.com", a=[EDGE, "203.0.113.9"])
    both = (await world.post("www.example.com/check")).json()["validation_errors"][0]
    assert (both["code"], both["remediation"]) == ("dns_foreign_address", "remove www.example.com A 203.0.113.9")
    world.dns.says("www.example.com", a=[EDGE], soa="ns1.provider.example")
    right = await world.post("www.example.com/check")
    check("certificate_checked", right)
    assert right.json()["dns_provider"] == "provider.example"


async def test_a_wildcard_needs_its_delegation(world: World) -> None:
    await world.add("*.example.com")
    missing = (await world.post("%2A.example.com/check")).json()
    wanted = missing["dns_requirements"]["acme_challenge"]
    assert wanted["name"] == "_acme-challenge.example.com"
    assert wanted["target"].startswith("example.com.")
    assert wanted["target"].endswith(".acme.pantala.test")
    error = missing["validation_errors"][0]
    assert (error["code"], error["remediation"]) == (
        "acme_challenge_missing",
        f"add {wanted['name']} CNAME {wanted['target']}",
    )
    world.dns.says("*.example.com", acme_challenge_cname="old.example.net")
    assert (await world.post("*.example.com/check")).json()["validation_errors"][0][
        "code"
    ] == "acme_challenge_elsewhere"
    world.dns.says("*.example.com", acme_challenge_cname=wanted["target"])
    right = (await world.post("*.example.com/check")).json()
    assert (right["configured"], right["validation"]["dns_configured"]) == (True, True)


async def test_dns_is_looked_at_often_at_first_and_less_often_later(world: World) -> None:
    await world.add("www.example.com")
    looked: list[int] = []
    for passed_s in (0, 15, 3600, 15, 300):
        await world.clock.advance(passed_s)
        before = len(world.dns.asked)
        await world.platform.control.issuance.cycle()
        looked.append(len(world.dns.asked) - before)
    assert looked == [1, 1, 1, 0, 1]


# -- certificates of one's own ---------------------------------------------------------------------------------------


async def bring(world: World, hostname: str, fullchain: str, private_key: str) -> httpx2.Response:
    body = {"hostname": hostname, "fullchain": fullchain, "private_key": private_key}
    return await world.post("custom", body)


async def test_an_own_certificate_is_served_once_the_name_is_proved(world: World) -> None:
    fullchain, key = chain(world.clock, "www.example.com")
    brought = await bring(world, "www.example.com", fullchain, key)
    check("certificate_custom", brought)
    assert brought.json()["status"] == "pending_ownership"
    assert world.served() == set()
    proof = brought.json()["dns_requirements"]["ownership"]
    world.dns.says("www.example.com", ownership_txt=[f"org-else; {proof['app_value']}"])
    assert (await world.post("www.example.com/check")).json()["status"] == "active"
    assert world.served() == {"www.example.com"}
    edge = Opener(world.platform.agents["node-1"].opener.open(world.platform.rows.rows["edge/node-1"]["sealed_key"]))
    row = world.platform.rows.rows["cert/custom:www.example.com"]
    assert edge.open(row["sealed_key"]).decode() == key
    removed = await world.delete("www.example.com/custom")
    assert "no certificate now" in removed.json()["warning"]
    assert world.served() == set()


async def test_an_own_certificate_keeps_its_key_when_the_edge_key_changes(world: World) -> None:
    world.dns.says("www.example.com", a=[EDGE])
    await bring(world, "www.example.com", *chain(world.clock, "www.example.com"))
    await world.platform.control.issuance.cycle()
    assert world.served() == {"www.example.com"}
    control = world.platform.control
    await control.ticket_keys.ensure()
    before = world.platform.rows.rows["cert/custom:www.example.com"]["sealed_key"]
    await world.platform.add_agent("node-2")
    await control.hosts.withdraw("node-2", "removed", actor="ada")
    await control.certificates.ensure()
    await control.ticket_keys.ensure()
    edge = Opener(world.platform.agents["node-1"].opener.open(world.platform.rows.rows["edge/node-1"]["sealed_key"]))
    after = world.platform.rows.rows["cert/custom:www.example.com"]["sealed_key"]
    assert after != before
    assert edge.open(after).startswith(b"-----BEGIN PRIVATE KEY")
    assert len(edge.open(world.platform.rows.rows["ticket/1"]["sealed_key"])) == 32


async def test_bad_certificates_are_refused_without_repeating_the_key(world: World) -> None:
    fullchain, key = chain(world.clock, "www.example.com")
    other, other_key = chain(world.clock, "www.example.com")
    for given_chain, given_key, why in (
        ("nonsense", key, "fullchain: must be certificates in PEM"),
        (fullchain, "nonsense", "private_key: must be a private key"),
        (fullchain, other_key, "private_key: does not belong"),
        (other + fullchain, key, "comes first"),
        (fullchain + other, key, "did not sign certificate 1"),
        (*chain(world.clock, "mail.example.com"), "is for mail.example.com"),
        (*chain(world.clock, "www.example.com", begins=-9, ends=-1), "ended on"),
        (*chain(world.clock, "www.example.com", begins=1), "begins only on"),
    ):
        answer = await bring(world, "www.example.com", given_chain, given_key)
        assert answer.status_code == 400, why
        assert why in answer.json()["error"]
        assert given_key[40:80] not in answer.text or given_key == "nonsense"
    assert (await world.get()).json()["total_count"] == 0
    wild, wild_key = chain(world.clock, "*.example.com")
    assert (await bring(world, "www.example.com", wild, wild_key)).status_code == 201


# -- ticket keys -----------------------------------------------------------------------------------------------------


async def test_ticket_keys_change_every_eight_hours_and_are_told_ahead(world: World) -> None:
    keys = world.platform.control.ticket_keys
    assert await keys.ensure()
    assert not await keys.ensure()
    for _ in range(4 * 24):
        await world.clock.advance(1800)
        await keys.ensure()
        rows = [row for key, row in world.platform.rows.rows.items() if key.startswith("ticket/")]
        now_ms = world.platform.control.context.now_ms()
        assert any(row["not_before_ms"] <= now_ms for row in rows)
        assert all(row["not_after_ms"] >= now_ms for row in rows)
        newest = max(row["not_before_ms"] for row in rows if row["not_before_ms"] <= now_ms)
        assert now_ms - newest <= 8 * 3_600_000
        assert len(rows) <= 5
