"""Whether this machine forwards IPv4, which its boxes share: the first notes what was there, the last puts it back."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

SETTING = Path("/proc/sys/net/ipv4/ip_forward")
SHARED = Path("/run/pantala")
"""Of all boxes. Gone after a reboot, as is the setting."""
_NOTE = SHARED / "forwarding-before"
_UPLINK = re.compile(r"pnt\d?-uplink")


def hold() -> None:
    """To be called by a box whose uplink is there; repeats safely."""
    with _alone():
        if not _NOTE.exists():
            fresh = _NOTE.with_suffix(".new")
            fresh.write_text(SETTING.read_text())
            fresh.rename(_NOTE)
        SETTING.write_text("1")


def release() -> None:
    """To be called by a box whose uplink is gone; repeats safely."""
    with _alone():
        if _NOTE.exists() and not any(_UPLINK.fullmatch(name) for _, name in socket.if_nameindex()):
            SETTING.write_text(_NOTE.read_text())
            _NOTE.unlink()


@contextmanager
def _alone() -> Generator[None]:
    SHARED.mkdir(parents=True, exist_ok=True)
    folder = os.open(SHARED, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
