"""Certificates from a real authority for a real edge: each challenge, a refusal, a renewal, and what a kill leaves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import anyio
import msgspec
import pytest
from pebble_rig import EDGE, Issuing, issuing
from sqlalchemy import Connection

from pantala.control.edge_keys import EdgeKeys
from pantala.control.issuance import Issuance
from pantala.control.name_records import NameRecords
from pantala.store import certificates, hostnames
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

NAME = "www.example.test"
NOBODY = "127.0.0.9"


def leftovers(world: Issuing) -> list[str]:
    """What edges would still answer to an authority."""
    return [key for key in world.platform.rows.rows if key.startswith(("acme/", "txt/", "cert/challenge:"))]


async def test_a_name_that_leads_here_gets_a_certificate_and_keeps_one(tmp_path: Path) -> None:
    async with issuing(tmp_path) as world:
        control = world.platform.control
        world.dns.says(NAME, "A", EDGE)
        await world.add("web", NAME)
        await control.issuance.cycle()
        shown = await world.show("web", NAME)
        assert (shown["status"], shown["validation_errors"]) == ("active", [])
        assert [one["source"] for one in shown["certificates"]] == ["fly"]
        assert shown["certificates"][0]["issued"][0]["type"] == "ecdsa"
        first = await world.serial(NAME)
        assert leftovers(world) == []
        await control.issuance.cycle()
        assert await world.serial(NAME) == first, "nothing is due"

        await grow_old(world, NAME)
        handshakes = asyncio.create_task(keep_shaking(world, NAME, until_other_than=first))
        await control.issuance.cycle()
        assert await asyncio.wait_for(handshakes, 30) > 0, "no handshake failed while it was renewed"


async def grow_old(world: Issuing, hostname: str) -> None:
    """As if two thirds of its life were over."""

    def age(connection: Connection) -> None:
        (record,) = certificates.list_certificates(connection, hostname=hostname)
        life_ms = record.not_after_ms - record.issued_at_ms
        older = msgspec.structs.replace(record, issued_at_ms=record.issued_at_ms - 2 * life_ms)
        certificates.put_certificate(connection, older)
        hostnames.update_hostname(connection, hostname, look_at_ms=1)

    await world.platform.db.write(age)


async def keep_shaking(world: Issuing, hostname: str, *, until_other_than: int) -> int:
    """Handshakes until another certificate is served; how many there were. Fails with the first that fails."""
    count = 0
    while await world.serial(hostname) == until_other_than:
        count += 1
        await anyio.sleep(0.02)
    return count


async def test_the_edge_proves_a_name_within_tls_when_port_80_did_not_do(tmp_path: Path) -> None:
    async with issuing(tmp_path) as world:
        world.dns.says(NAME, "A", EDGE)
        await world.add("web", NAME)
        await world.platform.db.write(lambda c: hostnames.update_hostname(c, NAME, failures=1, look_at_ms=1))
        shown: set[str] = set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.platform.control.issuance.cycle)

            async def active() -> bool:
                shown.update(key.partition("/")[0] + "/" + key.partition("/")[2][:10] for key in leftovers(world))
                return (await world.show("web", NAME))["status"] == "active"

            await until(active, bool, within_s=30, every_s=0.01)
        assert shown == {"cert/challenge:"}, "by nothing else"
        assert "Pebble" in await world.issuer(NAME)
        assert leftovers(world) == []


async def test_a_wildcard_by_delegation_and_the_edge_answers_for_it(tmp_path: Path) -> None:
    async with issuing(tmp_path) as world:
        control = world.platform.control
        record = (await world.add("web", "*.example.test"))["dns_requirements"]["acme_challenge"]
        await control.issuance.cycle()
        missing = (await world.show("web", "*.example.test"))["validation_errors"][0]
        assert missing["remediation"] == f"add {record['name']} CNAME {record['target']}"
        world.dns.says(record["name"], "CNAME", record["target"] + ".")
        checked = await world.check("web", "*.example.test")
        assert checked["validation"]["dns_configured"] is True
        await control.issuance.cycle()
        assert (await world.show("web", "*.example.test"))["status"] == "active"
        assert "Pebble" in await world.issuer("anything.example.test")
        assert leftovers(world) == []
        assert (await world.rig.snapshot())["set_aside"] == []


async def test_the_reconciler_finds_the_record_by_itself_and_edges_have_the_certificate_at_once(tmp_path: Path) -> None:
    async with issuing(tmp_path) as world:
        await world.add("web", NAME)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.platform.control.issuance.run)
            world.dns.says(NAME, "A", EDGE)
            await world.check("web", NAME)

            async def active() -> bool:
                return (await world.show("web", NAME))["status"] == "active"

            await until(active, bool, within_s=60, every_s=0.05)
            stored = time.monotonic()

            async def served() -> bool:
                try:
                    return bool(await world.serial(NAME))
                except OSError:
                    return False

            await until(served, bool, within_s=15, every_s=0.01)
            print(f"on the edge {time.monotonic() - stored:.3f} s after it was stored")
            tasks.cancel_scope.cancel()


async def test_a_refusal_is_kept_shown_and_not_repeated_at_once(tmp_path: Path) -> None:
    async with issuing(tmp_path, edge_addresses=(EDGE, NOBODY)) as world:
        control = world.platform.control
        world.dns.says(NAME, "A", NOBODY)
        await world.add("web", NAME)
        await control.issuance.cycle()
        shown = await world.show("web", NAME)
        assert shown["status"] == "pending_validation"
        error = shown["validation_errors"][0]
        assert error["message"]
        assert error["remediation"]
        orders = world.pebble.orders()
        world.dns.says(NAME, "A", EDGE)
        await world.check("web", NAME)
        await control.issuance.cycle()
        assert world.pebble.orders() == orders, "an authority is not asked again within minutes"
        assert leftovers(world) == []

        for _ in range(3):  # each kind of challenge has its turn
            await world.platform.db.write(lambda c: hostnames.update_hostname(c, NAME, look_at_ms=1))
            await control.issuance.cycle()
            if (await world.show("web", NAME))["status"] == "active":
                return
        pytest.fail("the name leads here, and no challenge succeeded")


async def test_a_name_is_removed_in_the_middle_of_its_order(tmp_path: Path) -> None:
    async with issuing(tmp_path) as world:
        world.dns.says(NAME, "A", EDGE)
        await world.add("web", NAME)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.platform.control.issuance.cycle)

            async def answers() -> bool:
                return bool(leftovers(world))

            await until(answers, bool, within_s=30, every_s=0.01)
            await world.remove("web", NAME)
        assert leftovers(world) == []
        assert [key for key in world.platform.rows.rows if NAME in key] == []


async def test_an_order_that_is_killed_anywhere_goes_on(tmp_path: Path) -> None:
    """Life after life is cut off a little later than the last; what counts is that the end is always the same."""
    async with issuing(tmp_path) as world:
        control = world.platform.control
        world.dns.says(NAME, "A", EDGE)
        await world.add("web", NAME)
        lives = 0
        while (await world.show("web", NAME))["status"] != "active":
            lives += 1
            assert lives < 60
            life = Issuance(
                control.context,
                control.publication,
                EdgeKeys(control.context),
                world.lookup,
                NameRecords(control.context),
            )
            await world.platform.db.write(lambda c: hostnames.update_hostname(c, NAME, look_at_ms=1))
            with anyio.move_on_after(0.05 * lives):
                await life.advance(NAME)
            await control.publication.publish_all()  # what each life of the process begins with
        assert "Pebble" in await world.issuer(NAME)
        assert leftovers(world) == []
        assert await world.platform.db.read(lambda c: certificates.find_order(c, NAME)) is None
        print(f"{lives} lives, {world.pebble.orders()} orders")
