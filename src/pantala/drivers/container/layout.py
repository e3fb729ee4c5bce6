"""Where a machine's files are, and how its PID 1 is found again. All names come from the machine's id.

<state_dir>/machines/<id>/   machine.json  disk.img  volume-N.img  ring  exit.json
                             (disk; exit.json is synced; where a root is kept the first two stay when the machine ends)
<run_dir>/machines/<id>/     attempt  init.sock  console  loop  pid.json (meaningless after a reboot)
<state_dir>/templates/       empty ext4 images by size
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
from pathlib import Path

import msgspec

from pantala.errors import InternalError
from pantala.kit.boot import boot_id
from pantala.kit.files import write_private
from pantala.wire.guest import ExitRecord

_MACHINE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
EXIT_RECORD_BYTES_MAX = 16 * 1024


class MachineFile(msgspec.Struct, frozen=True, kw_only=True):
    """`machine.json`: written first, so that whatever follows has an owner."""

    machine_id: str
    instance_id: str
    uid_base: int
    keeps_root: bool = False
    """The disk outlives what runs now."""


class PidFile(msgspec.Struct, frozen=True, kw_only=True):
    """`pid.json`: written by the helper once PID 1 is there."""

    pid: int
    start_ticks: int
    boot_id: str


class MachineFolder:
    def __init__(self, *, state_dir: Path, run_dir: Path, machine_id: str) -> None:
        if not _MACHINE_ID.fullmatch(machine_id):
            raise InternalError(f"{machine_id!r} cannot name a machine's files")
        self.state = state_dir / "machines" / machine_id
        self.run = run_dir / "machines" / machine_id
        self.machine_file = self.state / "machine.json"
        self.disk = self.state / "disk.img"
        self.ring = self.state / "ring"
        self.exit_record = self.state / "exit.json"
        self.socket = self.run / "init.sock"
        self.attempt = self.run / "attempt"
        self.console = self.run / "console"
        self._loop_file = self.run / "loop"
        self._pid_file = self.run / "pid.json"

    def create(self, machine: MachineFile, attempt: str) -> None:
        """Beside a disk that is gone on with, or where nothing is."""
        for folder in (self.state, self.run):
            folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        if machine.keeps_root:  # whole at any moment: whether there is a disk to go on with hangs on it
            write_private(self.machine_file, msgspec.json.encode(machine))
        else:
            self.machine_file.write_bytes(msgspec.json.encode(machine))
        self.attempt.write_text(attempt)

    def kept(self) -> MachineFile | None:
        """Whose the disk is that an ended run was to leave; None where there is none."""
        machine = self.read_machine()
        return machine if machine is not None and machine.keeps_root and self.disk.exists() else None

    def clear(self) -> None:
        """Everything but a disk that is kept, and whose it is."""
        if self.kept() is None:
            self.remove()
            return
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.run)
        for path in self.state.iterdir():
            if path not in (self.machine_file, self.disk):
                path.unlink()

    def remove(self) -> None:
        """The state last: while it is there, `list` names the machine."""
        for folder in (self.run, self.state):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)

    def exists(self) -> bool:
        return self.state.exists() or self.run.exists()

    def read_machine(self) -> MachineFile | None:
        try:
            return msgspec.json.decode(self.machine_file.read_bytes(), type=MachineFile)
        except (OSError, msgspec.DecodeError):  # a crash while it was written: nothing was made yet
            return None

    def read_pid(self) -> PidFile | None:
        try:
            return msgspec.json.decode(self._pid_file.read_bytes(), type=PidFile)
        except (OSError, msgspec.DecodeError):  # written by rename: not there or whole
            return None

    def volume_disk(self, index: int) -> Path:
        return self.state / f"volume-{index}.img"

    def disks(self) -> set[str]:
        return {str(path) for path in self.state.glob("*.img")}

    def read_loops(self) -> list[str] | None:
        """Names of the loop devices under the disks; None if the helper never came so far."""
        try:
            return self._loop_file.read_text().split() or None
        except OSError:
            return None

    def read_exit(self) -> ExitRecord | None:
        try:
            with self.exit_record.open("rb") as file:
                return msgspec.json.decode(file.read(EXIT_RECORD_BYTES_MAX), type=ExitRecord)
        except (OSError, msgspec.DecodeError):  # init was killed before or while it wrote
            return None


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def open_pidfd(recorded: PidFile) -> int | None:
    """A descriptor of exactly the recorded process, None if it is gone (or a zombie): numbers are given again, so the
    start time is compared after the descriptor holds on to whatever has the number now."""
    if recorded.boot_id != boot_id():
        return None
    try:
        pidfd = os.pidfd_open(recorded.pid)
    except OSError:
        return None
    if start_ticks(recorded.pid) != recorded.start_ticks or has_ended(pidfd):
        os.close(pidfd)
        return None
    return pidfd


def has_ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
