"""How a host's processes and machines end, whoever started them and whatever is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pantala.errors import InternalError
from pantala.host.place import Place
from pantala.host.supervisor import Status, is_supervisor, start_time

STOP_WITHIN_S = 60.0
SWEEP_WITHIN_S = 1_800
"""Of a host with thousands of machines; the sweep itself gives up earlier, by how many there are."""


def stop_processes(status: Status) -> None:
    """The supervisor ends its children in order; whoever is left is ended by pid and start time."""
    if status.supervisor and is_supervisor(status.supervisor):
        _signal(status.supervisor, signal.SIGTERM)
        deadline = time.monotonic() + STOP_WITHIN_S
        while start_time(status.supervisor) and time.monotonic() < deadline and is_supervisor(status.supervisor):
            time.sleep(0.05)
        if is_supervisor(status.supervisor):
            _signal(status.supervisor, signal.SIGKILL)
    for process in reversed(status.processes):
        for pid, started in (*process.beside, (process.pid, process.started)):
            if pid and start_time(pid) == started:
                _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended between the look and the call
        os.kill(pid, number)


def sweep_machines(place: Place, *, leave: bool = False) -> None:
    """The host's machines end; their journal stays. With `leave` its firewall goes too. Raises InternalError when
    something does not go."""
    if not place.agent_settings.is_file():
        return
    netns = Path("/run/netns") / place.netns
    inside = ["nsenter", f"--net={netns}", "--"] if place.netns and netns.exists() else []
    command = [sys.executable, "-m", "pantala.agent.sweep", "--settings", str(place.agent_settings)]
    done = subprocess.run(
        [*inside, *command, *(["--leave"] if leave else [])],
        capture_output=True,
        text=True,
        timeout=SWEEP_WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise InternalError(f"machines of {place.state} could not be removed: {done.stderr.strip()[-400:]}")
