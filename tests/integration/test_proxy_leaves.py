"""A proxy that is told to end says so first, and serves on until whoever announces its edge can have heard."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from proxy_rig import WITHIN_S, app_rows, machine_row, running, service_row

from pantala.testing.poll import until
from pantala.testing.ports import free_port

pytestmark = pytest.mark.anyio


async def test_a_leaving_proxy_says_so_while_it_still_accepts(tmp_path: Path) -> None:
    async with running(tmp_path, lame_duck_ms=3_000) as rig:
        port = free_port()
        await rig.backend("one", "127.0.1.1", port)
        await rig.agent.rows(
            *app_rows("one", "one.apps.test"),
            service_row(rig.ports, "one", port),
            machine_row("one", "m-one", "127.0.1.1"),
        )
        assert await rig.admin("/healthz") == "ok\n"
        assert rig.process is not None
        rig.process.send_signal(signal.SIGTERM)
        await until(lambda: rig.admin("/healthz"), lambda said: said == "leaving\n", within_s=WITHIN_S, every_s=0.01)
        answered = await rig.get("one.apps.test")
        assert answered.text == "one"
        assert answered.headers["connection"] == "close"
        assert await rig.stop() == 0
