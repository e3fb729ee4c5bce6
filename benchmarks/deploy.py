"""A changed line, deployed: from the start of the command to the first answer of the new version over HTTPS.

Dependencies stay the same, so the build reuses their layer. The app is the Flask example with two machines awake; a
client in the region asks every 20 ms on a new connection. Both processes read the same monotonic clock.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figures import Figure, figure, percentile
from pantala.testing.box import BoxRig

ROUNDS = 5
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "flask"
HOST = "bench-deploy.apps.pantala.test"
SEEN_WITHIN_S = 120.0

WATCH = """
import http.client, ssl, sys, time
host, wanted, deadline = sys.argv[1], sys.argv[2], time.monotonic() + float(sys.argv[3])
context = ssl.create_default_context()
print("watching", flush=True)
while time.monotonic() < deadline:
    connection = http.client.HTTPSConnection(host, timeout=10, context=context)
    connection.request("GET", "/")
    if wanted in connection.getresponse().read().decode():
        print(time.monotonic(), flush=True)
        sys.exit(0)
    connection.close()
    time.sleep(0.02)
sys.exit(f"{wanted} was not seen")
"""


def measure(box: BoxRig) -> list[Figure]:
    source = Path(shutil.copytree(EXAMPLE, box.work / "bench-deploy"))
    begun = time.monotonic()
    box.pantala("launch", "--now", "--yes", "--name", "bench-deploy", cwd=source, timeout_s=400)
    first = time.monotonic() - begun
    original = (source / "app.py").read_text()
    seen: list[float] = []
    whole: list[float] = []
    for number in range(1, ROUNDS + 1):
        (source / "app.py").write_text(original.replace("Flask on Fly.io!", f"version {number}."))
        with _watch(box, f"version {number}.") as watcher:
            began = time.monotonic()
            box.pantala("deploy", "--yes", cwd=source)
            whole.append(time.monotonic() - began)
            said, _ = watcher.communicate(timeout=SEEN_WITHIN_S)
            seen.append(float(said.split()[-1]) - began)
    return [
        figure("deploy.first_answer.p50", percentile(seen, 50), "s", n=ROUNDS, baseline=first,
               meaning="changed line to first answer of the new version, beside the app's first launch"),
        figure("deploy.complete.p50", percentile(whole, 50), "s", n=ROUNDS, baseline=first,
               meaning="changed line to the end of the command (both machines updated and well)"),
        figure("deploy.launch", first, "s", n=1, meaning="first launch: dependencies installed, two machines well"),
    ]  # fmt: skip


def _watch(box: BoxRig, wanted: str) -> subprocess.Popen[str]:
    """Running and asking when this returns."""
    command = [sys.executable, "-m", "pantala.cli.main", "box", "at", box.region, "--state", str(box.state), "--"]
    watcher = subprocess.Popen(
        [*command, sys.executable, "-c", WATCH, HOST, wanted, str(SEEN_WITHIN_S)],
        stdout=subprocess.PIPE,
        text=True,
        env=box.environment,
    )
    assert watcher.stdout is not None
    if watcher.stdout.readline() != "watching\n":
        watcher.kill()
        raise AssertionError("the watching client did not start")
    return watcher
