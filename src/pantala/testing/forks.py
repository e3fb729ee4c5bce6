"""The CLI as a process of its own, forked from one that has its libraries: it starts in 10 ms instead of 300.

    with commands() as forks:
        ended = await forks.run("apps", "list", env=…, folder=…)

The other program is this file (`python -m pantala.testing.forks`), whose standard input is a socket: each message on it
is a command with its descriptors, and each command is a fork that runs `main` and ends as a process does. It has no
threads and knows no module of a command, so that a command that forgets an import fails here too.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

LIBRARIES = (
    "anyio._backends._asyncio",
    "asyncssh",
    "click",
    "httpcore2",
    "httpx2",
    "msgspec",
    "truststore",
    "pantala.client.api",
    "pantala.cli.main",
)
WITHIN_S = 60.0
STDIN_BYTES_MAX = 65_536
"""What a pipe takes at once."""
DESCRIPTORS_MAX = 65_536


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    out: str
    err: str


class Forks:
    """Several commands may run at a time."""

    def __init__(self, door: socket.socket) -> None:
        self._door = door

    async def run(self, *arguments: str, env: Mapping[str, str], folder: Path, stdin: str = "") -> Ended:
        """Killed when it takes longer than `WITHIN_S`, and when the caller is cancelled."""
        ends = [os.pipe() for _ in range(4)]
        (in_read, in_write), (out_read, out_write), (err_read, err_write), (told_read, told_write) = ends
        try:
            text = stdin.encode()
            assert len(text) <= STDIN_BYTES_MAX
            os.write(in_write, text)
            message = json.dumps({"arguments": arguments, "env": dict(env), "folder": str(folder)}).encode()
            socket.send_fds(self._door, [message], [in_read, out_write, err_write, told_write])
        finally:
            for descriptor in (in_read, in_write, out_write, err_write, told_write):
                os.close(descriptor)
        said: dict[int, bytearray] = {out_read: bytearray(), err_read: bytearray(), told_read: bytearray()}
        try:
            with anyio.fail_after(WITHIN_S):
                async with anyio.create_task_group() as tasks:
                    for descriptor, into in said.items():
                        tasks.start_soon(_read, descriptor, into)
        finally:
            told = said[told_read].split()
            if len(told) == 1:  # its process id and not yet its end
                os.kill(int(told[0]), signal.SIGKILL)
            for descriptor in said:
                os.close(descriptor)
        assert len(told) == 2, "the program that forks has ended"
        code = os.waitstatus_to_exitcode(int(told[1]))
        return Ended(code=code, out=said[out_read].decode(), err=said[err_read].decode())


async def _read(descriptor: int, into: bytearray) -> None:
    """Until nobody writes any more."""
    while True:
        await anyio.wait_readable(descriptor)
        chunk = os.read(descriptor, 65_536)
        if not chunk:
            return
        into += chunk


@contextmanager
def commands() -> Generator[Forks]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(ours):
        with closing(theirs):
            program = subprocess.Popen([sys.executable, "-m", "pantala.testing.forks"], stdin=theirs.fileno())
        try:
            yield Forks(ours)
        finally:
            ours.close()  # it ends by that
            program.wait(timeout=WITHIN_S)


# -- the other program -------------------------------------------------------------------------------------------------


def serve(door: socket.socket) -> None:
    """Until its other end is closed. In a fork it returns after the command's end has been raised."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    ears = selectors.DefaultSelector()
    ears.register(door, selectors.EVENT_READ)
    while True:
        for key, _ in ears.select():
            if key.fileobj is not door:
                pid, told = key.data
                _tell(told, f" {os.waitpid(pid, 0)[1]}")
                ears.unregister(key.fd)
                os.close(key.fd)
                os.close(told)
                continue
            message, descriptors, _, _ = socket.recv_fds(door, 262_144, 4)
            if not message:
                return
            *streams, told = descriptors
            pid = os.fork()
            if pid == 0:
                door.close()
                ears.close()
                _become(message, streams)
            for descriptor in streams:
                os.close(descriptor)
            _tell(told, str(pid))
            ears.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, told))


def _tell(descriptor: int, text: str) -> None:
    with suppress(BrokenPipeError):  # given up meanwhile
        os.write(descriptor, text.encode())


def _become(message: bytes, streams: list[int]) -> None:
    """Ends as `python -m pantala.cli.main` would: by SystemExit or with a traceback."""
    wanted = json.loads(message)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    os.closerange(3, DESCRIPTORS_MAX)  # also what belongs to commands that run still
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    sys.argv = ["pantala", *wanted["arguments"]]
    from pantala.cli.main import main

    main()


if __name__ == "__main__":
    serve(socket.socket(fileno=os.dup(0)))
