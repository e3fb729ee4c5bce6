"""A small disk for tests, that nobody has to unmount: it lives as long as a descriptor of this process.

The file system is mounted and detached at once, so a killed test leaves neither mount nor loop device. It is reached
under `/proc/<pid>/fd/<n>`, also by other processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(work: Path, *, size_mib: int) -> Generator[Path]:
    """A tmpfs of that size, reached through a place below `work`."""
    with _detached(work, ["-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs"]) as root:
        yield root


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
