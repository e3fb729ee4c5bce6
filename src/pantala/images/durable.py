"""Which layers survived: a layer that may have lost content in a power cut is never used again.

    <root>/marks/<sha256 of the blob>      `on disk`, or the id of the boot in which the layer was unpacked

Unpacking waits for no disk. A fresh layer carries the id of the running boot, so any agent of this boot may use it: the
kernel has the rest of it. Behind the agent's back `settle` writes the file system out, for many layers at once, and
marks them `on disk`. What carries another boot's id, or no mark, was cut off and is removed before anything uses it. A
mark that was itself lost costs a pull, nothing else.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from pantala.kit.boot import boot_id
from pantala.kit.clock import Clock
from pantala.kit.ids import ulid

log = structlog.get_logger()

ON_DISK = "on disk"
SETTLE_AFTER_S = 5.0
"""A deploy unpacks its layers and starts its machines in less: the disk is theirs until then, and one sync does."""
AGAIN_AFTER_S = 60.0


class Marks:
    """`work`: a folder of the same file system for what is on its way; `boot`: tests play a power cut with another."""

    def __init__(self, root: Path, work: Path, *, boot: str = "") -> None:
        self._layers = root / "layers"
        self._folder = root / "marks"
        self._work = work
        self._boot = boot or boot_id()
        self._more = anyio.Event()
        if not self._folder.exists():
            self._begin(root)
        self._fresh = {layer.name for layer in self._layers.iterdir() if self._mark(layer.name) == self._boot}
        if self._fresh:
            self._more.set()

    def _begin(self, root: Path) -> None:
        """Layers from before there were marks had been synced when they got their name."""
        made = self._work / ulid()
        made.mkdir(mode=0o700)
        for layer in self._layers.iterdir():
            (made / layer.name).write_text(ON_DISK)
        made.rename(self._folder)
        with _opened(root) as descriptor:
            os.fsync(descriptor)

    def drop_lost(self) -> list[str]:
        """Move layers that nobody can vouch for out of the way, and forget marks without a layer; the names moved."""
        lost: list[str] = []
        for layer in sorted(self._layers.iterdir()):
            if self._mark(layer.name) not in (ON_DISK, self._boot):
                layer.rename(self._work / ulid())
                lost.append(layer.name)
        for mark in self._folder.iterdir():
            if not (self._layers / mark.name).exists():
                mark.unlink()
        return lost

    def add(self, name: str) -> None:
        """This layer is whole, and no more than that. To be called before it gets its place."""
        (self._folder / name).write_text(self._boot)
        self._fresh.add(name)
        self._more.set()

    def forget(self, name: str) -> None:
        """To be called before the layer leaves its place."""
        self._fresh.discard(name)
        (self._folder / name).unlink(missing_ok=True)

    async def run(self, clock: Clock) -> None:
        """Until cancelled: bring fresh layers to the disk, one sync at a time."""
        while True:
            await self._more.wait()
            await clock.sleep(SETTLE_AFTER_S)
            try:
                await self.settle()
            except OSError as error:
                log.warning("layers are not known to be on disk; tried again later", error=str(error))
                self._more.set()
                await clock.sleep(AGAIN_AFTER_S)

    async def settle(self) -> None:
        """All layers that are fresh now are on disk when it returns. Raises OSError: then none is marked."""
        self._more = anyio.Event()
        batch, self._fresh = self._fresh, set()
        if not batch:
            return
        try:
            await self._sync()
            for name in batch - self._fresh:  # in both: removed and unpacked again while the disk was busy
                if (self._folder / name).exists():
                    replace(self._folder / name, ON_DISK.encode(), work=self._work)
            await self._sync()
        except BaseException:
            self._fresh |= batch
            raise

    async def _sync(self) -> None:
        # A thread left behind by a cancelled agent ends with the sync; its layers stay marked with this boot.
        await anyio.to_thread.run_sync(_sync_file_system, self._folder, abandon_on_cancel=True)

    def _mark(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            return ""


def replace(path: Path, data: bytes, *, work: Path) -> None:
    """Whole or not at all; a disk that is full in the middle keeps nothing of it."""
    fresh = work / ulid()
    try:
        fresh.write_bytes(data)
        fresh.rename(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def _opened(folder: Path) -> Generator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_file_system(folder: Path) -> None:
    """Everything of the file system that holds `folder`. Raises OSError, also for what could not be written earlier."""
    with _opened(folder) as descriptor:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
