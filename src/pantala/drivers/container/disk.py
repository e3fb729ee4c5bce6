"""The writable layer of a machine: a sparse ext4 image of limited size, copied from a template of that size.

`mke2fs` takes tens of milliseconds, copying the few blocks that it wrote takes one. A layer that ends with what runs
has no journal; one that is kept has, and may grow. `pantala-init enclose` mounts it where only the machine sees it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import anyio.to_thread

from pantala.errors import DriverError
from pantala.kit.clock import Clock
from pantala.kit.disk import disk_full, is_full

MIB = 1024 * 1024
# Bumped when the commands below change, so that older templates are not used.
TEMPLATE_VERSION = 1
MKE2FS_DEADLINE_S = 60.0
GROWS_WITHIN_S = 300.0
JOURNAL_MIB = 16
# One inode for so many bytes: images of many small files fit, and the tables stay small.
BYTES_PER_INODE = 16384


# Nothing that has to be found again.
_FLEETING = (
    *("-O", "^has_journal,^resize_inode,sparse_super2,^metadata_csum,uninit_bg"),
    *("-E", "lazy_itable_init=1,nodiscard,packed_meta_blocks=1,root_owner=0:0"),
)
# Whole after a power cut, with room for the tables of a larger one.
_LASTING = (
    *("-O", "has_journal,resize_inode,^metadata_csum,uninit_bg", "-J", f"size={JOURNAL_MIB}"),
    *("-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"),
)


def mke2fs_command(path: Path, size_mib: int, *, lasting: bool = False) -> list[str]:
    return [
        "mke2fs",
        *("-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"),
        *("-i", str(BYTES_PER_INODE), "-I", "256"),
        *(_LASTING if lasting else _FLEETING),
        str(path),
        f"{size_mib}m",
    ]


class DiskTemplates:
    """Templates by size, made once per host in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def copy_to(self, target: Path, size_mib: int, *, lasting: bool = False) -> None:
        """A fresh image of `size_mib` at `target`, whole or not at all. Raises DriverError, DiskFull."""
        await anyio.to_thread.run_sync(self._copy_to, target, size_mib, lasting)

    def _copy_to(self, target: Path, size_mib: int, lasting: bool) -> None:
        kind = "lasting-" if lasting else ""
        template = self._folder / f"ext4-{kind}v{TEMPLATE_VERSION}-{size_mib}m.img"
        if not template.is_file():
            self._make(template, size_mib, lasting)
        draft = target.with_name(f"{target.name}.new")
        try:
            copy_sparse(template, draft, sync=lasting)
            draft.rename(target)
        except OSError as error:
            if is_full(error, target.parent):
                raise disk_full("the writable layer of a machine", target.parent) from error
            raise DriverError(f"the writable layer cannot be made: {error.strerror}") from error

    def _make(self, template: Path, size_mib: int, lasting: bool) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # A name of its own: two callers may make the same size at once, and the later rename changes nothing.
        draft = template.with_name(f"{template.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            done = subprocess.run(
                mke2fs_command(draft, size_mib, lasting=lasting),
                capture_output=True,
                timeout=MKE2FS_DEADLINE_S,
                check=False,
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


async def grow(disk: Path, size_mib: int, clock: Clock) -> None:
    """A lasting image that nothing uses has at least `size_mib`. Raises DriverError.

    The tools work on the image where it is. They inherit its lock, so that whoever comes after a caller that was killed
    waits until they are done.
    """
    descriptor = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        give_up_at = clock.monotonic() + GROWS_WITHIN_S
        while not _lock(descriptor):
            if clock.monotonic() > give_up_at:
                raise DriverError(f"{disk} is still being made larger", retry=True)
            await clock.sleep(0.05)
        if _filesystem_bytes(descriptor) < size_mib * MIB:
            await anyio.to_thread.run_sync(_resize, disk, descriptor, size_mib)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _filesystem_bytes(descriptor: int) -> int:
    """As ext4's superblock has it."""
    superblock = os.pread(descriptor, 32, 1024)
    blocks, log_block_bytes = (int.from_bytes(superblock[at : at + 4], "little") for at in (4, 24))
    return blocks << (10 + log_block_bytes)


def _resize(disk: Path, descriptor: int, size_mib: int) -> None:
    os.ftruncate(descriptor, max(size_mib * MIB, os.fstat(descriptor).st_size))
    # `e2fsck` says with 1 that it had something to correct, and did.
    for command, good in ((["e2fsck", "-f", "-p", str(disk)], 1), (["resize2fs", str(disk)], 0)):
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=GROWS_WITHIN_S,
                check=False,
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DriverError(f"the root disk cannot be made larger: {error}") from error
        if done.returncode > good or done.returncode < 0:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()[:500]
            raise DriverError(f"the root disk cannot be made larger: {command[0]}: {said}")


def copy_sparse(source: Path, target: Path, *, sync: bool = False) -> None:
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
                    break
                end = os.lseek(source_fd, at, os.SEEK_HOLE)
                while at < end:
                    chunk = os.pread(source_fd, min(end - at, MIB), at)
                    # Tables come zeroed from mke2fs: leave those blocks out too.
                    if chunk.count(0) != len(chunk):
                        os.pwrite(target_fd, chunk, at)
                    at += len(chunk)
            if sync:
                os.fsync(target_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)
