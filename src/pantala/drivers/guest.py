"""The agent's end of the guest API: one short connection to a machine's PID 1 per call."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import anyio.abc
import msgspec

from pantala.errors import DriverError
from pantala.wire.guest import EXEC_OUTPUT_BYTES_MAX, GuestReply, GuestRequest, TakeCalls

REPLY_BYTES_MAX = 64 * 1024 + 3 * EXEC_OUTPUT_BYTES_MAX  # two outputs in base64
CALL_DEADLINE_S = 5.0
_CALL_BYTES = 256

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(GuestReply).decode


class GuestGone(DriverError):
    """Nobody listens: PID 1 is not there any more."""


async def call(path: Path, request: GuestRequest, *, deadline_s: float = CALL_DEADLINE_S) -> GuestReply:
    """One request, one reply. Raises GuestGone, or DriverError with `retry` when PID 1 does not answer in time."""
    try:
        with anyio.fail_after(deadline_s):
            return await _call(path, request)
    except TimeoutError as error:
        raise DriverError(f"the machine's init did not answer within {deadline_s:g} s", retry=True) from error
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError) as error:
        raise GuestGone("the machine's init is gone", retry=True) from error
    except msgspec.DecodeError as error:
        raise DriverError("the machine's init answered with something unreadable") from error


async def _call(path: Path, request: GuestRequest) -> GuestReply:
    stream = await _connect(path)
    async with stream:
        await stream.send(_encode(request) + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            line += await stream.receive()
            if len(line) > REPLY_BYTES_MAX:
                raise DriverError("the machine's init answered with too much")
    return _decode(line)


async def take_calls(path: Path) -> AsyncGenerator[socket.socket]:
    """Connections that processes of the machine make to the platform, until PID 1 is gone."""
    try:
        async with await _connect(path) as stream:
            await stream.send(_encode(TakeCalls()) + b"\n")
            while True:
                # Never without room for descriptors: what comes with the answer's bytes would be lost.
                _, descriptors = await stream.receive_fds(_CALL_BYTES, 1)
                for descriptor in descriptors:
                    yield socket.socket(fileno=descriptor)
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        return


async def _connect(path: Path) -> anyio.abc.UNIXSocketStream:
    """By way of the folder's descriptor: a socket address holds 108 bytes, paths may be longer."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return await anyio.connect_unix(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
