"""`pantala doctor`: what this machine can do. It tries things rather than look for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import anyio
import msgspec

from pantala.box.layout import Box
from pantala.box.up import TOOLS
from pantala.errors import PantalaError
from pantala.host.outside import hub_answers, resolvers
from pantala.host.supervisor import read_status
from pantala.kit import binaries
from pantala.kit.clock import SystemClock

DISK_FREE_GIB_MIN = 5
PROGRAMS = ("pantala-proxy", "pantala-init", "nats-server", "buildkitd", "buildctl")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`needed`: without it no machine runs here."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True


def examine(box: Box | None) -> list[Finding]:
    root = os.geteuid() == 0
    findings = [
        Finding(what="root", ok=root, detail="yes" if root else "no", remedy="run it with sudo"),
        _tools(),
        _programs(),
        _resolver(),
        _disk(),
        _isolation() if root else _unknown("machines", "only root can try"),
        _registry(),
    ]
    return [*findings, *(_processes(box) if box is not None else [])]


def _tools() -> Finding:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    detail = f"missing: {', '.join(missing)}" if missing else f"{len(TOOLS)} found"
    return Finding(what="tools", ok=not missing, detail=detail, remedy="run scripts/install")


def _programs() -> Finding:
    missing: list[str] = []
    for name in PROGRAMS:
        try:
            binaries.find(name)
        except PantalaError:
            missing.append(name)
    detail = f"missing: {', '.join(missing)}" if missing else f"{len(PROGRAMS)} found"
    remedy = "run scripts/install in a checkout; outside of it, PANTALA_BIN_DIR names its .cache/bin"
    return Finding(what="programs", ok=not missing, detail=detail, remedy=remedy)


def _resolver() -> Finding:
    try:
        return Finding(what="resolver", ok=True, detail=", ".join(resolvers()))
    except PantalaError as error:
        return Finding(what="resolver", ok=False, detail=error.message, remedy=error.hint or "")


def _disk() -> Finding:
    free = shutil.disk_usage("/var").free / 1024**3
    remedy = f"at least {DISK_FREE_GIB_MIN} GiB are needed for images"
    return Finding(what="disk", ok=free >= DISK_FREE_GIB_MIN, detail=f"{free:.0f} GiB free", remedy=remedy)


def _isolation() -> Finding:
    """Boot something: the only proof."""
    from pantala.drivers.container import ContainerDriver

    async def probe() -> Finding:
        with tempfile.TemporaryDirectory(prefix="pantala-doctor-") as scratch:
            driver = ContainerDriver(
                state_dir=Path(scratch) / "state",
                run_dir=Path(scratch) / "run",
                cgroup_root="pantala/doctor",
                init=binaries.find("pantala-init"),
                clock=SystemClock(),
            )
            seen = await driver.probe()
        detail = f"container (shared kernel): {seen.detail}"
        return Finding(
            what="machines", ok=seen.ok, detail=detail, remedy="see the agent's log for what the kernel lacks"
        )

    try:
        return anyio.run(probe)
    except PantalaError as error:
        return Finding(what="machines", ok=False, detail=error.sentence())


def _registry() -> Finding:
    reachable = hub_answers()
    detail = "docker.io answers" if reachable else "docker.io is not in reach; bases are made from Debian packages"
    return Finding(what="container registry", ok=True, detail=detail, needed=False)


def _processes(box: Box) -> list[Finding]:
    status = read_status(box.state_dir)
    if status is None:
        return [Finding(what="box", ok=True, detail="not running", needed=False)]
    return [
        Finding(
            what=process.name,
            ok=process.state == "ready",
            detail=f"{process.state}, {process.restarts} restart(s)",
            remedy=f"read {box.logs_dir() / process.name}.log",
        )
        for process in status.processes
    ]


def _unknown(what: str, detail: str) -> Finding:
    return Finding(what=what, ok=False, detail=detail, remedy="run it with sudo")
