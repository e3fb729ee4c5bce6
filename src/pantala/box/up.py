"""`pantala up` and `pantala down`: a box begins and ends. Each step is told; what fails names the log to read."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import httpx2
import msgspec

from pantala.box import places
from pantala.box.layout import REGISTRY_NAME, RUN_NAME, Box, LinkKind, load_box, new_box
from pantala.box.links import plan_tunnels
from pantala.box.network import lower_network, raise_network
from pantala.box.relay import plan_relay
from pantala.box.routing import plan_routing
from pantala.errors import Conflict, InternalError, InvalidRequest
from pantala.host import identity
from pantala.host.control import bootstrap
from pantala.host.outside import hub_answers
from pantala.host.processes import control_processes, host_processes
from pantala.host.stop import stop_processes, sweep_machines
from pantala.host.supervisor import Process, read_status, save_processes, start_time
from pantala.images.bootstrap import BaseCache, recipe_for
from pantala.images.registry import RegistryClient
from pantala.kit.clock import SystemClock
from pantala.wire.hosts import HostView
from pantala.wire.server import Bootstrapped

Say = Callable[[str], None]

DEFAULT_REGION = "iad"
READY_WITHIN_S = 120.0
READY_WITHIN_PER_HOST_S = 5.0
RESTARTS_MAX = 3
SWEEPS_AT_ONCE = 4
TOOLS = ("ip", "nft", "nsenter", "crun", "runc", "bird", "iptables", "wg", "mkfs.ext4", "docker-registry")
DEFAULT_BASES = ("python:3.11-slim",)


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """What the CLI keeps so that commands find the box."""

    box: Box
    token: str
    org: str
    ca_file: str


def up(
    *,
    state: Path,
    run: Path,
    cache: Path,
    regions: list[str],
    idle_window_s: float,
    tuning: dict[str, str],
    links_kind: LinkKind,
    distances: bool,
    bfd_ms: int,
    email: str,
    org: str,
    say: Say,
) -> Started:
    """Start a box, or say why not; a start that fails is taken back. No `regions`: those it had, or the default one."""
    check_preconditions(state)
    box = new_box(
        state=state,
        run=run,
        cache=cache,
        regions=settle_regions(kept_regions(state), regions) or [DEFAULT_REGION],
        idle_window_s=idle_window_s,
        tuning=tuning,
        links_kind=links_kind,
        distances=distances,
        bfd_ms=bfd_ms,
    )
    make_folders(box)
    begun = time.monotonic()

    def step(text: str) -> None:
        say(f"==> {text} ({time.monotonic() - begun:.1f} s)")

    try:
        step(f"Network: {len(box.hosts())} host(s) in {', '.join(box.regions)}")
        box = raise_network(box)
        made = let_hosts_in(box, email=email, org=org)
        mirrored = () if hub_answers() else ("docker.io",)
        start_supervisor(box, plan_processes(box, made, mirrored=mirrored))
        await_ready(box, step)
        await_visible(box, made.token)
        if mirrored:
            step("Base images: docker.io is not in reach, common bases are made from Debian packages")
            anyio.run(push_bases, box, say)
    except BaseException:
        down(state=box.state_dir, say=lambda _: None)
        raise
    step("The box is up")
    say(f"    {footprint(box, time.monotonic() - begun)}")
    return Started(box=box, token=made.token, org=org, ca_file=made.ca)


def kept_regions(state: Path) -> list[str]:
    """Those whose hosts are in the state; none when no host was ever let in."""
    box = load_box(state)
    return box.regions if box is not None and places.platform(box).requests.is_file() else []


def settle_regions(kept: list[str], wanted: list[str]) -> list[str]:
    """Hosts keep their addresses, which follow from their order: new ones come last, none is left out. Raises
    InvalidRequest."""
    if not wanted:
        return kept
    if gone := [region for region in kept if region not in wanted]:
        raise InvalidRequest(
            f"the state has a host in {', '.join(gone)} as well",
            field="--regions",
            hint="name it too, or begin anew after `pantala down --purge`",
        )
    return [*kept, *(region for region in wanted if region not in kept)]


def make_folders(box: Box) -> None:
    for folder in (box.state_dir / "control", box.logs_dir(), box.run_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def check_preconditions(state: Path) -> None:
    """Raises before anything is changed."""
    if os.geteuid() != 0:
        raise InvalidRequest("a box needs root: namespaces, mounts and control groups", hint="run it with sudo")
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        raise InvalidRequest(f"not installed: {', '.join(missing)}", hint="run scripts/install")
    if (box := load_box(state)) and is_running(box):
        raise Conflict(f"the box in {state} is running", hint="`pantala down` stops it")


def is_running(box: Box) -> bool:
    status = read_status(box.state_dir)
    return status is not None and any(p.pid and start_time(p.pid) == p.started for p in status.processes)


def down(*, state: Path, say: Say, purge: bool = False) -> None:
    """Stop a box, or what is left of one; repeats safely. State stays unless `purge`."""
    box = load_box(state)
    status = read_status(state)
    if status is not None:
        say("==> Stopping processes")
        stop_processes(status)
    if box is not None:
        say("==> Stopping machines")
        with ThreadPoolExecutor(SWEEPS_AT_ONCE) as sweeps:
            list(sweeps.map(sweep_machines, [places.place(box, host) for host in box.hosts()]))
    say("==> Removing the network")
    kill_leftovers(box)
    lower_network(box)
    unmount_leftovers()
    remove_control_groups()
    shutil.rmtree(box.run_dir if box is not None else Path("/run") / RUN_NAME, ignore_errors=True)
    (state / "status.json").unlink(missing_ok=True)
    if purge:
        shutil.rmtree(state, ignore_errors=True)


def unmount_leftovers() -> None:
    """What hosts hold that no record knows any more, such as a server that had joined and was killed."""
    from pantala.box.audit import mounts

    for point in reversed(mounts()):
        subprocess.run(["umount", point], capture_output=True, timeout=10, check=False)  # what stays, the audit names


def remove_control_groups() -> None:
    """The empty ones that hosts leave; one that is not empty stays for `audit leaks` to name."""
    from pantala.box.audit import control_groups

    for path in control_groups():
        try:
            path.rmdir()
        except OSError:
            continue


def kill_leftovers(box: Box | None) -> None:
    """Whatever still lives in a namespace of the box, found by the namespace itself."""
    from pantala.box.audit import processes_in_box

    left: list[int] = []
    for _ in range(20):
        left = processes_in_box()
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    raise InternalError(f"processes {left} of the box {box.id if box else ''} do not end")


async def push_bases(box: Box, say: Say, names: tuple[str, ...] = DEFAULT_BASES) -> None:
    """Make the default bases (and push every one that the cache holds) to the box's registry."""
    from pantala.control.registry_tokens import RegistryTokens

    cache = BaseCache(box.cache_dir / "bases")
    for name in names:
        cache.make(recipe_for(name), say=lambda text: say(f"    {text}"))
    tokens = RegistryTokens(box.state_dir / "control" / "registry", SystemClock())
    registry = RegistryClient(endpoints={REGISTRY_NAME: f"http://{box.registry}"})
    try:
        for recipe in cache.made():
            token = tokens.issue("bases", recipe.repository, ("pull", "push"))
            await cache.push(recipe, registry=registry, name=REGISTRY_NAME, token=token)
            say(f"    {recipe.name} is ready")
    finally:
        await registry.aclose()


# -- steps -----------------------------------------------------------------------------------------------------------


def let_hosts_in(box: Box, *, email: str, org: str) -> Bootstrapped:
    """The first user, org and token, the control plane's keys, and each host's identity."""
    hosts = box.hosts()
    requests = [places.request(box, host) for host in hosts]
    made = bootstrap(places.platform(box), places.tuning(box), email=email, org=org, hosts=requests)
    for host, joined in zip(hosts, made.hosts, strict=True):
        identity.keep(places.place(box, host), joined)
    return made


def plan_processes(box: Box, made: Bootstrapped, *, mirrored: tuple[str, ...]) -> list[Process]:
    """The control host's first, then each host's; writes their settings."""
    tuning = places.tuning(box)
    hosts = [
        host_processes(places.place(box, host), joined, tuning)
        for host, joined in zip(box.hosts(), made.hosts, strict=True)
    ]
    control = control_processes(
        places.place(box, box.control()),
        places.platform(box),
        builder=places.builder(box, mirrored=mirrored),
        builds_netns=box.builds().netns,
    )
    between = [*plan_relay(box), *plan_tunnels(box)]
    return [*between, *control, *(process for processes in hosts for process in processes), *plan_routing(box)]


def start_supervisor(box: Box, processes: list[Process]) -> None:
    save_processes(box.state_dir, processes)
    with (box.logs_dir() / "supervisor.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "pantala.host.supervisor", str(box.state_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )


def await_ready(box: Box, step: Say) -> None:
    """Tells of each part of the control plane and of each host."""
    told: set[str] = set()
    within_s = READY_WITHIN_S + READY_WITHIN_PER_HOST_S * len(box.regions)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        status = read_status(box.state_dir)
        parts: dict[str, list[bool]] = {}
        for process in status.processes if status else ():
            _, _, node = process.name.partition("-")
            parts.setdefault(f"host {node}" if node else process.name, []).append(process.state == "ready")
            if process.restarts >= RESTARTS_MAX:
                raise InternalError(f"{process.name} does not stay up:\n{tail(box, process.name)}")
        for part, ready in parts.items():
            if all(ready) and part not in told:
                told.add(part)
                step(f"{part} is ready")
        if status and status.trouble:
            raise InternalError(status.trouble)
        if parts and len(told) == len(parts):
            return
        time.sleep(0.05)
    raise InternalError(f"the box is not ready after {within_s:g} s; its logs are in {box.logs_dir()}")


def await_visible(box: Box, token: str) -> None:
    """Until control reaches every host's agent over the bus."""
    deadline = time.monotonic() + READY_WITHIN_S
    absent = [host.node for host in box.hosts()]
    with httpx2.Client(base_url=box.api_url, headers={"authorization": f"Bearer {token}"}, timeout=10) as api:
        while time.monotonic() < deadline:
            answer = api.get("/v1/hosts").raise_for_status()
            views = msgspec.json.decode(answer.content, type=list[HostView])
            reachable = {view.id for view in views if view.reachable}
            absent = [host.node for host in box.hosts() if host.node not in reachable]
            if not absent:
                return
            time.sleep(0.1)
    raise InternalError(f"control does not reach {', '.join(absent)}; logs are in {box.logs_dir()}")


def footprint(box: Box, took_s: float) -> str:
    """How long the start took and what the processes hold in memory, pages that they share counted once."""
    status = read_status(box.state_dir)
    kinds: dict[str, int] = {}
    for process in status.processes if status else ():
        kind = process.name.partition("-")[0]
        kinds[kind] = kinds.get(kind, 0) + memory_kib(process.pid)
    parts = ", ".join(f"{kind} {kib / 1024:.0f} MB" for kind, kib in sorted(kinds.items(), key=lambda item: -item[1]))
    hosts = len(box.regions)
    return f"{hosts} host{'s' if hosts > 1 else ''} in {took_s:.0f} s, {sum(kinds.values()) / 1024**2:.1f} GB: {parts}"


def memory_kib(pid: int) -> int:
    """A process's part of the machine's memory (proportional set size); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def tail(box: Box, name: str, lines: int = 15) -> str:
    path = box.logs_dir() / f"{name}.log"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
