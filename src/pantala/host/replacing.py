"""Who serves at a hand-over socket, and what is asked of the supervisor: that a running process gives way to a new one
of the same name (`replace.json`, read once), as `pantala box replace` and `pantala host replace` want.

Run as `python -m pantala.host.replacing SOCKET COMMAND…` it is the reload of a unit of systemd: it starts COMMAND, that
is to take the place of the process that listens at SOCKET, and ends when it serves (0) or when it has failed (1). The
new process is a child of systemd's, not of this one, and says itself that it is the unit's main process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec

_CREDENTIALS = struct.Struct("3i")
LOOK_WITHIN_S = 0.2
LOOK_EVERY_S = 0.05
SERVES_WITHIN_S = 90.0


def listener_pid(path: Path) -> int:
    """The process that listens there; 0 for none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(LOOK_WITHIN_S)
        try:
            probe.connect(os.fspath(path))
            said = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return 0
    return _CREDENTIALS.unpack(said)[0]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """`id`: of this wish, so that its outcome is told from that of an earlier one."""

    id: str
    names: list[str]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """`error` empty: the new process serves."""

    id: str = ""
    error: str = ""


def take_wanted(state_dir: Path) -> Wanted | None:
    path = state_dir / "replace.json"
    try:
        wanted = msgspec.json.decode(path.read_bytes(), type=Wanted)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        wanted = None
    path.unlink(missing_ok=True)
    return wanted


def want(state_dir: Path, wanted: Wanted) -> None:
    fresh = state_dir / "replace.new"
    fresh.write_bytes(msgspec.json.encode(wanted))
    fresh.rename(state_dir / "replace.json")


def replace(path: Path, command: list[str]) -> str:
    """Why the new process does not serve; empty when it does. Blocks."""
    new = _start_orphan(command)
    by = time.monotonic() + SERVES_WITHIN_S
    with contextlib.closing(_Watched(new)) as watched:
        while time.monotonic() < by:
            if listener_pid(path) == new:
                return ""
            if watched.ended(LOOK_EVERY_S):
                return f"the new process (pid {new}) ended before it served; its reason is in this unit's log"
        watched.kill()
    return f"the new process (pid {new}) did not serve within {SERVES_WITHIN_S:g} s and was ended"


class _Watched:
    """A process that is no child of this one."""

    def __init__(self, pid: int) -> None:
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = -1

    def ended(self, within_s: float) -> bool:
        if self._fd < 0:
            return True
        ready, _, _ = select.select([self._fd], [], [], within_s)
        return bool(ready)

    def kill(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _start_orphan(command: list[str]) -> int:
    """A process whose parent has ended, so that it belongs to init. Raises OSError when it cannot be started."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pid = os.posix_spawnp(command[0], command, os.environ, setsid=True)
            os.write(writing, str(pid).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        raise OSError(f"{command[0]} cannot be started")
    return int(said)


def main(arguments: list[str]) -> int:
    socket_path, *command = arguments
    try:
        error = replace(Path(socket_path), command)
    except OSError as failed:
        error = str(failed)
    if error:
        print(f"pantala: not replaced: {error}", file=sys.stderr)
    return 1 if error else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
