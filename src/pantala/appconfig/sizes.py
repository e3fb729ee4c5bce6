"""What a `[[vm]]` asks for: its preset, changed by its other keys, within what the CPUs allow."""

from __future__ import annotations

import msgspec

from pantala.appconfig.model import VM
from pantala.domain import guests
from pantala.wire.machine import Guest


def guest_of_vm(vm: VM, *, field: str = "vm") -> Guest:
    """`size` (or the default one) is what the other keys change; memory that nobody named follows the CPUs. Raises
    InvalidRequest."""
    base = guests.preset(vm.size, field=f"{field}.size") if vm.size is not None else None
    kind = vm.cpu_kind or (base.cpu_kind if base else "shared")
    cpus = vm.cpus or (base.cpus if base else 1)
    memory_mb = vm.memory_mib
    if memory_mb is None and base is not None and cpus in guests.KINDS[kind].cpus:
        low, high = guests.memory_bounds(kind, cpus)
        memory_mb = min(high, max(low, base.memory_mb))
    guest = Guest(
        cpu_kind=kind,
        cpus=cpus,
        memory_mb=memory_mb,
        max_memory_mb=vm.max_memory_mib,
        isolation=vm.isolation,
        persist_rootfs=vm.persist_rootfs,
    )
    return msgspec.structs.replace(guest, memory_mb=guests.of_guest(guest, field=field).memory_mb)
