"""What a machine is told of itself in place of the host: the number of its CPUs and its memory.

What never changes is written here; what is counted is served by PID 1 (`crates/pantala-init/src/facts/mod.rs`), which
is given the files of the machine's groups. `docs/contributing/decisions/0005-facts-by-pid-1.md` says why.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pantala.domain.runtime import Limits

MIB = 1024 * 1024
ONLINE = "/sys/devices/system/cpu/online"
"""Only this one of sysfs: programs size tables by `possible`, and use them by the number of the CPU they run on."""
SERVED = ("meminfo", "swaps", "stat", "uptime", "loadavg")
"""Of `/proc`, by PID 1."""
WRITTEN = {"cpuinfo": "/proc/cpuinfo", "online": ONLINE}
"""What is written once and where the machine has it."""


def plan(limits: Limits, *, counters: Mapping[str, Path], unified: bool, beside_mib: int) -> dict[str, Any]:
    return {
        "cpus": shown_cpus(limits),
        "unified": unified,
        "memory": limits.memory_mib * MIB,
        "beside": beside_mib * MIB,
        "counters": {name: str(path) for name, path in counters.items()},
    }


def files(limits: Limits) -> list[tuple[str, str]]:
    """What is written once, by the names of `WRITTEN`."""
    count = shown_cpus(limits)
    return [("cpuinfo", cpuinfo(_host_cpuinfo(), count)), ("online", f"0-{count - 1}\n" if count > 1 else "0\n")]


def shown_cpus(limits: Limits) -> int:
    """No more than can run at once: a machine with more CPUs than its host has is told of the host's."""
    return max(1, min(limits.cpus, len(os.sched_getaffinity(0))))


def cpuinfo(host: str, count: int) -> str:
    """The host's first `count` processors (from the first again where it has fewer), numbered as if they were all of
    one package. What is not of a processor stays."""
    sections = [section for section in host.strip().split("\n\n") if section.strip()]
    processors = [section for section in sections if section.startswith("processor")]
    others = [section for section in sections if not section.startswith("processor")]
    shown = [_numbered(processors[n % len(processors)], n, count) for n in range(count)] if processors else []
    return "".join(f"{section}\n\n" for section in (*shown, *others))


def _numbered(section: str, number: int, count: int) -> str:
    said = {
        "processor": number,
        "physical id": 0,
        "core id": number,
        "apicid": number,
        "initial apicid": number,
        "siblings": count,
        "cpu cores": count,
    }
    lines = []
    for line in section.splitlines():
        name, colon, _ = line.partition(":")
        lines.append(f"{name}: {said[name.strip()]}" if colon and name.strip() in said else line)
    return "\n".join(lines)


@functools.cache
def _host_cpuinfo() -> str:
    """Read once: the kernel asks every CPU for its frequency before it answers."""
    return Path("/proc/cpuinfo").read_text()
