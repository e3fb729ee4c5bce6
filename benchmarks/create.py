"""Machines made by the API from an image that the host has: one after the other until each has started, two hundred at
once by eight callers, then five hundred asleep: what they cost a host that nobody asks anything of.

The sleeping ones are made and never launched: each is prepared, so that a request would start it by one message. Their
cost is the CPU time of the host's agent, proxy and bus over a minute, and the memory that is gone from the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.apps import deploy_busybox
from benchmarks.figures import Figure, figure, percentile
from benchmarks.machines import Machines
from pantala.testing.box import BoxRig

APP = "bench-create"
STARTED = 50
AT_ONCE = 200
ASLEEP = 500
CALLERS = 8
LISTS = 50
QUIET_BELOW = 0.05
QUIET_WITHIN_S = 240.0
LOOK_S = 5.0
MEASURED_S = 60.0
HOST = ("agent-", "proxy-", "nats-")


def measure(box: BoxRig) -> list[Figure]:
    deploy_busybox(box, APP)
    machines = Machines(box, APP)
    config = machines.list()[0]["config"]
    return [*_one_by_one(machines, config), *_at_once(machines, config), *_asleep(box, machines, config)]


def _one_by_one(machines: Machines, config: dict[str, Any]) -> list[Figure]:
    created: list[float] = []
    started: list[float] = []
    for _ in range(STARTED):
        begun = time.monotonic()
        machine = machines.create(config)
        created.append((time.monotonic() - begun) * 1000)
        machines.wait(machine["id"], "started")
        started.append((time.monotonic() - begun) * 1000)
        machines.destroy(machine["id"])
    meaning = "a machine asked for, of a cached image, until it has started; beside it: until it is created"
    return [
        figure(f"create_started_p{percent}_ms", percentile(started, percent), "ms", n=STARTED,
               baseline=percentile(created, percent), meaning=meaning)
        for percent in (50, 95)
    ]  # fmt: skip


def _at_once(machines: Machines, config: dict[str, Any]) -> list[Figure]:
    before = len(machines.list())
    begun = time.monotonic()
    _create(machines, config, AT_ONCE)
    took_s = time.monotonic() - begun
    listed: list[float] = []
    for _ in range(LISTS):
        begun = time.monotonic()
        found = machines.list()
        listed.append((time.monotonic() - begun) * 1000)
        if len(found) != before + AT_ONCE:
            raise AssertionError(f"{len(found)} machines are listed, not {before + AT_ONCE}")
    return [
        figure("create_200_s", took_s, "s", n=AT_ONCE, meaning=f"200 machines created by {CALLERS} callers, one host"),
        *(
            figure(f"list_200_p{percent}_ms", percentile(listed, percent), "ms", n=LISTS,
                   meaning="them listed, while the host prepares them")
            for percent in (50, 99)
        ),
    ]  # fmt: skip


def _asleep(box: BoxRig, machines: Machines, config: dict[str, Any]) -> list[Figure]:
    pids = [process["pid"] for name, process in box.processes().items() if name.startswith(HOST)]
    _await_quiet(pids)
    free_mib = _available_mib()
    there = len(machines.list())
    _create(machines, config, ASLEEP - AT_ONCE)
    _await_quiet(pids)
    each_mib = (free_mib - _available_mib()) / (len(machines.list()) - there)
    return [
        figure("asleep_500_core_share", _core_share(pids, MEASURED_S), "cores", n=ASLEEP,
               meaning="agent, proxy and bus of a host with 500 machines asleep and prepared, over a minute"),
        figure("asleep_memory_mib", each_mib, "MiB", n=ASLEEP - AT_ONCE,
               meaning="memory for each machine asleep and prepared, all of it, kernel and agent included"),
    ]  # fmt: skip


def _create(machines: Machines, config: dict[str, Any], number: int) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(partial(machines.create, skip_launch=True), [config] * number))


def _await_quiet(pids: Sequence[int]) -> None:
    """Until the host has prepared what was made."""
    deadline = time.monotonic() + QUIET_WITHIN_S
    while (share := _core_share(pids, LOOK_S)) > QUIET_BELOW:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the host still uses {share:.2f} cores after {QUIET_WITHIN_S:g} s")


def _core_share(pids: Sequence[int], seconds: float) -> float:
    before, begun = _cpu_s(pids), time.monotonic()
    time.sleep(seconds)
    return (_cpu_s(pids) - before) / (time.monotonic() - begun)


def _cpu_s(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _available_mib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the kernel does not say how much memory is available")
