"""A BuildKit that does not answer any more: it is restarted, and the build ends after all or says why not.

BuildKit's programs are stand-ins: what makes the real ones hang cannot be called up.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from pantala.builds.service import BuildkitBuilder
from pantala.kit.secret import Secret
from pantala.testing.poll import until_sync
from pantala.wire.api import BuildEvent, BuildOptions

pytestmark = pytest.mark.anyio

DAEMON = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    listener.accept()
"""
# Hangs after its only step, as often as the file says; then ends well.
BUILDCTL = """#!/bin/sh
echo '{{"vertexes":[{{"digest":"sha256:1","name":"[1/1] FROM a","started":"2026-01-01T00:00:00Z","completed":"2026-01-01T00:00:01Z"}}]}}' >&2
left=$(cat {left})
echo $((left - 1)) >{left}
[ "$left" -gt 0 ] && exec sleep 60
for argument; do case $argument in --metadata-file=*) echo '{{"containerimage.digest":"sha256:2"}}' >"${{argument#*=}}" ;; esac; done
"""  # noqa: E501


class Daemon:
    """Listens on `path`, and is started again whenever it ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.starts = path, 0
        self._closed = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()
        until_sync(self._answers, bool, within_s=10)

    def close(self) -> None:
        self._closed.set()
        if self._process is not None:
            self._process.kill()
        self._keeper.join(timeout=10)

    def _keep(self) -> None:
        while not self._closed.is_set():
            self.path.unlink(missing_ok=True)
            self.starts += 1
            self._process = subprocess.Popen([sys.executable, "-c", DAEMON, str(self.path)])
            self._process.wait()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.path)) == 0


@pytest.fixture
def daemon(tmp_path: Path) -> Generator[Daemon]:
    daemon = Daemon(tmp_path / "buildkitd.sock")
    try:
        yield daemon
    finally:
        daemon.close()


async def built(daemon: Daemon, work: Path, monkeypatch: pytest.MonkeyPatch, *, hangs: int) -> list[BuildEvent]:
    left, program = work / "left", work / "bin" / "buildctl"
    left.write_text(str(hangs))
    program.parent.mkdir()
    program.write_text(BUILDCTL.format(left=left))
    program.chmod(0o755)
    monkeypatch.setenv("PANTALA_BIN_DIR", str(program.parent))
    quiet_s = 3.0 if hangs else 60.0
    builder = BuildkitBuilder(socket=daemon.path, push_registry="r:1", registry_name="registry", quiet_s=quiet_s)
    events = builder.build(
        app="web", context_dir=work, options=BuildOptions(), image="registry/web:1", push_token=Secret("t")
    )
    return [event async for event in events]


async def test_a_builder_that_hangs_is_restarted_and_builds_again(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = await built(daemon, tmp_path, monkeypatch, hangs=1)
    assert daemon.starts == 2
    assert (events[-1].type, events[-1].digest) == ("done", "sha256:2")
    assert any("restarted" in event.text for event in events)


async def test_a_build_that_hangs_again_fails_and_says_so(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = await built(daemon, tmp_path, monkeypatch, hangs=2)
    assert daemon.starts == 2
    assert (events[-1].type, events[-1].text) == (
        "failed",
        "the builder does not answer; its operator finds why in buildkitd.log",
    )


async def test_a_build_that_ends_leaves_the_builder_alone(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = await built(daemon, tmp_path, monkeypatch, hangs=0)
    assert [event.type for event in events] == ["step", "done"]
    assert daemon.starts == 1
