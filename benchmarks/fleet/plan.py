"""Who has what in the fleet of `make bench NAME=api`; the processes that make it share this plan.

Real: nats-server, the server process (API, control, SQLite file on disk, catalogue), the agent process of `REAL_NODE`
(journal, catalogue; its driver, network and images are in memory). The other hosts are one process (`crowd.py`): each
signs and sends its own catalogue rows and beats and answers node calls, but keeps its machines in memory only. The
registry is in memory, in the server's process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

REGIONS = ("iad", "ord", "sjc", "lhr", "ams", "fra", "nrt", "sin", "syd")
REAL_REGION = "bnc"
REAL_NODE = "bnc-1"
HOSTS, MACHINES = 300, 100_000
LOCAL_APPS, LOCAL_EACH = 50, 20
"""Apps whose machines are all on the host with the real agent."""
WIDE_APP, WIDE = "wide", 100
"""The app that is spread as far as placement spreads: a machine on each of so many hosts."""
EACH = 20
"""Machines of any other app, each on another host."""
ORGS = 20
REGISTRY = "registry.pantala.test"


class Place(msgspec.Struct, frozen=True):
    app: str
    node: str
    region: str


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes are told; `seeds` are the hosts' signing keys in hex."""

    folder: Path
    bus: str
    seeds: dict[str, str]
    control_key: str = ""


def nodes() -> list[tuple[str, str]]:
    """Id and region of each host, the real one first."""
    crowd = [
        (f"{REGIONS[i % len(REGIONS)]}-{i // len(REGIONS) + 1}", REGIONS[i % len(REGIONS)]) for i in range(HOSTS - 1)
    ]
    return [(REAL_NODE, REAL_REGION), *crowd]


def org_of(app: str) -> str:
    """Everything that is asked for belongs to `acme`."""
    kind, _, number = app.partition("-")
    return "acme" if kind != "app" or int(number) % ORGS == 0 else f"org-{int(number) % ORGS}"


def local_apps() -> list[str]:
    return [f"local-{number}" for number in range(LOCAL_APPS)]


def places() -> Iterator[Place]:
    for app in local_apps():
        for _ in range(LOCAL_EACH):
            yield Place(app, REAL_NODE, REAL_REGION)
    crowd = nodes()[1:]
    for node, region in crowd[:WIDE]:
        yield Place(WIDE_APP, node, region)
    for number in range(MACHINES - LOCAL_APPS * LOCAL_EACH - WIDE):
        node, region = crowd[number % len(crowd)]
        yield Place(f"app-{number // EACH}", node, region)


def typical_apps() -> list[str]:
    """Apps of `acme` with `EACH` machines on as many hosts."""
    found = (f"app-{number}" for number in range((MACHINES - LOCAL_APPS * LOCAL_EACH - WIDE) // EACH))
    return [app for app in found if org_of(app) == "acme"]
