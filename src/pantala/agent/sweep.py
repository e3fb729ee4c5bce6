"""Ends and finds machines without an agent: `python -m pantala.agent.sweep --settings FILE [--strangers | --leave]`.

Without a flag everything that driver and network own on this host is removed but roots that are to be kept; the
journal stays, so an agent started later makes them anew. With `--leave` the host's firewall, its addresses and those
roots go as well. With `--strangers` nothing is removed: it prints, as a JSON list, what they own and the journal does
not know.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import anyio

from pantala.agent import escape, parts
from pantala.agent.settings import AgentSettings, load
from pantala.journal import Journal
from pantala.kit.clock import SystemClock

DEADLINE_S, FOR_EACH_S = 90.0, 0.5
NETWORKS_AT_ONCE = 8


async def sweep(settings: AgentSettings, *, leave: bool = False) -> None:
    clock = SystemClock()
    driver, network = parts.driver(settings, clock), parts.network(settings, clock)
    machines, networks = await driver.list(), await network.list()
    limiter = anyio.CapacityLimiter(NETWORKS_AT_ONCE)

    async def disconnect(machine_id: str) -> None:
        async with limiter:
            await network.remove(machine_id)

    with anyio.fail_after(DEADLINE_S + FOR_EACH_S * len({*machines, *networks})):
        async with anyio.create_task_group() as tasks:
            for machine_id in machines:
                tasks.start_soon(driver.destroy if leave else driver.clear, machine_id)
        async with anyio.create_task_group() as tasks:
            for machine_id in networks:
                tasks.start_soon(disconnect, machine_id)
    escape.remove_traps(settings.state_dir)
    if (links := parts.peer_links(settings)) is not None:
        await links.remove()
    if leave:
        await network.teardown()


async def strangers(settings: AgentSettings) -> list[str]:
    """Ids that own something here and are no machine of the journal's."""
    clock = SystemClock()
    driver, network = parts.driver(settings, clock), parts.network(settings, clock)
    async with Journal.open(settings.state_dir / "journal.db") as journal:
        known = {record.id for record in await journal.live()} | escape.running(settings.state_dir)
    owned = [f"machine {name}" for name in await driver.list() if name not in known]
    return owned + [f"network of {name}" for name in await network.list() if name not in known]


async def _main(settings: AgentSettings, *, only_list: bool, leave: bool) -> None:
    if only_list:
        with anyio.fail_after(DEADLINE_S):
            sys.stdout.write(json.dumps(await strangers(settings)) + "\n")
    else:
        await sweep(settings, leave=leave)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pantala.agent.sweep", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--strangers", action="store_true")
    parser.add_argument("--leave", action="store_true")
    options = parser.parse_args(arguments)
    anyio.run(lambda: _main(load(options.settings), only_list=options.strangers, leave=options.leave))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
