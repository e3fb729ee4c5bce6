"""How systemd's unit of the proxy replaces its process: the reload's helper, and what systemd hears at its socket."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from proxy_rig import WITHIN_S, Rig, running

from pantala.host import systemd
from pantala.host.replacing import listener_pid
from pantala.host.supervisor import Process
from pantala.kit import binaries
from pantala.testing.poll import until

pytestmark = pytest.mark.anyio


class Notified:
    """Plays systemd: hears what processes of the unit say, and who says it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.settimeout(WITHIN_S)
        self._socket.bind(os.fspath(path))

    async def hear(self) -> tuple[dict[str, str], int]:
        text, beside, _, _ = await anyio.to_thread.run_sync(self._socket.recvmsg, 4096, 64)
        said = dict(line.split("=", 1) for line in text.decode().splitlines())
        return said, int.from_bytes(beside[0][2][:4], sys.byteorder)

    def silent(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(WITHIN_S)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notified]:
    made = Notified(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    yield made
    made.close()


@pytest.fixture
async def rig(tmp_path: Path, notified: Notified) -> AsyncIterator[Rig]:
    async with running(tmp_path, drain_max_ms=2_000) as rig:
        try:
            yield rig
        finally:
            if (pid := serving(rig)) > 0:
                os.kill(pid, 9)


def serving(rig: Rig) -> int:
    return listener_pid(rig.folder / "state" / "replace.sock")


async def reload(rig: Rig, settings: Path) -> int:
    """As `ExecReload` of the unit does."""
    command = [str(binaries.find("pantala-proxy")), "--settings", str(settings), "--replace"]
    path = str(rig.folder / "state" / "replace.sock")
    with (rig.folder / "proxy.log").open("ab") as log:
        helper = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pantala.host.replacing", path, *command, stdout=log, stderr=log
        )
    return await asyncio.wait_for(helper.wait(), WITHIN_S)


async def test_a_reload_replaces_the_main_process(rig: Rig, notified: Notified) -> None:
    assert rig.process is not None
    old = rig.process.pid
    assert await notified.hear() == ({"READY": "1", "MAINPID": str(old)}, old)
    assert await reload(rig, rig.folder / "proxy.json") == 0
    new = serving(rig)
    assert new not in (0, old)
    # The old one was told to leave only after this, so systemd never sees its main process end.
    assert await notified.hear() == ({"READY": "1", "MAINPID": str(new)}, new)
    assert await asyncio.wait_for(rig.process.wait(), WITHIN_S) == 0
    assert notified.silent(), "one that was replaced does not speak for the unit"
    assert parent(new) != os.getpid(), "it belongs to init, and not to the helper"
    os.kill(new, 15)
    assert await notified.hear() == ({"STOPPING": "1"}, new)
    await until(lambda: gone(new), bool, within_s=WITHIN_S, every_s=0.02)


async def test_a_reload_that_fails_says_so_and_changes_nothing(rig: Rig, notified: Notified) -> None:
    assert rig.process is not None
    await notified.hear()
    bad = rig.folder / "bad.json"
    bad.write_text((rig.folder / "proxy.json").read_text().replace("127.0.0.1", "192.0.2.1"))
    assert await reload(rig, bad) == 1
    said = (rig.folder / "proxy.log").read_text()
    assert "cannot listen on 192.0.2.1" in said
    assert "pantala: not replaced: the new process (pid " in said
    assert (serving(rig), notified.silent()) == (rig.process.pid, True)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # init of a test's container need not collect it


# -- the unit ----------------------------------------------------------------------------------------------------


def process(name: str, **more: Any) -> Process:
    command = ["/bin/true", "--settings", "/p.json"]
    return Process(name=name, command=command, netns="", env={}, log="", **more)


def test_the_proxy_s_unit_is_reloaded_by_a_replacement() -> None:
    files = systemd.units([process("proxy", replace="/state/replace.sock"), process("agent")], before_builds=[])
    lines = files["pantala-proxy.service"].splitlines()
    assert {"Type=notify", "NotifyAccess=all", "KillMode=mixed", "Restart=always"} <= set(lines)
    assert (
        f'ExecReload="{sys.executable}" "-m" "pantala.host.replacing" "/state/replace.sock" "/bin/true" "--settings" '
        '"/p.json" "--replace"'
    ) in lines
    assert {"Type=exec", "KillMode=process"} <= set(files["pantala-agent.service"].splitlines())


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        return  # a machine without systemd has no units
    files = systemd.units([process("proxy", replace="/state/replace.sock"), process("agent")], before_builds=[])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in files]
    command = ["systemd-analyze", "verify", "--recursive-errors=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in done.stderr.splitlines() if "pantala" in line]
    assert (done.returncode, ours) == (0, [])
