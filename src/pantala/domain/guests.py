"""Sizes of machines: presets and the limits of each CPU kind (`reference` sizes as a table of our own). Pure.

The sentences of refusals are those that a stock client has for the same mistake (`SetSize` of superfly/fly-go,
`InvalidConfigErr` of superfly/flyctl), so that whoever reads or matches them finds them here too.
"""

from __future__ import annotations

import msgspec

from pantala.domain.runtime import Limits, RootKept
from pantala.errors import InvalidRequest
from pantala.wire.machine import Guest, MachineConfig

MEMORY_STEP_MB = 256
"""Of both kinds; sizing guides speak of 2048 for performance, the API's own table of 256."""
ROOTFS_GB = 8
ROOTFS_GB_MAX = 50
SWAP_MB_MAX = 64 * 1024
PERSISTS = ("none", "never", "restart", "always")
"""Of `persist_rootfs`, in the order of the numbers that clients take for them (superfly/fly-go, machine_types.go)."""
_PERSIST: dict[str, RootKept | None] = {"none": None, "never": "never", "restart": "restart", "always": "always"}


class CPUKind(msgspec.Struct, frozen=True, kw_only=True):
    """Memory bounds are per CPU; `share` is the part of a host's CPU that one vCPU is promised."""

    min_mb: int
    max_mb: int
    cpus: tuple[int, ...]
    share: float


KINDS = {
    "shared": CPUKind(min_mb=256, max_mb=2048, cpus=(1, 2, 4, 6, 8), share=0.0625),
    "performance": CPUKind(min_mb=2048, max_mb=8192, cpus=(1, 2, 4, 6, 8, 10, 12, 14, 16), share=1.0),
}
PRESETS: dict[str, tuple[str, int]] = {f"shared-cpu-{n}x": ("shared", n) for n in KINDS["shared"].cpus} | {
    f"performance-{n}x": ("performance", n) for n in KINDS["performance"].cpus
}
ISOLATIONS = ("container", "vm")
"""Weak to strong."""

GPU_PRESETS = ("a100-40gb", "a100-80gb", "l40s", "a10")
"""Names that clients still know; nobody offers them any more."""


class Size(msgspec.Struct, frozen=True, kw_only=True):
    cpu_kind: str
    cpus: int
    memory_mb: int
    swap_mb: int = 0
    rootfs_gb: int = ROOTFS_GB
    isolation: str = ""
    """What must at least keep it apart; empty: whatever the host has."""

    @property
    def cpu_share(self) -> float:
        """Whole CPUs of a host that it is promised."""
        return KINDS[self.cpu_kind].share * self.cpus

    @property
    def name(self) -> str:
        """The preset with these CPUs."""
        return f"shared-cpu-{self.cpus}x" if self.cpu_kind == "shared" else f"{self.cpu_kind}-{self.cpus}x"

    @property
    def is_shared(self) -> bool:
        return self.cpu_kind == "shared"

    def limits(self) -> Limits:
        return Limits(
            cpus=self.cpus,
            shared_cpu=self.is_shared,
            memory_mib=self.memory_mb,
            swap_mib=self.swap_mb,
            disk_mib=self.rootfs_gb * 1024,
        )


def memory_bounds(cpu_kind: str, cpus: int) -> tuple[int, int]:
    """The least and the most memory in MiB that so many CPUs of a kind may have."""
    kind = KINDS[cpu_kind]
    return kind.min_mb * cpus, kind.max_mb * cpus


def preset(name: str, *, field: str) -> Size:
    """The size of a preset name, with the least memory of its kind. Raises InvalidRequest."""
    if name in GPU_PRESETS:
        raise InvalidRequest(
            f"'{name}' is a machine size with a GPU, which is not offered here, "
            f"choose one of: [{' '.join(sorted(PRESETS))}]",
            field=field,
        )
    if name not in PRESETS:
        kind = next((kind for kind in KINDS if name.startswith(kind)), None)
        if kind is None:
            raise InvalidRequest(
                f"invalid machine preset requested, '{name}', expected to start with 'shared' or 'performance'",
                field=field,
            )
        offered = " ".join(sorted(preset for preset in PRESETS if preset.startswith(kind)))
        raise InvalidRequest(f"'{name}' is an invalid machine size, choose one of: [{offered}]", field=field)
    cpu_kind, cpus = PRESETS[name]
    return Size(cpu_kind=cpu_kind, cpus=cpus, memory_mb=memory_bounds(cpu_kind, cpus)[0])


def resolve(config: MachineConfig) -> Size:
    """The size a config asks for, with its defaults. Raises InvalidRequest naming the field."""
    if config.size is not None:
        if config.guest is not None:
            raise InvalidRequest("cannot be combined with config.guest; give one of them", field="config.size")
        size = preset(config.size, field="config.size")
    else:
        size = of_guest(config.guest or Guest())
    root_kept(config)
    return msgspec.structs.replace(size, swap_mb=_swap_mb(config), rootfs_gb=_rootfs_gb(config))


def of_guest(guest: Guest, *, field: str = "config.guest") -> Size:
    """The size of a guest: every number within what its kind of CPU allows. Raises InvalidRequest."""
    if guest.gpu_kind or guest.gpus:
        raise InvalidRequest("GPUs are not offered here; leave it out", field=f"{field}.gpu_kind")
    kind_name = guest.cpu_kind or "shared"
    if kind_name not in KINDS:
        raise InvalidRequest(
            f"The CPU kind given: {kind_name}, is not valid; valid values are [{' '.join(KINDS)}]",
            field=f"{field}.cpu_kind",
        )
    kind = KINDS[kind_name]
    cpus = guest.cpus if guest.cpus is not None else 1
    if cpus not in kind.cpus:
        raise InvalidRequest(
            f"For the CPU kind {kind_name}, {cpus} CPUs is not valid; "
            f"valid numbers are [{' '.join(map(str, kind.cpus))}]",
            field=f"{field}.cpus",
        )
    size = Size(
        cpu_kind=kind_name,
        cpus=cpus,
        memory_mb=guest.memory_mb if guest.memory_mb is not None else kind.min_mb * cpus,
        isolation=guest.isolation or "",
    )
    check_memory(size, field=f"{field}.memory_mb")
    _guest_extras(guest, size, field)
    return size


def isolates(offered: str, asked: str) -> bool:
    """Whether a host that keeps machines apart by `offered` may serve one that asks for `asked`."""
    return not asked or (offered in ISOLATIONS and ISOLATIONS.index(offered) >= ISOLATIONS.index(asked))


def check_memory(size: Size, *, field: str) -> None:
    """Raises InvalidRequest unless the CPUs may have so much memory."""
    low, high = memory_bounds(size.cpu_kind, size.cpus)
    valid = f"valid are {low} to {high} MiB in steps of {MEMORY_STEP_MB}"
    if not low <= size.memory_mb <= high:
        off = "low" if size.memory_mb < low else "high"
        raise InvalidRequest(
            f"For {size.cpu_kind} VMs with {size.cpus} CPUs, {size.memory_mb}MiB of memory is too {off}; {valid}",
            field=field,
        )
    if size.memory_mb % MEMORY_STEP_MB:
        raise InvalidRequest(f"{size.memory_mb}MiB of memory is not valid; {valid}", field=field)


def _guest_extras(guest: Guest, size: Size, field: str) -> None:
    """What a size may say besides, and cannot be had here: refused by name rather than forgotten."""
    if guest.max_memory_mb not in (None, 0, size.memory_mb):
        raise InvalidRequest(
            f"memory does not grow while a machine runs; leave it out, or ask for {guest.max_memory_mb} as memory_mb",
            field=f"{field}.max_memory_mb",
        )
    if guest.isolation not in (None, "", *ISOLATIONS):
        raise InvalidRequest(f"{guest.isolation!r} is not one of {', '.join(ISOLATIONS)}", field=f"{field}.isolation")
    if guest.persist_rootfs not in (None, "", *PERSISTS):
        raise InvalidRequest(
            f"{guest.persist_rootfs!r} is not one of {', '.join(PERSISTS)}", field=f"{field}.persist_rootfs"
        )


def root_kept(config: MachineConfig) -> RootKept:
    """Two fields say it: a guest's, and that of newer clients. Raises InvalidRequest when they differ."""
    guest = _PERSIST[(config.guest.persist_rootfs if config.guest else None) or "none"]
    rootfs = config.rootfs.persist if config.rootfs else None
    if guest is not None and rootfs is not None and guest != rootfs:
        raise InvalidRequest(
            f"{rootfs} is not what config.guest.persist_rootfs says, {guest}; give one of them",
            field="config.rootfs.persist",
        )
    return guest or rootfs or "never"


def check_root_goes_on(old: MachineConfig, new: MachineConfig) -> None:
    """A root that an update keeps may grow, never shrink: what is on it has to fit. Raises InvalidRequest."""
    had, wanted = resolve(old).rootfs_gb, resolve(new).rootfs_gb
    if root_kept(new) == "always" and root_kept(old) != "never" and wanted < had:
        raise InvalidRequest(
            f"{wanted} is less than the {had} of the root that is kept; it may grow, or begin anew with persist never",
            field="config.rootfs.size_gb",
        )


def _swap_mb(config: MachineConfig) -> int:
    swap = (config.init.swap_size_mb if config.init else None) or 0
    if not 0 <= swap <= SWAP_MB_MAX:
        raise InvalidRequest(f"{swap} is not between 0 and {SWAP_MB_MAX}", field="config.init.swap_size_mb")
    return swap


def _rootfs_gb(config: MachineConfig) -> int:
    rootfs = config.rootfs
    if rootfs is None:
        return ROOTFS_GB
    size_gb = rootfs.size_gb or ROOTFS_GB
    if not 1 <= size_gb <= ROOTFS_GB_MAX:
        raise InvalidRequest(f"{size_gb} is not between 1 and {ROOTFS_GB_MAX}", field="config.rootfs.size_gb")
    return size_gb
