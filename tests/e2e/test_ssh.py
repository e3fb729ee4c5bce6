"""Logging in to a machine of the shared box with the CLI, as a user without a place in the private network."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from probe_rig import deploy_probe

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

APP = "desk"


@pytest.fixture(scope="module")
def desk(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    deploy_probe(box, tmp_path_factory.mktemp("desk"), APP)
    yield APP
    box.pantala("apps", "destroy", APP, "--yes")


def test_a_command_runs_where_the_app_is(box: BoxRig, desk: str) -> None:
    machine = box.machines(desk)[0]["id"]
    script = "echo $FLY_MACHINE_ID $FLY_APP_NAME; id -un; echo oops >&2; exit 5"
    done = box.pantala("ssh", "console", "-a", desk, "--machine", machine, "-C", script, check=False)
    assert (done.code, done.stdout) == (5, f"{machine} {desk}\nroot\n")
    assert "oops" in done.output


def test_files_are_copied_there_and_back(box: BoxRig, desk: str, tmp_path: Path) -> None:
    machine = box.machines(desk)[0]["id"]
    sent, back = tmp_path / "sent", tmp_path / "back"
    sent.write_bytes(os.urandom(2_000_000))
    where = ("-a", desk, "--machine", machine)
    box.pantala("ssh", "sftp", "put", str(sent), "/tmp/there", *where)
    assert "/tmp/there" in box.pantala("ssh", "sftp", "find", "/tmp", *where).stdout
    box.pantala("ssh", "sftp", "get", "/tmp/there", str(back), *where)
    assert back.read_bytes() == sent.read_bytes()


def test_the_file_shell_works_from_a_pipe(box: BoxRig, desk: str) -> None:
    commands = "cd /tmp\nmkdir -p a/b\nput /etc/hostname a/b/name\nls a/b\nrm -R a\npwd\n"
    done = subprocess.run(
        [sys.executable, "-m", "pantala.cli.main", "ssh", "sftp", "shell", "-a", desk],
        input=commands,
        env=box.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "name\n/tmp\n"), done.stderr


def test_a_terminal_here_is_a_terminal_there(box: BoxRig, desk: str) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-m", "pantala.cli.main", "ssh", "console", "-a", desk]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=box.environment, start_new_session=True
    )
    try:
        read_until(master, b"# ")
        os.write(master, b"stty size; exit 6\n")
        read_until(master, b"33 99")
        assert process.wait(20) == 6
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)


def read_until(descriptor: int, wanted: bytes, within_s: float = 20.0) -> None:
    heard, deadline = b"", time.monotonic() + within_s
    while wanted not in heard:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"{wanted!r} did not come; heard: {heard!r}"
        heard += os.read(descriptor, 4096)
