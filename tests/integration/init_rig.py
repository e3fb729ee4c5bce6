"""The real `pantala-init` as PID 1 of a process namespace, without a container."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import anyio.to_thread

from pantala.drivers import guest, ring
from pantala.kit import binaries
from pantala.wire.guest import Start, Started


class Init:
    """PID 1 with a socket, a ring and an exit record, as an enclosure would give them."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.ring, self.socket, self.record = folder / "ring", folder / "init.sock", folder / "exit.json"
        ring.create(self.ring, capacity)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.socket))
        listener.listen()
        fds = [listener.detach()]

        # bash, since other shells know only descriptors of one digit.
        init = binaries.find("pantala-init")
        # It ends with the process that waits for it, and that one with the tests, however they end.
        enclosed = f"setpriv --pdeathsig KILL unshare --pid --fork --mount-proc --kill-child {init}"
        # Signals are as below a shell that has started it in its background, which is not an app's to inherit.
        command = f"trap '' INT QUIT; exec {enclosed} 3<&{fds[0]} 4<>{self.ring} 5<>{self.record}"
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=fds[:1])
        for fd in fds:
            os.close(fd)

    async def start(self, script: str) -> None:
        reply = await guest.call(self.socket, Start(argv=["/bin/sh", "-c", script], env={"PATH": "/usr/bin:/bin"}))
        assert isinstance(reply, Started)

    async def code(self) -> int:
        return await anyio.to_thread.run_sync(self.process.wait, 20)
