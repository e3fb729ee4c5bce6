"""`audit leaks` while a box runs: what each host's driver and network own and its journal does not know."""

from __future__ import annotations

import json
import subprocess
import sys

from pantala.box import places
from pantala.box.layout import Box
from pantala.errors import InternalError


def leaks_of_running(box: Box) -> list[str]:
    found: list[str] = []
    for host in box.hosts():
        command = [sys.executable, "-m", "pantala.agent.sweep", "--strangers", "--settings"]
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{host.link.netns}", "--", *command,
             str(places.place(box, host).agent_settings)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise InternalError(f"{host.node} could not be looked at: {done.stderr.strip()[-300:]}")
        found += [f"{host.node}: {what}" for what in json.loads(done.stdout)]
    return found
