"""Who serves at a hand-over socket, and what is asked of the supervisor: that a running process gives way to a new one
of the same name (`replace.json`, read once), as `pantala box replace` wants."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import msgspec

_CREDENTIALS = struct.Struct("3i")
LOOK_WITHIN_S = 0.2


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
