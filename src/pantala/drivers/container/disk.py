"""The writable layer of a machine: a sparse ext4 image of limited size, copied from a template of that size.

`mke2fs` takes tens of milliseconds, copying the few blocks that it wrote takes one. Nothing in the layer outlives its
machine, so there is no journal. `pantala-init enclose` mounts it where only the machine sees it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import anyio.to_thread

from pantala.errors import DriverError
from pantala.kit.disk import disk_full, is_full

MIB = 1024 * 1024
# Bumped when the commands below change, so that older templates are not used.
TEMPLATE_VERSION = 1
MKE2FS_DEADLINE_S = 60.0
# One inode for so many bytes: images of many small files fit, and the tables stay small.
BYTES_PER_INODE = 16384


def mke2fs_command(path: Path, size_mib: int) -> list[str]:
    return [
        "mke2fs",
        *("-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"),
        *("-i", str(BYTES_PER_INODE), "-I", "256"),
        *("-O", "^has_journal,^resize_inode,sparse_super2,^metadata_csum,uninit_bg"),
        *("-E", "lazy_itable_init=1,nodiscard,packed_meta_blocks=1,root_owner=0:0"),
        str(path),
        f"{size_mib}m",
    ]


class DiskTemplates:
    """Templates by size, made once per host in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def copy_to(self, target: Path, size_mib: int) -> None:
        """A fresh image of `size_mib` at `target`. Raises DriverError, DiskFull."""
        await anyio.to_thread.run_sync(self._copy_to, target, size_mib)

    def _copy_to(self, target: Path, size_mib: int) -> None:
        template = self._folder / f"ext4-v{TEMPLATE_VERSION}-{size_mib}m.img"
        if not template.is_file():
            self._make(template, size_mib)
        try:
            copy_sparse(template, target)
        except OSError as error:
            if is_full(error, target.parent):
                raise disk_full("the writable layer of a machine", target.parent) from error
            raise DriverError(f"the writable layer cannot be made: {error.strerror}") from error

    def _make(self, template: Path, size_mib: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: two callers may make the same size at once, and the later rename changes nothing.
        draft = template.with_name(f"{template.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            done = subprocess.run(
                mke2fs_command(draft, size_mib), capture_output=True, timeout=MKE2FS_DEADLINE_S, check=False
            )
            if done.returncode != 0 and "No space left" in done.stderr.decode(errors="replace"):
                raise disk_full("the writable layer of a machine", self._folder)
            if done.returncode != 0:
                raise DriverError(f"mke2fs failed: {done.stderr.decode(errors='replace').strip()[:500]}")
            draft.rename(template)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DriverError(f"mke2fs failed: {error}") from error
        finally:
            draft.unlink(missing_ok=True)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy only what is written in `source`; holes stay holes."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(source_fd).st_size
            os.ftruncate(target_fd, size)
            at = 0
            while at < size:
                try:
                    at = os.lseek(source_fd, at, os.SEEK_DATA)
                except OSError:  # ENXIO: only a hole is left
                    return
                end = os.lseek(source_fd, at, os.SEEK_HOLE)
                while at < end:
                    chunk = os.pread(source_fd, min(end - at, MIB), at)
                    # Tables come zeroed from mke2fs: leave those blocks out too.
                    if chunk.count(0) != len(chunk):
                        os.pwrite(target_fd, chunk, at)
                    at += len(chunk)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)
