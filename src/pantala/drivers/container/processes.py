"""What the kernel says of a machine's processes, read from the host: nobody inside has to answer.

Numbers are those inside the machine. A process that ends while it is read is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from pantala.domain.runtime import ProcessInfo

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_COMMAND_MAX = 4096


def read(pids: Iterable[int]) -> list[ProcessInfo]:
    """`pids` as the host numbers them; the answer in the order of the numbers inside."""
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    found = [info for pid in pids if (info := _one(Path("/proc") / str(pid), now_s)) is not None]
    return sorted(found, key=lambda info: info.pid)


def _one(folder: Path, now_s: float) -> ProcessInfo | None:
    try:
        inside = _inside((folder / "status").read_text())
        stat = (folder / "stat").read_text()
        command = (folder / "cmdline").read_bytes()[:_COMMAND_MAX]
    except OSError:
        return None
    # After the name, which may hold anything: state ppid pgrp … utime stime … starttime … rss.
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    if inside is None or fields[0] == "Z":
        return None
    started_s = int(fields[19]) / _TICKS_PER_S
    return ProcessInfo(
        pid=inside,
        command=command.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace") or f"[{name}]",
        directory=_link(folder / "cwd"),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        runs_s=max(now_s - started_s, 0.0),
        rss_bytes=max(int(fields[21]), 0) * _PAGE_BYTES,
        sockets=_sockets(folder / "fd"),
    )


def _inside(status: str) -> int | None:
    """The number in the innermost pid namespace."""
    numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    return int(numbers[-1]) if numbers else None


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _sockets(folder: Path) -> frozenset[int]:
    found: set[int] = set()
    try:
        for entry in os.scandir(folder):
            target = _link(Path(entry.path))
            if target.startswith("socket:["):
                found.add(int(target[len("socket:[") : -1]))
    except OSError:
        pass
    return frozenset(found)
