"""Which boot of the kernel this is: numbers and caches of another one mean nothing."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
