"""The real `pantala-init` as PID 1 of a process namespace, without a container: its ring and the reader of it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import pytest
from init_rig import Init

from pantala.drivers import guest, ring
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.guest import ExitRecord, Start, Started, StaticPath, Statics, Status, StatusReply, Stop

pytestmark = [pytest.mark.anyio, pytest.mark.root]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("i")


@pytest.fixture
def init(folder: Path) -> Iterator[Init]:
    made = Init(folder, ring.RING_CAPACITY_MIN)
    yield made
    made.process.kill()
    made.process.wait()


async def test_it_waits_until_it_is_told_to_start(init: Init) -> None:
    reply = await guest.call(init.socket, Status())
    assert isinstance(reply, StatusReply)
    assert (reply.phase, reply.pid) == ("prepared", 0)


async def test_a_reader_beside_a_fast_writer_sees_only_whole_lines(init: Init) -> None:
    """The ring wraps dozens of times while it is read; what is read is in order, what is lost is said."""
    await init.start("i=0; while [ $i -lt 20000 ]; do echo line $i of many, with some length to it; i=$((i+1)); done")
    position, last, lost = 0, -1, 0
    finished = anyio.Event()

    async def wait() -> None:
        await init.code()
        finished.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        while True:
            is_over = finished.is_set()
            part = await anyio.to_thread.run_sync(ring.read, init.ring, position)
            position, lost = part.position, lost + part.lost_bytes
            for record in part.records:
                words = record.text.split()
                assert (words[0], b" ".join(words[2:])) == (b"line", b"of many, with some length to it")
                number = int(words[1])
                assert number > last if lost else number == last + 1 or last == -1
                last = number
            # The oldest records are the ones that are being overwritten at this moment.
            oldest = await anyio.to_thread.run_sync(ring.read, init.ring, 0)
            assert all(record.text.startswith(b"line ") for record in oldest.records)
            if is_over and not part.records:
                break
    assert last == 19999


async def test_long_lines_become_several_and_the_last_partial_one_is_kept(init: Init) -> None:
    await init.start("head -c 40000 /dev/zero | tr '\\0' a; echo; printf end; exit 5")
    assert await init.code() == 5
    part = ring.read(init.ring, 0)
    assert [len(record.text) for record in part.records[-2:]] == [40000 - 2 * 16384, 3]
    record = msgspec.json.decode(init.record.read_bytes(), type=ExitRecord)
    assert (record.exit_code, record.signal, record.requested_stop) == (5, 0, False)


async def test_statics_are_served_beside_the_app_and_end_with_it(init: Init, folder: Path) -> None:
    (folder / "a.txt").write_text("hello")
    port = free_port()
    paths = [StaticPath(url_prefix="/s", guest_path=str(folder))]
    statics = Statics(listen=f"127.0.0.1:{port}", paths=paths)
    start = Start(argv=["/bin/sleep", "1000"], env={"PATH": "/bin"}, statics=statics)
    assert isinstance(await guest.call(init.socket, start), Started)

    async def ask() -> bytes:
        try:
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(b"GET /s/a.txt HTTP/1.1\r\nHost: statics\r\n\r\n")
                said = b""
                while not said.endswith(b"hello"):
                    said += await stream.receive()
                return said
        except (OSError, anyio.EndOfStream):
            return b""

    said = await until(ask, bool, within_s=15, every_s=0.02)
    assert said.startswith(b"HTTP/1.1 200 OK")
    assert said.endswith(b"hello")
    await guest.call(init.socket, Stop(signal=signal.SIGTERM, grace_ms=100))
    await init.code()
    assert await until(ask, lambda said: not said, within_s=15, every_s=0.02) == b""


async def test_what_the_app_leaves_behind_ends_with_it(init: Init) -> None:
    """A child in a session of its own holds the pipes open and ignores everything that can be ignored."""
    flag = init.ring.with_name("child-is-there")
    child = f"trap '' TERM HUP INT; echo child; touch {flag}; sleep 1000"
    await init.start(f'setsid sh -c "{child}" & while [ ! -e {flag} ]; do sleep 0.01; done; echo parent')
    with anyio.fail_after(20):
        assert await init.code() == 0
    assert sorted(record.text for record in ring.read(init.ring, 0).records) == [b"child", b"parent"]


async def test_zombies_are_reaped(init: Init) -> None:
    await init.start("for i in 1 2 3 4 5; do (sh -c 'exit 0' &) ; done; echo done; sleep 1000")
    await until(_lines(init), lambda lines: lines == [b"done"], within_s=10)
    children = Path(f"/proc/{_pid_1(init)}/task/{_pid_1(init)}/children")

    async def states() -> list[str]:
        return [
            Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in children.read_text().split()
        ]

    await until(states, lambda seen: len(seen) == 1 and "Z" not in seen, within_s=10)


async def test_an_unreadable_request_is_refused_and_nothing_else_happens(init: Init) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(init.socket))
        peer.sendall(b'{"type": "dance"}\n{"type": "status"}\n')
        file = peer.makefile()
        assert '"refused"' in file.readline()
        assert '"prepared"' in file.readline()
        file.close()


def _lines(init: Init) -> Callable[[], Awaitable[list[bytes]]]:
    async def look() -> list[bytes]:
        return [record.text for record in ring.read(init.ring, 0).records]

    return look


def _pid_1(init: Init) -> int:
    return int(Path(f"/proc/{init.process.pid}/task/{init.process.pid}/children").read_text().split()[0])
