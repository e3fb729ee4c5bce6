"""What an agent loads before it is asked for anything, and what it says of itself: there are many, and each pays
for all of it, and hears all of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pantala.agent.run import disk_shown

LOADED = """
import json, sys
from pantala.kit import lean
lean.load("structlog", without="rich")
import pantala.agent.main, pantala.agent.run, pantala.kit.bus_nats
from pantala.drivers.container import driver
from pantala.net import host
from pantala.images import open_store
from pathlib import Path
open_store(state_dir=Path("/nowhere"), registries={})
loaded = sorted({name.partition(".")[0] for name in sys.modules})
import rich
print(json.dumps(loaded))
"""


def test_an_agent_starts_without_what_others_need() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(done.stdout))
    assert {"structlog", "msgspec", "nats"} <= loaded
    assert not loaded & {"rich", "pygments", "httpx2", "sqlalchemy", "litestar", "click", "acme"}


@pytest.mark.parametrize(
    ("free_mib", "said_mib", "shown_mib"),
    [
        (5000, None, 4096),
        (5200, 4096, 4096),
        (4097, 4096, 4096),
        (4095, 4096, 3072),
        (4100, 3072, 3072),
        (6143, 4096, 4096),
        (6145, 4096, 6144),
        (900, None, 0),
        (10, 0, 0),
    ],
    ids=str,
)
def test_a_disk_that_fills_and_empties_a_little_is_no_news(free_mib: int, said_mib: int | None, shown_mib: int) -> None:
    assert disk_shown(free_mib, said_mib) == shown_mib
