"""The supervisor as a process: order, restarts, reloads, and ends of every kind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from pantala.host.replacing import Wanted, listener_pid, want
from pantala.host.stop import stop_processes
from pantala.host.supervisor import Process, Status, read_status, save_processes, start_time
from pantala.testing.poll import until_sync

WITHIN_S = 20.0


class Rig:
    """A folder, the story that its processes write into it, and at most one supervisor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.story_file = folder / "story"
        self.supervisor: subprocess.Popen[bytes] | None = None

    def process(self, name: str, *, after: tuple[str, ...] = (), reload_on: tuple[str, ...] = ()) -> Process:
        """Tells when it starts, is told to read again and ends; ready half a step later."""
        script = (
            f'say() {{ echo "$1 {name}" >> {self.story_file}; }}\n'
            f"trap 'say ends; exit 0' TERM\n"
            f"trap 'say reads' HUP\n"
            f"say starts; touch {self.folder}/{name}.ready\n"
            "while :; do sleep 0.05 & wait $!; done\n"
        )
        return Process(
            name=name,
            command=["sh", "-c", script],
            netns="",
            env={"PATH": os.environ["PATH"]},
            log=str(self.folder / f"{name}.log"),
            ready=f"file:{self.folder}/{name}.ready",
            after=list(after),
            reload_on=list(reload_on),
        )

    def start(self, *processes: Process) -> None:
        save_processes(self.folder, list(processes))
        self.supervisor = subprocess.Popen(
            [sys.executable, "-m", "pantala.host.supervisor", str(self.folder)], start_new_session=True
        )
        until_sync(self.status, lambda seen: {p.state for p in seen.processes} == {"ready"}, within_s=WITHIN_S)

    def status(self) -> Status:
        return read_status(self.folder) or Status(supervisor=0, processes=[])

    def pids(self) -> dict[str, int]:
        return {process.name: process.pid for process in self.status().processes}

    def story(self) -> list[str]:
        return self.story_file.read_text().splitlines()


@pytest.fixture
def rig(tmp_path: Path) -> Generator[Rig]:
    made = Rig(tmp_path)
    yield made
    stop_processes(made.status())
    if made.supervisor is not None:
        made.supervisor.wait(timeout=WITHIN_S)


def test_each_starts_after_those_it_names_and_ends_before_them(rig: Rig) -> None:
    rig.start(rig.process("proxy", after=("agent",)), rig.process("bus"), rig.process("agent", after=("bus",)))
    stop_processes(rig.status())
    assert rig.story() == [f"{verb} {name}" for verb, names in
                           (("starts", ("bus", "agent", "proxy")), ("ends", ("proxy", "agent", "bus")))
                           for name in names]  # fmt: skip
    assert {process.state for process in rig.status().processes} == {"stopped"}


def test_what_dies_is_started_again_and_alone(rig: Rig) -> None:
    rig.start(rig.process("bus"), rig.process("agent", after=("bus",)))
    before = rig.pids()
    os.kill(before["bus"], signal.SIGKILL)
    after = until_sync(rig.pids, lambda seen: seen["bus"] not in (0, before["bus"]), within_s=WITHIN_S)
    assert after["agent"] == before["agent"]
    restarts = {process.name: process.restarts for process in rig.status().processes}
    assert restarts == {"bus": 1, "agent": 0}


def test_a_process_is_told_when_its_files_were_renewed(rig: Rig) -> None:
    certificate = rig.folder / "node.pem"
    certificate.write_text("old")
    rig.start(rig.process("bus", reload_on=(str(certificate),)), rig.process("agent"))
    fresh = rig.folder / "node.pem.new"
    fresh.write_text("renewed")
    fresh.rename(certificate)
    until_sync(rig.story, lambda told: "reads bus" in told, within_s=WITHIN_S)
    assert "reads agent" not in rig.story()


def test_children_of_a_killed_supervisor_are_found_and_ended(rig: Rig) -> None:
    rig.start(rig.process("bus"), rig.process("agent", after=("bus",)))
    children = rig.pids()
    assert rig.supervisor is not None
    rig.supervisor.kill()
    rig.supervisor.wait(timeout=WITHIN_S)
    assert all(start_time(pid) for pid in children.values())  # they go on: their work is not the supervisor's
    stop_processes(rig.status())
    until_sync(lambda: [start_time(pid) for pid in children.values()], lambda seen: not any(seen), within_s=WITHIN_S)


# -- one process in the place of another ---------------------------------------------------------------------------

REPLACEABLE = """
import os, signal, socket, sys, time
path, story = sys.argv[1:3]
if os.path.exists(path + ".bad") and "--replace" in sys.argv:
    sys.exit(3)
ears = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
ears.bind(path + ".new")
ears.listen()
os.rename(path + ".new", path)
mine = os.stat(path).st_ino
while not os.path.exists(f"{path}.end.{os.getpid()}"):
    if os.path.exists(path + ".empty") and os.stat(path).st_ino != mine:
        sys.exit()
    time.sleep(0.001)
"""


def replaceable(rig: Rig) -> Process:
    path = str(rig.folder / "replace.sock")
    return Process(
        name="proxy",
        command=[sys.executable, "-c", REPLACEABLE, path, str(rig.story_file)],
        netns="",
        env={"PATH": os.environ["PATH"]},
        log=str(rig.folder / "proxy.log"),
        ready="",
        replace=path,
    )


def replace(rig: Rig, wish: str) -> str:
    """The outcome's error."""
    want(rig.folder, Wanted(id=wish, names=["proxy"]))
    seen = until_sync(rig.status, lambda seen: seen.processes[0].outcome.id == wish, within_s=WITHIN_S)
    return seen.processes[0].outcome.error


def test_a_replaced_process_ends_by_itself_and_the_new_one_is_kept_running(rig: Rig) -> None:
    rig.start(replaceable(rig))
    until_sync(lambda: listener_pid(rig.folder / "replace.sock"), bool, within_s=WITHIN_S)
    first = rig.pids()["proxy"]
    assert replace(rig, "one") == ""
    second = rig.pids()["proxy"]
    assert second != first
    assert rig.status().processes[0].beside[0] == (first, start_time(first))
    assert start_time(first), "it goes on until it is empty"
    (rig.folder / f"replace.sock.end.{first}").touch()
    until_sync(lambda: start_time(first), lambda at: at == 0, within_s=WITHIN_S)
    assert rig.pids()["proxy"] == second
    os.kill(second, signal.SIGKILL)
    until_sync(rig.pids, lambda pids: pids["proxy"] not in (0, second), within_s=WITHIN_S)


def test_an_old_one_that_has_nothing_to_do_ends_at_once(rig: Rig) -> None:
    rig.start(replaceable(rig))
    until_sync(lambda: listener_pid(rig.folder / "replace.sock"), bool, within_s=WITHIN_S)
    (rig.folder / "replace.sock.empty").touch()
    for wish in ("one", "two", "three"):
        before = rig.pids()["proxy"]
        assert replace(rig, wish) == ""
        until_sync(lambda pid=before: start_time(pid), lambda at: at == 0, within_s=WITHIN_S)
        assert rig.pids()["proxy"] == listener_pid(rig.folder / "replace.sock") != before
    assert rig.status().processes[0].restarts == 0


def test_a_new_process_that_fails_changes_nothing_and_what_is_left_over_ends_with_the_rest(rig: Rig) -> None:
    rig.start(replaceable(rig))
    until_sync(lambda: listener_pid(rig.folder / "replace.sock"), bool, within_s=WITHIN_S)
    first = rig.pids()["proxy"]
    (rig.folder / "replace.sock.bad").touch()
    assert "the new process failed" in replace(rig, "one")
    assert rig.pids()["proxy"] == first
    (rig.folder / "replace.sock.bad").unlink()
    assert replace(rig, "two") == ""
    stop_processes(rig.status())
    assert start_time(first) == 0
