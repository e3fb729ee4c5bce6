"""Machines that live for one request or one job, by the examples as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pantala.testing.box import BoxRig
from pantala.testing.poll import until_sync

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
AT_ONCE = 4


def deploy_token(box: BoxRig, app: str) -> str:
    return str(box.pantala_json("tokens", "create", "deploy", "-a", app)["token"])


def machine_per_request(box: BoxRig, folder: Path, *, app: str, requests: int, rounds: int = 1) -> float:
    """Each request is done by a machine of its own, and none is left; requests a second. A round has to end within a
    minute."""
    source = Path(shutil.copytree(EXAMPLES / "per-request", folder / app))
    config = source / "fly.toml"
    config.write_text(config.read_text().replace('app = "per-request"', f'app = "{app}"'))
    box.pantala("apps", "create", app)
    box.pantala("secrets", "set", f"API_TOKEN={deploy_token(box, app)}", "--stage", "-a", app)
    box.pantala("deploy", "--no-ha", cwd=source)
    url = f"https://{app}.apps.pantala.test/job-[1-{requests}]"
    machines: set[str] = set()
    begun = time.monotonic()
    for _ in range(rounds):
        out = box.curl(url, "--parallel", "--parallel-max", str(AT_ONCE), "--no-progress-meter")
        lines = [line.split(" did ") for line in out.splitlines()]
        assert sorted(path for _, path in lines) == sorted(f"/job-{n}" for n in range(1, requests + 1))
        machines |= {machine for machine, _ in lines}
    took_s = time.monotonic() - begun
    assert len(machines) == requests * rounds
    until_sync(lambda: len(box.machines(app)), lambda left: left == 1, within_s=60, every_s=0.2)
    box.pantala("apps", "destroy", app, "--yes")
    return len(machines) / took_s


def machine_per_job(box: BoxRig, *, app: str, jobs: int) -> dict[str, Any]:
    """What `examples/queue` prints; every exit code is collected and no machine is left."""
    box.pantala("apps", "create", app)
    url = json.loads((box.work / "config" / "config.json").read_text())["api_url"]
    command = [sys.executable, str(EXAMPLES / "queue" / "jobs.py"), "--app", app, "--image", "busybox:1.35"]
    command += ["--jobs", str(jobs), "--at-once", str(AT_ONCE), "--", "sh", "-c", "exit $((JOB % 4))"]
    env = os.environ | {"FLY_API_TOKEN": deploy_token(box, app), "FLY_FLAPS_BASE_URL": url}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 + 5 * jobs, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["exit_codes"] == {str(code): jobs // 4 for code in range(4)}
    assert box.machines(app) == []
    box.pantala("apps", "destroy", app, "--yes")
    return report


def nothing_is_left(box: BoxRig) -> None:
    ended = box.pantala("audit", "leaks", "--state", str(box.state), check=False)
    assert ended.code == 0, ended.output


def told(report: dict[str, Any]) -> str:
    waited, came_up = report["queue_delay_ms"], report["machine_ms"]
    return (
        f"{report['jobs']} jobs as machines, {AT_ONCE} at once: {report['jobs_per_s']} a second, queue delay p50 "
        f"{waited['p50']} ms, p99 {waited['p99']} ms; a machine of it p50 {came_up['p50']} ms, p99 {came_up['p99']} ms"
    )


def web_and_workers(box: BoxRig, folder: Path, *, tasks: int) -> None:
    """Two process groups of one image and a broker in an app of its own, found by its `.internal` name."""
    box.pantala("images", "bootstrap", "redis:7.0", "--state", str(box.state), timeout_s=400)
    source = Path(shutil.copytree(EXAMPLES / "workers", folder / "workers"))
    for app in ("workers-redis", "workers"):
        box.pantala("apps", "create", app)
    box.pantala("machine", "run", "redis:7.0", "-a", "workers-redis")
    box.pantala("deploy", "--no-ha", cwd=source, timeout_s=400)
    groups = {machine["config"]["metadata"]["fly_process_group"] for machine in box.machines("workers")}
    assert groups == {"web", "worker"}
    assert box.curl(f"https://workers.apps.pantala.test/squares/{tasks}").strip() == f'{{"done":{tasks}}}'
    box.pantala("apps", "destroy", "workers", "workers-redis", "--yes")
