"""As many names as one app may have, on three edges: each served, changes at once, control idle in between.
`SOAK_NAMES` lessens them for a look.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from figures import tell
from names_rig import world

from pantala.control.hostnames import NAMES_MAX
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio

COUNT = int(os.environ.get("SOAK_NAMES", str(NAMES_MAX)))
SHAKEN = 5_000
CHANGED = 20


async def test_as_many_names_as_an_app_may_have(tmp_path: Path) -> None:
    names = [f"n{number}.example.test" for number in range(COUNT)]
    async with world(tmp_path, edges=3) as here:
        begun = time.monotonic()
        await here.store(names)
        for edge in here.edges:
            await edge.has(COUNT)
        tell(f"{COUNT} names stored and on three edges in {time.monotonic() - begun:.0f} s")
        for name in random.choices(names, k=SHAKEN):
            await random.choice(here.edges).serial(name, here.trusted)
        tell(f"memory of the proxy with {COUNT} certificates {here.edges[0].memory_mib():.0f} MiB")

        took: list[float] = []
        for name in random.sample(names, CHANGED):
            before = await here.edges[0].serial(name, here.trusted)
            begun = time.monotonic()
            await here.import_one(name)

            async def shown(name: str = name) -> list[int]:
                return [await edge.serial(name, here.trusted) for edge in here.edges]

            def other(found: list[int], before: int = before) -> bool:
                return before not in found

            await until(shown, other, within_s=30, every_s=0.01)
            took.append(time.monotonic() - begun)
        tell(f"a change on three edges after {sorted(took)[CHANGED // 2]:.2f} s, at most {max(took):.2f} s")

        begun = time.process_time()
        await here.platform.control.publication.publish_all()
        tell(f"CPU of an idle minute of control {time.process_time() - begun:.2f} s")
