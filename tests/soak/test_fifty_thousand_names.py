"""As many names as one app may have, on three edges: each served, changes at once, control idle in between."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from figures import tell
from names_rig import world

from pantala.control.hostnames import NAMES_MAX
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

SHAKEN = 5_000
CHANGED = 20


async def test_as_many_names_as_an_app_may_have(tmp_path: Path) -> None:
    names = [f"n{number}.example.test" for number in range(NAMES_MAX)]
    async with world(tmp_path, edges=3) as here:
        begun = time.monotonic()
        await here.store(names)
        for edge in here.edges:
            await edge.has(NAMES_MAX)
        tell("names_stored_s", round(time.monotonic() - begun, 1))
        for name in random.choices(names, k=SHAKEN):
            await random.choice(here.edges).serial(name, here.trusted)
        tell("names_proxy_mib", round(here.edges[0].memory_mib()))

        took: list[float] = []
        for name in random.sample(names, CHANGED):
            before = await here.edges[0].serial(name, here.trusted)
            begun = time.monotonic()
            await here.import_one(name)

            async def shown(name: str = name) -> list[int]:
                return [await edge.serial(name, here.trusted) for edge in here.edges]

            await until(shown, lambda found, before=before: before not in found, within_s=30, every_s=0.01)
            took.append(time.monotonic() - begun)
        tell("names_change_s", round(sorted(took)[CHANGED // 2], 2))

        begun = time.process_time()
        await here.platform.control.publication.publish_all()
        tell("names_idle_minute_cpu_s", round(time.process_time() - begun, 2))
