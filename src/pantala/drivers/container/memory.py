"""What a machine's control group may use of memory, changed while it runs, and memory taken back from it.

Nothing here has a process killed: what the machine holds and cannot give back bounds how low its limit goes. Version 1
has no way to take back a part, so there all of the page cache comes back. What is set lasts as long as the group, which
is until the machine's next start.
"""

from __future__ import annotations

import errno
from pathlib import Path

from pantala.domain.runtime import MemoryUsage
from pantala.errors import DriverError

MIB = 1024 * 1024


class Memory:
    """Of one group; `overhead_mib` is what it has beside what the machine was promised."""

    def __init__(self, folder: Path, *, unified: bool, overhead_mib: int) -> None:
        self._folder = folder
        self._unified = unified
        self._overhead = overhead_mib * MIB
        self._limit = folder / ("memory.max" if unified else "memory.limit_in_bytes")
        self._current = folder / ("memory.current" if unified else "memory.usage_in_bytes")
        self._cache = "inactive_file" if unified else "total_inactive_file"

    def usage(self) -> MemoryUsage | None:
        """None where there is no group any more."""
        try:
            limit, used = self._limit.read_text().strip(), self._used()
            cache = _counted(self._folder / "memory.stat", self._cache)
        except OSError:
            return None
        limit_mib = (int(limit) - self._overhead) // MIB if limit.isdigit() else 0
        return MemoryUsage(limit_mib=limit_mib, used_mib=max(used - cache, 0) // MIB)

    def set_limit(self, limit_mib: int) -> None:
        """Raises DriverError (the guest's fault) when the machine holds more and cannot give it back."""
        wanted = limit_mib * MIB + self._overhead
        try:
            if self._unified:
                self._set_v2(wanted, limit_mib)
            else:
                self._set_v1(wanted)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise self._holds_more(limit_mib) from error
            raise DriverError(f"the limit of its memory cannot be changed: {error.strerror}") from error

    def _set_v1(self, wanted: int) -> None:
        """The kernel takes back what it can first, and refuses (EBUSY) what is then still too low."""
        with_swap = self._folder / "memory.memsw.limit_in_bytes"
        before, swap = int(self._limit.read_text()), 0
        if with_swap.exists():
            swap = int(with_swap.read_text()) - before
        writes = [(self._limit, wanted)]
        if with_swap.exists():  # never below the limit without swap
            writes.insert(0 if wanted > before else 1, (with_swap, wanted + swap))
        for path, value in writes:
            path.write_text(str(value))

    def _set_v2(self, wanted: int, limit_mib: int) -> None:
        """A limit below what is used would have the kernel kill; so first take back, then look."""
        if (over := self._used() - wanted) > 0:
            self._take_back(over)
            if self._used() > wanted:
                raise self._holds_more(limit_mib)
        self._limit.write_text(str(wanted))

    def reclaim(self, amount_mib: int) -> int:
        """MiB that the machine has given back, at most what it could; with version 1 maybe more than was asked for."""
        before = self._used()
        try:
            if self._unified:
                self._take_back(min(amount_mib * MIB, before))
            else:
                (self._folder / "memory.force_empty").write_text("0")
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY):  # it gave less, which is counted below
                raise DriverError(f"memory cannot be taken back on this host: {error.strerror}") from error
        return max(before - self._used(), 0) // MIB

    def _take_back(self, amount: int) -> None:
        try:
            (self._folder / "memory.reclaim").write_text(str(amount))
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise

    def _used(self) -> int:
        return int(self._current.read_text())

    def _holds_more(self, limit_mib: int) -> DriverError:
        usage = self.usage()
        holds = f"{usage.used_mib} MiB" if usage else "more"
        return DriverError(
            f"the machine uses {holds} that it cannot give back, so {limit_mib} MiB are too few", guest_fault=True
        )


def _counted(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
