"""An app that tells what a tenant can see of the place it runs in (`probe/app.py`), and requests that do not stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from pantala.testing.box import BoxRig
from pantala.testing.poll import until_sync

PROBE = Path(__file__).resolve().parent / "probe"
CLIENT = Path(__file__).resolve().parent / "probe" / "steady_client.py"
GREETING = "Hello from a machine"

FLY_TOML = """\
app = "{app}"
primary_region = "iad"

[http_service]
  internal_port = 8080
  force_https = true
  auto_stop_machines = "off"
  auto_start_machines = true
"""


def probe_source(folder: Path, app: str) -> Path:
    source = Path(shutil.copytree(PROBE, folder / app))
    (source / "fly.toml").write_text(FLY_TOML.format(app=app))
    return source


def deploy_probe(box: BoxRig, folder: Path, app: str) -> Path:
    """Two machines that serve; the source's directory."""
    source = probe_source(folder, app)
    box.pantala("apps", "create", app)
    box.pantala("deploy", cwd=source)
    return source


def asked(box: BoxRig, app: str, path: str) -> str:
    return box.curl(f"https://{app}.apps.pantala.test{path}")


def image_of(box: BoxRig, app: str) -> str:
    """The image that the app's machines run, with its digest."""
    return box.machines(app)[0]["config"]["image"]


def stranger_token(box: BoxRig, org: str = "strangers") -> str:
    """A token of another user, who owns another org."""
    settings = box.state / "control" / "server.json"
    made = subprocess.run(
        [sys.executable, "-m", "pantala.server.bootstrap", "--settings", str(settings),
         "--email", f"{org}@pantala.test", "--org", org],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(made.stdout)["token"]


def admin_token(box: BoxRig) -> str:
    return box.pantala("auth", "token").stdout.strip()


@contextmanager
def api_of(box: BoxRig, token: str | None = None) -> Generator[httpx2.Client]:
    """The Machines API as any HTTP client sees it."""
    config = json.loads((box.work / "config" / "config.json").read_bytes())
    headers = {"authorization": f"Bearer {token or config['token']}"}
    with httpx2.Client(base_url=config["api_url"], headers=headers, timeout=40) as client:
        yield client


def kill(box: BoxRig, name: str) -> int:
    """SIGKILL one of the box's daemons; the pid that it had."""
    pid: int = box.processes()[name]["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid


def await_back(box: BoxRig, name: str, old_pid: int, *, within_s: float = 30.0) -> None:
    """Until the supervisor has started it again and it says that it is ready."""
    path = box.state / "status.json"

    def look() -> dict[str, Any]:
        return next(p for p in json.loads(path.read_bytes())["processes"] if p["name"] == name)

    until_sync(look, lambda p: p["pid"] != old_pid and p["state"] == "ready", within_s=within_s)


class Answers(msgspec.Struct, frozen=True):
    """What the steady client saw: how many answers, and what was not a 200."""

    count: int
    failures: list[str]


class SteadyClient:
    """Requests one after the other, each on a connection of its own, never repeated."""

    def __init__(self, report: Path) -> None:
        self._report = report

    def answers(self) -> Answers:
        lines = self._report.read_text().splitlines() if self._report.exists() else []
        return Answers(len(lines), [line for line in lines if not line.endswith(" 200")])

    def await_more(self, more: int) -> None:
        """Until so many requests have been answered from now on."""
        wanted = self.answers().count + more
        until_sync(lambda: self.answers().count, lambda count: count >= wanted, within_s=60)


@contextmanager
def steady_client(box: BoxRig, folder: Path, url: str) -> Generator[SteadyClient]:
    """`url` requested from the client namespace for as long as the block lasts."""
    report = folder / "answers.txt"
    command = [sys.executable, "-m", "pantala.cli.main", "box", "at", box.region, "--state", str(box.state), "--",
               "python3", str(CLIENT), url, str(report)]  # fmt: skip
    process = subprocess.Popen(command, env=box.environment, stdin=subprocess.PIPE, cwd=folder)
    client = SteadyClient(report)
    try:
        until_sync(lambda: client.answers().count, lambda count: count > 0, within_s=30)
        yield client
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the client ends at the end of its input
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)
