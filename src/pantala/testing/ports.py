"""Ports for servers of tests: never one that another test, in whichever process, or an outgoing connection may hold."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

# Below the range from which Linux takes the local port of an outgoing connection (net.ipv4.ip_local_port_range begins
# at 32768): a port that the kernel chose for a probe could be such a connection's by the time its server starts.
FIRST, LAST = 20_000, 31_999


def free_port() -> int:
    """A port that nobody listens on; handed out again only after all others of the range have been."""
    last_given = Path(tempfile.gettempdir()) / f"pantala-test-ports-{os.getuid()}"
    with os.fdopen(os.open(last_given, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the tiers run side by side
        port = int(file.read() or LAST)
        for _ in range(FIRST, LAST + 1):
            port = port + 1 if FIRST <= port < LAST else FIRST
            if _nobody_on(port):
                file.seek(0)
                file.write(str(port))
                return port
    raise AssertionError(f"every port from {FIRST} to {LAST} is taken")


def _nobody_on(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(kind == socket.SOCK_STREAM))
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True
