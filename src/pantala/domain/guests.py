"""Sizes of machines: presets and the limits of each CPU kind (`reference` sizes as a table of our own). Pure."""

from __future__ import annotations

import msgspec

from pantala.domain.runtime import Limits
from pantala.errors import InvalidRequest
from pantala.wire.machine import Guest, MachineConfig

MEMORY_STEP_MB = 256


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


class Size(msgspec.Struct, frozen=True, kw_only=True):
    cpu_kind: str
    cpus: int
    memory_mb: int

    @property
    def cpu_share(self) -> float:
        """Whole CPUs of a host that it is promised."""
        return KINDS[self.cpu_kind].share * self.cpus

    def limits(self) -> Limits:
        return Limits(cpus=self.cpus, shared_cpu=self.cpu_kind == "shared", memory_mib=self.memory_mb)


def resolve(config: MachineConfig) -> Size:
    """The size a config asks for, with its defaults. Raises InvalidRequest naming the field."""
    guest = config.guest
    if config.size is not None:
        if guest is not None:
            raise InvalidRequest("cannot be combined with config.guest; give one of them", field="config.size")
        if config.size not in PRESETS:
            raise InvalidRequest(f"{config.size!r} is not a size; one of {', '.join(PRESETS)}", field="config.size")
        kind_name, cpus = PRESETS[config.size]
        return Size(cpu_kind=kind_name, cpus=cpus, memory_mb=KINDS[kind_name].min_mb * cpus)
    guest = guest or Guest()
    if guest.gpu_kind or guest.gpus:
        raise InvalidRequest("GPUs are not offered here; leave it out", field="config.guest.gpu_kind")
    kind_name = guest.cpu_kind or "shared"
    if kind_name not in KINDS:
        raise InvalidRequest(
            f"{kind_name!r} is not a CPU kind; one of {', '.join(KINDS)}", field="config.guest.cpu_kind"
        )
    kind = KINDS[kind_name]
    cpus = guest.cpus if guest.cpus is not None else 1
    if cpus not in kind.cpus:
        allowed = ", ".join(map(str, kind.cpus))
        raise InvalidRequest(f"{cpus} is not offered for {kind_name}; one of {allowed}", field="config.guest.cpus")
    memory_mb = guest.memory_mb if guest.memory_mb is not None else kind.min_mb * cpus
    field = "config.guest.memory_mb"
    if memory_mb % MEMORY_STEP_MB:
        raise InvalidRequest(f"{memory_mb} is not a multiple of {MEMORY_STEP_MB}", field=field)
    low, high = kind.min_mb * cpus, kind.max_mb * cpus
    if not low <= memory_mb <= high:
        raise InvalidRequest(f"{memory_mb} is not between {low} and {high} for {cpus} {kind_name} CPU(s)", field=field)
    return Size(cpu_kind=kind_name, cpus=cpus, memory_mb=memory_mb)
