"""Certificates while the control plane is off: edges serve what they have past the moment of renewal, and it is renewed
as soon as control is back. And names that a box's own authority signs."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import anyio
import pytest
from cryptography import x509
from pebble_rig import EDGE, controlled, outside

from pantala.kit.clock import SystemClock
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

NAME = "www.example.test"
LIVES = timedelta(hours=6)
LONG_ENOUGH = timedelta(hours=5)
"""Past two thirds of that life, and before its end."""


class Ahead(SystemClock):
    """The time of day, so much later; what lasts, lasts as ever."""

    def __init__(self, by: timedelta) -> None:
        self._by = by

    def now(self) -> datetime:
        return super().now() + self._by


async def test_edges_serve_while_control_is_off_and_it_renews_when_it_is_back(tmp_path: Path) -> None:
    async with outside(tmp_path, lives=LIVES) as around:
        around.dns.says(NAME, "A", EDGE)
        async with controlled(around) as world:
            await world.platform.create_app("web")
            await world.add("web", NAME)
            await world.platform.control.issuance.cycle()
            first = await world.serial(NAME)

        # Nothing of control is there now; the edge's own process starts anew, too.
        assert await world.serial(NAME) == first
        await around.rig.stop()
        await around.rig.start()
        assert await world.serial(NAME) == first

        async with (
            controlled(around, clock=Ahead(LONG_ENOUGH), again=True) as world,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(world.platform.control.issuance.run)

            async def renewed() -> bool:
                return await world.serial(NAME) != first

            await until(renewed, bool, within_s=30, every_s=0.05)
            assert (await world.show("web", NAME))["status"] == "active"
            tasks.cancel_scope.cancel()


async def test_a_box_signs_for_names_of_its_users_itself(tmp_path: Path) -> None:
    async with outside(tmp_path) as around, controlled(around, acme_directory="", sign_names=True) as world:
        control = world.platform.control
        await world.platform.create_app("web")
        for name, shown in ((NAME, NAME), ("*.example.test", "any.example.test")):
            added = await world.add("web", name)
            assert (added["status"], added["validation_errors"]) == ("active", [])
            authority = (tmp_path / "control" / "names-ca" / "ca.pem").read_text()
            assert "Pantala box authority" in await world.issuer(shown, trusted=authority)
        own = x509.load_pem_x509_certificate(control.authority.certificate_path.read_bytes())
        other = x509.load_pem_x509_certificate(authority.encode())
        assert own.public_key() != other.public_key(), (
            "who trusts the platform's authority trusts it with no other name"
        )
        checked = await world.check("web", NAME)
        assert checked["status"] == "active"
        assert checked["validation_errors"], "what DNS lacks is told all the same"
        assert world.pebble.orders() == 0
