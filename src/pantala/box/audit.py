"""Finds what belongs to nobody: processes, namespaces, links, mounts, control groups and firewall tables of a box."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pantala.box.layout import CGROUP, PREFIX, RUN_NAME, TABLE, UPLINK, Box
from pantala.box.network import RUN_NETNS, leftover_namespaces

CGROUPS = Path("/sys/fs/cgroup")


def processes_in_box() -> list[int]:
    """Pids whose network namespace is one of a box's, and pids of machines (their control group says so)."""
    namespaces = {(RUN_NETNS / name).stat().st_ino for name in leftover_namespaces()}
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                inode = (entry / "ns" / "net").stat().st_ino
                groups = (entry / "cgroup").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if inode in namespaces or f":/{CGROUP}/" in groups:
                found.append(int(entry.name))
    return found


def leaks(box: Box | None) -> list[str]:
    """Everything with a box's name although no box runs: one line each, with what it is."""
    found = [f"process {pid} ({command_of(pid)})" for pid in processes_in_box()]
    found += [f"network namespace {name}" for name in leftover_namespaces()]
    links = _lines(["ip", "-o", "link", "show"])
    found += [f"link {UPLINK}" for line in links if f" {UPLINK}@" in line or f" {UPLINK}:" in line]
    found += [f"firewall table ip {TABLE}" for line in _lines(["nft", "list", "tables"]) if line == f"table ip {TABLE}"]
    found += [f"mount {path}" for path in mounts()]
    found += [f"control group {path}" for path in control_groups()]
    if box is not None and box.run_dir.exists():
        found.append(f"folder {box.run_dir}")
    return found


def control_groups() -> list[Path]:
    """Of machines, hosts and the platform, the deepest first; in every v1 hierarchy or the one of v2."""
    roots = [*CGROUPS.glob(f"*/{CGROUP}"), *CGROUPS.glob(CGROUP)]
    found = [path for root in roots for path in (root, *root.rglob("*")) if path.is_dir()]
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:80]
    except (FileNotFoundError, ProcessLookupError):
        return "ended"


def mounts() -> list[str]:
    """Mount points of this namespace below a folder that bears our name."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted(point for point in points if f"/{RUN_NAME}/" in point or f"/run/netns/{PREFIX}" in point)


def _lines(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.splitlines()
