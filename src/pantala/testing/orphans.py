"""Processes of a test run that was killed: the next run ends them. Each run marks its children in their environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "PANTALA_TEST_RUN"
PROCESSES = Path("/proc")


def begin_run() -> None:
    """Ends what runs that are gone have left, and marks what this one starts."""
    for pid, run in _marked():
        if run != _name(run.partition("-")[0]):
            with suppress(OSError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
    os.environ[MARK] = _name(str(os.getpid()))


def _name(pid: str) -> str:
    """A process id and when it began, in ticks since boot: ids are given again. Empty when there is none."""
    try:
        fields = (PROCESSES / pid / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{pid}-{fields[19]}"


def _marked() -> Iterator[tuple[int, str]]:
    """Processes and the run that started them."""
    for folder in PROCESSES.iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # gone, or somebody else's
            for setting in (folder / "environ").read_bytes().split(b"\0"):
                name, _, run = setting.decode(errors="replace").partition("=")
                if name == MARK and int(folder.name) != os.getpid():
                    yield int(folder.name), run
