"""What a test run that was killed left running ends with the next one; what belongs to a living one goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from pantala.testing.poll import until_sync

RUN = """
import subprocess, time
from pantala.testing.orphans import begin_run
begin_run()
print(subprocess.Popen(["sleep", "300"]).pid, flush=True)
time.sleep(300)
"""
NEXT = "from pantala.testing.orphans import begin_run; begin_run()"


@contextmanager
def run() -> Generator[tuple[subprocess.Popen[str], int]]:
    """A test run and what it has started."""
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            yield program, int(program.stdout.readline())
        finally:
            program.kill()


def is_there(pid: int) -> bool:
    """A process that ended but that nobody has asked for does not count."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


def test_what_a_killed_run_left_ends_with_the_next() -> None:
    with ExitStack() as runs:
        killed, left = runs.enter_context(run())
        _, kept = runs.enter_context(run())
        killed.kill()
        killed.wait()
        assert is_there(left)
        subprocess.run([sys.executable, "-c", NEXT], check=True)
        until_sync(lambda: is_there(left), lambda there: not there, within_s=10)
        assert is_there(kept)
    subprocess.run([sys.executable, "-c", NEXT], check=True)
    until_sync(lambda: is_there(kept), lambda there: not there, within_s=10)
