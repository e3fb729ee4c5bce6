"""Resident memory of an idle box: each daemon, and the sum of a host that runs machines, without and with control."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.apps import deploy_busybox
from benchmarks.figures import Figure, figure
from pantala.testing.box import BoxRig

IDLE_FOR_S = 10.0
BESIDE = ("registry", "buildkitd")
"""Not part of a host's own share: they run where the operator puts them."""


def measure(box: BoxRig) -> list[Figure]:
    deploy_busybox(box, "bench-memory")
    time.sleep(IDLE_FOR_S)
    resident = {name: _resident_mb(process["pid"]) for name, process in box.processes().items()}
    worker = sum(mb for name, mb in resident.items() if name.startswith(("agent-", "proxy-", "nats-")))
    figures = [
        figure("memory.worker_host", worker, "MB", n=1, meaning="agent, proxy and bus of a host with one machine"),
        figure("memory.control_host", worker + resident["server"], "MB", n=1, meaning="the same and the control plane"),
    ]
    for name, mb in resident.items():
        beside = " (beside the hosts)" if name in BESIDE else ""
        figures.append(figure(f"memory.{name}", mb, "MB", n=1, meaning=f"resident set of {name}{beside}"))
    return figures


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(f"process {pid} shows no resident set")
