"""Small disks for tests, gone with the test even when it is killed.

A `CutDisk` is mounted and detached at once: it lives as long as a descriptor of this process and is reached under
`/proc/<pid>/fd/<n>`, also by other processes. A `small_folder` has a place of its own, for what resolves paths.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_folder(place: Path, *, size_mib: int) -> Generator[Path]:
    """A tmpfs at `place`. A guard, whose input ends when this process does, takes it away."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", place], check=True, timeout=60)
    guard = subprocess.Popen(
        ["sh", "-c", 'read -r _; umount --lazy "$1"', "sh", str(place)], stdin=subprocess.PIPE, start_new_session=True
    )
    assert guard.stdin is not None
    try:
        yield place
    finally:
        guard.stdin.close()
        guard.wait(timeout=60)


def fill(folder: Path, *, leave_mib: int = 0) -> Path:
    """Take what is free on the disk of `folder`, but for `leave_mib`; removing the file gives it back."""
    filler = folder / "filler"
    block = bytes(1 << 16)
    found = os.statvfs(folder)
    blocks = (found.f_bavail * found.f_frsize - (leave_mib << 20)) // len(block)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for _ in range(max(blocks, 0)):
            file.write(block)
        while not leave_mib:
            file.write(b"." * 4096)
    return filler


class CutDisk:
    """An ext4 in a file. `cut` is what a power cut at this moment would leave of it."""

    def __init__(self, work: Path, *, size_mib: int = 64) -> None:
        self._work = work
        self._image = work / "disk.img"
        with self._image.open("wb") as file:
            file.truncate(size_mib << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True, timeout=60)

    @contextmanager
    def mounted(self) -> Generator[Path]:
        with _detached(self._work, ["-o", "loop", str(self._image)]) as root:
            yield root

    def cut(self, name: str) -> CutDisk:
        """What has reached the disk until now; the kernel's memory of the rest is not in it."""
        left = CutDisk.__new__(CutDisk)
        left._work, left._image = self._work, self._work / name
        shutil.copyfile(self._image, left._image)
        return left


@contextmanager
def _detached(work: Path, arguments: list[str]) -> Generator[Path]:
    place = work / "place"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, place], check=True, timeout=60)
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True, timeout=60)
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)
