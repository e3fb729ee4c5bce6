"""`h2load` (of Debian's nghttp2-client) asks proxies; what each costs meanwhile is taken from the kernel's count."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec

from benchmarks.peers import CLIENT_CORE, HTTP, HTTPS, NAME, Peer, find

WITHIN_S = 120


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of each proxy: `requests` over `clients` connections, `streams` at once on each."""

    name: str
    meaning: str
    requests: int
    clients: int
    tls: bool = False
    http2: bool = False
    streams: int = 1
    path: str = "/"
    upload: bool = False
    rate: int = 0
    """a second, over all clients; 0: as fast as it goes"""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """CPU of the proxy for a request, and how long each took when the case has a rate. The first of each client, which
    opens its connection, is left out."""

    cpu_us: float
    took_us: list[int] = []


def run(case: Case, peer: Peer, work: Path) -> Result:
    """Raises AssertionError when a request fails: a figure that leaves failures out says nothing."""
    before = cpu_s(peer.pid)
    took = ask(case, peer.address, work)
    return Result(cpu_us=(cpu_s(peer.pid) - before) * 1e6 / case.requests, took_us=took)


def ask(case: Case, address: str, work: Path, *, port: int | None = None) -> list[int]:
    scheme, usual = ("https", HTTPS) if case.tls else ("http", HTTP)
    flags = ["-n", str(case.requests), "-c", str(case.clients), "-m", str(case.streams), "-t", "1"]
    if not case.http2:
        flags.append("--h1")
    if case.upload:
        body = work / "body"
        if not body.exists():
            body.write_bytes(bytes(1 << 20))
        flags += ["-d", str(body)]
    log = work / "requests.log"
    log.unlink(missing_ok=True)
    if case.rate:
        flags += ["--rps", str(case.rate / case.clients), "--log-file", str(log)]
    target = [f"--connect-to={address}:{port or usual}", f"{scheme}://{NAME}:{usual}{case.path}"]
    command = ["taskset", "-c", str(CLIENT_CORE), find("h2load") or "h2load", *flags, *target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    succeeded = re.search(r"(\d+) 2xx", done.stdout)
    if succeeded is None or int(succeeded[1]) != case.requests:
        raise AssertionError(f"{case.name} at {address}: {done.stdout}{done.stderr}")
    if not case.rate:
        return []
    asked = sorted(tuple(map(int, line.split("\t"))) for line in log.read_text().splitlines())
    return [took_us for _began_us, _status, took_us in asked[case.clients :]]


def cpu_s(pid: int) -> float:
    """Of the process, its threads and its children."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
        for child in (task / "children").read_text().split():
            total += int(cpu_s(int(child)) * 1e9)
    return total / 1e9


def memory_kib(pid: int) -> int:
    """Resident, of the process and its children."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(found[1]) if found else 0) + sum(memory_kib(int(child)) for child in children)
