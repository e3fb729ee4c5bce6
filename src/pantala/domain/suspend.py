"""Which machines can be suspended. Pure."""

from __future__ import annotations

from pantala.domain import guests
from pantala.wire.machine import MachineConfig

MEMORY_MB_MAX = 2048


def why_not(config: MachineConfig) -> str:
    """Empty when it can be; autostop stops what cannot."""
    size = guests.resolve(config)
    if size.memory_mb > MEMORY_MB_MAX:
        return f"it has {size.memory_mb} MB of memory; machines with at most {MEMORY_MB_MAX} MB can be suspended"
    if config.init is not None and config.init.swap_size_mb:
        return "it has swap (init.swap_size_mb)"
    if config.schedule:
        return "it has a schedule"
    if config.guest is not None and (config.guest.gpus or config.guest.gpu_kind):
        return "it has a GPU"
    return ""
