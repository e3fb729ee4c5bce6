"""A box with 35 regions, distances between them as on Earth: how long its start takes, what it holds in memory, what it
costs when nothing happens, and whether a client at each of the 35 places is served by its own region.

Brings boxes of its own: the start is measured several times, each from nothing; the last box serves.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, figure
from pantala.box.up import memory_kib
from pantala.host.supervisor import read_status
from pantala.testing.box import BASES, BoxRig

REGIONS = (
    "ams,arn,atl,bog,bom,bos,cdg,den,dfw,ewr,eze,fra,gdl,gig,gru,hkg,iad,jnb,lax,lhr,mad,mia,nrt,ord,otp,phx,qro,scl,sea,"
    "sin,sjc,syd,waw,yul,yyz"
).split(",")
STARTS = 3
SETTLED_AFTER_S = 60.0
IDLE_FOR_S = 60.0
APP = "bench-regions"
CHANGE_WITHIN_S = 900.0

# Every machine answers with the region that it is in.
DOCKERFILE = """\
FROM busybox:1.35
EXPOSE 8080
CMD ["/bin/sh", "-c", "mkdir -p /www && echo $FLY_REGION > /www/region && exec /bin/busybox httpd -f -p 8080 -h /www"]
"""
CONFIG = f"""\
app = "{APP}"
primary_region = "{REGIONS[0]}"

[http_service]
internal_port = 8080
force_https = true
auto_stop_machines = "off"
"""


def measure() -> list[Figure]:
    starts: list[float] = []
    memory: list[float] = []
    later: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="pantala-bench-") as work:
        for number in range(1, STARTS + 1):
            box = BoxRig(Path(work), regions=REGIONS)
            box.down("--purge")  # what a killed run left
            try:
                begun = time.monotonic()
                box.up("--regions", ",".join(REGIONS), "--distances")
                starts.append(time.monotonic() - begun)
                memory.append(_memory_mb(box))
                sys.stderr.write(f"    start {number}: {starts[-1]:.1f} s, {memory[-1]:.0f} MB\n")
                if number == STARTS:
                    later = _measure_running(box)
            finally:
                box.down("--purge")
    worst = figure("regions.start.worst", max(starts), "s", n=STARTS, meaning="the slowest of these starts")
    return [
        figure("regions.start.p50", statistics.median(starts), "s", n=STARTS,
               meaning=f"`pantala up` with {len(REGIONS)} regions and distances, from nothing to its end"),
        worst,
        figure("regions.memory", statistics.median(memory), "MB", n=STARTS,
               meaning="all processes of the box then, shared pages counted once"),
        *later,
    ]  # fmt: skip


def _measure_running(box: BoxRig) -> list[Figure]:
    time.sleep(SETTLED_AFTER_S)
    before, begun = _cpu_s(box), time.monotonic()
    time.sleep(IDLE_FOR_S)
    cores = (_cpu_s(box) - before) / (time.monotonic() - begun)
    settled = _memory_mb(box)

    box.pantala("images", "bootstrap", *BASES, "--state", str(box.state), timeout_s=400)
    folder = box.work / APP
    folder.mkdir()
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "fly.toml").write_text(CONFIG)
    box.pantala("apps", "create", APP)
    box.pantala("deploy", "--no-ha", "--yes", cwd=folder, timeout_s=300)
    begun = time.monotonic()
    box.pantala("scale", "count", str(len(REGIONS)), "--region", ",".join(REGIONS), "--yes", cwd=folder,
                timeout_s=CHANGE_WITHIN_S)  # fmt: skip
    scaled_s = time.monotonic() - begun
    url = f"https://{APP}.apps.pantala.test/region"
    own = [region for region in REGIONS if box.curl(url, region=region).strip() == region]
    if missed := sorted(set(REGIONS) - set(own)):
        sys.stderr.write(f"    not answered by their own region: {', '.join(missed)}\n")
    return [
        figure("regions.memory_settled", settled, "MB", n=1,
               meaning=f"the same {SETTLED_AFTER_S + IDLE_FOR_S:g} s later"),
        figure("regions.idle_cores", cores, "cores", n=1,
               meaning=f"all processes of the box over {IDLE_FOR_S:g} s in which nothing is asked of it"),
        figure("regions.scale", scaled_s, "s", n=1, meaning="an app from one machine to one in each region"),
        figure("regions.served_nearby", len(own), "regions", n=len(REGIONS),
               meaning="places whose client was answered by a machine of its own region"),
    ]  # fmt: skip


def _pids(box: BoxRig) -> list[int]:
    status = read_status(box.state)
    assert status is not None
    return [status.supervisor, *(process.pid for process in status.processes)]


def _memory_mb(box: BoxRig) -> float:
    return sum(map(memory_kib, _pids(box))) * 1024 / 1e6


def _cpu_s(box: BoxRig) -> float:
    """Of the daemons and of what they started and waited for."""
    ticks = 0
    for pid in _pids(box):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
