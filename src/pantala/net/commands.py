"""Running `ip`, `nft` and their like: a bounded wait, and their words in the error."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from pantala.errors import DriverError

DEADLINE_S = 15.0
STDERR_SHOWN = 500


async def run(command: Sequence[str], *, stdin: str = "") -> str:
    """Its stdout. Raises DriverError when it fails or takes too long."""
    code, out, err = await attempt(command, stdin=stdin)
    if code != 0:
        raise DriverError(f"{command[0]} failed: {err.strip()[:STDERR_SHOWN] or f'exit code {code}'}")
    return out


async def attempt(command: Sequence[str], *, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        with anyio.fail_after(DEADLINE_S):
            done = await anyio.run_process(list(command), input=stdin.encode(), check=False)
    except TimeoutError as error:
        raise DriverError(f"{command[0]} did not end within {DEADLINE_S:g} s", retry=True) from error
    except OSError as error:
        raise DriverError(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
