"""How long the CLI takes, held against an interpreter that does nothing, interleaved."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.apps import deploy_busybox
from benchmarks.figures import Figure, figure, percentile
from pantala.testing.box import BoxRig

ROUNDS = 15


def measure(box: BoxRig) -> list[Figure]:
    deploy_busybox(box, "bench-cli")
    program = str(Path(sys.executable).with_name("pantala"))
    commands = {
        "python": [sys.executable, "-c", "pass"],
        "help": [program, "--help"],
        "status": [program, "status", "-a", "bench-cli"],
    }
    took_ms: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(ROUNDS + 1):
        for name, command in commands.items():
            begun = time.monotonic()
            subprocess.run(command, env=box.environment, stdout=subprocess.DEVNULL, check=True, timeout=30)
            if number:  # the first round only warms the page cache
                took_ms[name].append((time.monotonic() - begun) * 1000)
    baseline = percentile(took_ms["python"], 50)
    return [
        figure(f"cli.{name}.p50", percentile(took_ms[name], 50), "ms", n=ROUNDS, baseline=baseline,
               meaning=f"`pantala {words}`, beside `python -c pass`")
        for name, words in (("help", "--help"), ("status", "status"))
    ]  # fmt: skip
