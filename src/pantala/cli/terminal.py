"""This terminal joined to a program elsewhere: raw while it runs, whatever happens as it was afterwards."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import anyio
import anyio.to_thread
import asyncssh

from pantala.kit.tasks import first_error

BLOCK = 64 * 1024
LOST = 255


async def converse(
    connection: asyncssh.SSHClientConnection, command: str | None, *, pty: bool, env: Mapping[str, str]
) -> int:
    """Run it (None: a shell) with our input and output; its exit status, 128 + N after a signal. Raises what asyncssh
    does of a connection that is lost."""
    term = os.environ.get("TERM", "xterm-256color") if pty else None
    process = await connection.create_process(
        command, term_type=term, term_size=_size() if pty else None, env=dict(env), encoding=None
    )
    async with process:
        with _raw(pty), _resizing(process, pty):
            _feed(process)
            async with first_error(), anyio.create_task_group() as tasks:
                tasks.start_soon(_show, process.stdout, sys.stdout.fileno())
                tasks.start_soon(_show, process.stderr, sys.stderr.fileno())
        await process.wait_closed()
    if process.exit_status is not None and process.exit_status >= 0:
        return process.exit_status
    if process.exit_signal is not None:
        number = getattr(signal, f"SIG{process.exit_signal[0]}", None)
        return 128 + int(number) if number else LOST
    return LOST


async def _show(reader: asyncssh.SSHReader[bytes], descriptor: int) -> None:
    while data := await reader.read(BLOCK):
        await anyio.to_thread.run_sync(_write, descriptor, data)


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _feed(process: asyncssh.SSHClientProcess[bytes]) -> None:
    """In a thread that nobody waits for: it may be blocked in a read until long after the program has ended."""
    loop = asyncio.get_running_loop()
    if sys.stdin is None or sys.stdin.closed:
        process.stdin.write_eof()
        return
    descriptor = sys.stdin.fileno()

    async def hand_over(data: bytes) -> None:
        if data:
            process.stdin.write(data)
            await process.stdin.drain()
        else:
            process.stdin.write_eof()

    def read() -> None:
        try:
            while True:
                data = os.read(descriptor, BLOCK)
                asyncio.run_coroutine_threadsafe(hand_over(data), loop).result()
                if not data:
                    return
        except (OSError, RuntimeError, asyncssh.Error, asyncio.CancelledError):
            return  # the program or the connection has ended

    threading.Thread(target=read, daemon=True).start()


@contextmanager
def _raw(pty: bool) -> Generator[None]:
    """Every key goes to the program, Ctrl-C too."""
    if not pty or not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def _resizing(process: asyncssh.SSHClientProcess[bytes], pty: bool) -> Generator[None]:
    if not pty:
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, lambda: process.change_terminal_size(*_size()))
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


def _size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.columns, size.lines
