"""`pantala up` and `pantala down`: a box begins and ends. Each step is told; what fails names the log to read."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import httpx2
import msgspec

from pantala.box import settings
from pantala.box.layout import REGISTRY_NAME, Box, load_box, new_box
from pantala.box.network import lower_network, raise_network
from pantala.box.processes import plan_processes
from pantala.box.supervisor import Status, read_status, start_time
from pantala.errors import Conflict, InternalError, InvalidRequest
from pantala.images.bootstrap import BaseCache, recipe_for
from pantala.images.registry import RegistryClient
from pantala.kit.clock import SystemClock
from pantala.wire.server import Bootstrapped

Say = Callable[[str], None]

READY_WITHIN_S = 120.0
STOP_WITHIN_S = 30.0
TOOLS = ("ip", "nft", "nsenter", "crun", "runc", "mkfs.ext4", "docker-registry")
HUB = "https://registry-1.docker.io/v2/"
HUB_ANSWERS_WITHIN_S = 3.0
DEFAULT_BASES = ("python:3.11-slim",)


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """What the CLI keeps so that commands find the box."""

    box: Box
    token: str
    org: str
    ca_file: str


def up(
    *, state: Path, run: Path, cache: Path, regions: list[str], idle_window_s: float, email: str, org: str, say: Say
) -> Started:
    """Start a box, or say why not; a start that fails is taken back."""
    check_preconditions(state)
    box = new_box(state=state, run=run, cache=cache, regions=regions, idle_window_s=idle_window_s)
    settings.make_folders(box)
    begun = time.monotonic()

    def step(text: str) -> None:
        say(f"==> {text} ({time.monotonic() - begun:.1f} s)")

    try:
        step(f"Network: {len(box.hosts())} host(s) in {', '.join(box.regions)}")
        box = raise_network(box)
        made = _bootstrap(box, email=email, org=org)
        mirrored = () if hub_answers() else ("docker.io",)
        _start_supervisor(box, made, mirrored=mirrored)
        _await_ready(box, step)
        if mirrored:
            step("Base images: docker.io is not in reach, common bases are made from Debian packages")
            anyio.run(push_bases, box, say)
    except BaseException:
        down(state=box.state_dir, say=lambda _: None)
        raise
    step("The box is up")
    return Started(box=box, token=made.token, org=org, ca_file=made.ca)


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
        _stop_processes(status)
    if box is not None:
        for host in box.hosts():
            files = settings.host_files(box, host)
            if files.agent_settings.is_file():
                say(f"==> Stopping the machines of {host.node}")
                _sweep_machines(box, host.link.netns, files.agent_settings)
    say("==> Removing the network")
    kill_leftovers(box)
    lower_network(box)
    remove_control_groups()
    if box is not None:
        shutil.rmtree(box.run_dir, ignore_errors=True)
    (state / "status.json").unlink(missing_ok=True)
    if purge:
        shutil.rmtree(state, ignore_errors=True)


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


def hub_answers() -> bool:
    """Whether Docker Hub is in reach; then Dockerfiles get their bases from where they say."""
    try:
        return httpx2.get(HUB, timeout=HUB_ANSWERS_WITHIN_S).status_code in (200, 401)
    except httpx2.HTTPError:
        return False


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


def _bootstrap(box: Box, *, email: str, org: str) -> Bootstrapped:
    """The first user, org and token, and the control plane's keys."""
    command = [sys.executable, "-m", "pantala.server.bootstrap", "--settings", str(settings.write_server(box))]
    done = subprocess.run(
        [*command, "--email", email, "--org", org, "--hosts", str(settings.write_join_requests(box))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"the control plane could not be set up: {done.stderr.strip()[-400:]}")
    return msgspec.json.decode(done.stdout, type=Bootstrapped)


def _start_supervisor(box: Box, made: Bootstrapped, *, mirrored: tuple[str, ...]) -> None:
    processes = plan_processes(box, made, mirrored=mirrored)
    path = box.state_dir / "processes.json"
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(processes))
    (box.state_dir / "status.json").unlink(missing_ok=True)
    with (box.logs_dir() / "supervisor.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "pantala.box.supervisor", str(box.state_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )


def _await_ready(box: Box, step: Say) -> None:
    told: set[str] = set()
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        status = read_status(box.state_dir)
        for process in status.processes if status else ():
            if process.state == "ready" and process.name not in told:
                told.add(process.name)
                step(f"{process.name} is ready")
            if process.restarts >= 3:
                raise InternalError(f"{process.name} does not stay up:\n{tail(box, process.name)}")
        if status and status.trouble:
            raise InternalError(status.trouble)
        if status and all(process.state == "ready" for process in status.processes):
            return
        time.sleep(0.05)
    raise InternalError(f"the box is not ready after {READY_WITHIN_S:g} s; its logs are in {box.logs_dir()}")


def tail(box: Box, name: str, lines: int = 15) -> str:
    path = box.logs_dir() / f"{name}.log"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def _stop_processes(status: Status) -> None:
    """The supervisor ends its children in order; whoever is left is ended by pid and start time."""
    if status.supervisor and _is_supervisor(status.supervisor):
        os.kill(status.supervisor, signal.SIGTERM)
        deadline = time.monotonic() + STOP_WITHIN_S
        while start_time(status.supervisor) and time.monotonic() < deadline and _is_supervisor(status.supervisor):
            time.sleep(0.05)
        if _is_supervisor(status.supervisor):
            os.kill(status.supervisor, signal.SIGKILL)
    for process in reversed(status.processes):
        if process.pid and start_time(process.pid) == process.started:
            os.kill(process.pid, signal.SIGKILL)


def _is_supervisor(pid: int) -> bool:
    try:
        return b"pantala.box.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _sweep_machines(box: Box, netns: str, agent_settings: Path) -> None:
    """The host's machines end with the box; their journal stays."""
    inside = ["nsenter", f"--net=/run/netns/{netns}", "--"] if Path(f"/run/netns/{netns}").exists() else []
    done = subprocess.run(
        [*inside, sys.executable, "-m", "pantala.agent.sweep", "--settings", str(agent_settings)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"machines of {box.id} could not be removed: {done.stderr.strip()[-400:]}")
