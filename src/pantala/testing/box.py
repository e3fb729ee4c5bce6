"""A real box for end-to-end tests: brought up once, driven through the CLI as its user would, always brought down.

`PANTALA_BOX_INSTANCE` keeps it apart from a box that the developer runs. Needs root and what `scripts/install --tests`
installs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

CLI_TIMEOUT_S = 180.0
BASES = ("python:3.11-slim", "busybox:1.35")
"""What the apps of the tests are built from; made from Debian packages once and kept in the cache."""

CACHE = Path(__file__).resolve().parents[3] / ".cache"


class Done(msgspec.Struct, frozen=True):
    """What a command said and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class BoxRig:
    """One running box. `state` is its state directory, `work` a scratch directory of the tests."""

    def __init__(self, work: Path, *, regions: Sequence[str], instance: int | None = None) -> None:
        self.work = work
        self.state = work / "state"
        self.regions = list(regions)
        self.region = self.regions[0]
        self.environment = os.environ | {
            "PANTALA_CONFIG_DIR": str(work / "config"),
            "PANTALA_CACHE_DIR": str(CACHE),
        }
        self.instance = int(os.environ.get("PANTALA_BOX_INSTANCE", "0")) if instance is None else instance
        self.environment["PANTALA_BOX_INSTANCE"] = str(self.instance)

    def pantala(
        self, *arguments: str, cwd: Path | None = None, check: bool = True, timeout_s: float = CLI_TIMEOUT_S
    ) -> Done:
        """Run the CLI; an unexpected failure shows what it said."""
        return self._run([sys.executable, "-m", "pantala.cli.main", *arguments], cwd, check, timeout_s)

    def pantala_json(self, *arguments: str, cwd: Path | None = None) -> Any:
        return json.loads(self.pantala(*arguments, "--json", cwd=cwd).stdout)

    def at(self, *command: str, region: str = "", check: bool = True, timeout_s: float = 60.0) -> Done:
        """Run a command as a client in a region (the first): names resolve, certificates verify."""
        at = ["box", "at", region or self.region, "--state", str(self.state), "--"]
        return self.pantala(*at, *command, check=check, timeout_s=timeout_s)

    def curl(self, url: str, *flags: str, region: str = "", check: bool = True) -> str:
        """Body of a request from a client namespace; the certificate is verified, nothing is retried."""
        curl = ["curl", "-sS", "--fail-with-body", "--max-time", "40", *flags, url]
        return self.at(*curl, region=region, check=check).stdout

    def up(self, *flags: str) -> Done:
        return self.pantala("up", "--state", str(self.state), "--org", "tests", *flags, timeout_s=400)

    def down(self, *flags: str) -> Done:
        return self.pantala("down", "--state", str(self.state), *flags, timeout_s=120)

    def namespace(self, name: str) -> str:
        """Of a host, or (`router`, `at-<region>`) of what is between them."""
        return f"pnt{self.instance or ''}-{name}"

    def run_in(self, name: str, *command: str, check: bool = True, timeout_s: float = 30.0) -> Done:
        """A command in the namespace of a host, with this machine's files."""
        inside = ["nsenter", f"--net=/run/netns/{self.namespace(name)}", "--", *command]
        return self._run(inside, None, check, timeout_s)

    def edge_of(self, node: str, url: str, *flags: str, check: bool = True) -> str:
        """Body of a request to this host's own edge, whatever edge is nearest; the certificate is verified."""
        edge, name = f"100.{96 + self.instance}.255.1", url.split("/")[2]
        ca_file = str(self.state / "control" / "ca" / "ca.pem")
        curl = ["curl", "-sS", "--max-time", "20", "--cacert", ca_file, "--resolve", f"{name}:443:{edge}"]
        return self.run_in(node, *curl, *flags, url, check=check).stdout

    def machines(self, app: str) -> list[dict[str, Any]]:
        return self.pantala_json("machine", "list", "-a", app)

    def api(self) -> tuple[str, str]:
        """Where the API answers, and the token of who is logged in."""
        kept = json.loads((self.work / "config" / "config.json").read_text())
        return kept["api_url"], kept["token"]

    def processes(self) -> dict[str, dict[str, Any]]:
        """The box's daemons by name, as its supervisor sees them."""
        seen = self.pantala_json("box", "status", "--state", str(self.state))
        return {process["name"]: process for process in seen["processes"]}

    def logs(self, lines: int = 25) -> str:
        """The end of every daemon's log: kept as evidence of a failure."""
        parts: list[str] = []
        for path in sorted((self.state / "logs").glob("*.log")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(text))
        return "\n".join(parts)

    def _run(self, command: list[str], cwd: Path | None, check: bool, timeout_s: float) -> Done:
        ended = subprocess.run(
            command,
            cwd=cwd or self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        done = Done(ended.returncode, ended.stdout, ended.stderr)
        if check and done.code != 0:
            raise AssertionError(f"`{' '.join(command[2:])}` exited with {done.code}:\n{done.output[-4000:]}")
        return done


@contextmanager
def running_box(
    work: Path,
    *,
    regions: Sequence[str] = ("iad",),
    idle_window_s: float = 3.0,
    instance: int | None = None,
    flags: Sequence[str] = (),
) -> Generator[BoxRig]:
    """Up, and down again with everything it made; what is left behind fails the test that comes last."""
    rig = BoxRig(work, regions=regions, instance=instance)
    work.mkdir(parents=True, exist_ok=True)
    rig.pantala("down", "--purge", "--state", str(rig.state), check=False)  # what a killed run left
    try:
        rig.up("--regions", ",".join(regions), "--idle-window", str(idle_window_s), *flags)
        rig.pantala("images", "bootstrap", *BASES, "--state", str(rig.state), timeout_s=400)
        yield rig
    finally:
        rig.down("--purge")
