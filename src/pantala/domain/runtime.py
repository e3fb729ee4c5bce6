"""What the agent composes into a running machine: an image on disk, a network, limits. Values only.

`images` makes `UnpackedImage`, `net` makes `NetworkHandle`, a driver takes both; none of the three knows the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from pantala.domain.policies import Allowed


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of an OCI image config that decide how its process runs."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    user: str = ""
    cwd: str = "/"
    stop_signal: str = ""
    exposed_ports: tuple[int, ...] = ()
    labels: dict[str, str] = {}


class ImageLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an image may be; one beyond is refused before it costs more than this. `layer_bytes` bounds a layer both
    compressed and unpacked, `image_bytes` all of them unpacked. Beyond `ratio_from_bytes` a layer may be at most
    `ratio` times as large as what it was compressed to.
    """

    manifest_bytes: Annotated[int, msgspec.Meta(ge=1)] = 4 * 1024**2
    config_bytes: Annotated[int, msgspec.Meta(ge=1)] = 4 * 1024**2
    layers: Annotated[int, msgspec.Meta(ge=1, le=127)] = 127
    layer_bytes: Annotated[int, msgspec.Meta(ge=1)] = 8 * 1024**3
    layer_entries: Annotated[int, msgspec.Meta(ge=1)] = 500_000
    image_bytes: Annotated[int, msgspec.Meta(ge=1)] = 32 * 1024**3
    ratio: Annotated[int, msgspec.Meta(ge=1)] = 200
    ratio_from_bytes: Annotated[int, msgspec.Meta(ge=0)] = 256 * 1024**2
    unpack_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0


class UnpackedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image ready to be a root: `layers` are read-only directories, lowest first, owned by ids from 0 up.

    `others`: what else its machine needs, images of containers and volumes by the names that the config gives them.
    """

    digest: str
    layers: tuple[Path, ...]
    config: ImageConfig
    others: dict[str, UnpackedImage] = {}


class ContainerRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A container's files: its image's layers under a layer of its own. `mounts`: name of a volume, path."""

    name: str
    layers: tuple[Path, ...]
    mounts: tuple[tuple[str, str], ...] = ()


class VolumeRoot(msgspec.Struct, frozen=True, kw_only=True):
    """What containers share: a directory on the machine's disk, a disk of its own of `disk_mib`, memory of at most
    `memory_mib`, or an image's files, which nobody can change."""

    name: str
    memory_mib: int | None = None
    disk_mib: int | None = None
    layers: tuple[Path, ...] = ()


class NetworkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses chosen by the agent (journaled), so that they can be made again.

    `slot` is unique on the host, 0 to 16383. `uid_base`: outside id of the machine's root; its network
    namespace belongs to a user namespace with that map. `allowed`: what network policies leave it; None: not known now,
    so what was made before stays.
    """

    machine_id: str
    slot: int
    network: int
    ip4: str
    gateway4: str
    ip6: str
    uid_base: int
    allowed: Allowed | None = None


class NetworkHandle(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace that exists: `netns` can be opened or joined by path.

    `userns` owns it, with the map of the plan's `uid_base`; a driver that makes containers joins it, so that root
    of the machine has its rights in its own network. None: the namespace belongs to the host.
    """

    netns: Path
    ip4: str
    ip6: str
    userns: Path | None = None


RootKept = Literal["never", "restart", "always"]
"""What a machine wrote to its root is gone on with after a stop: never, by the same version, by any."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine may use. `shared_cpu`: the quota with its burst balance applies; `disk_mib` is the
    writable layer; `swap_mib` of the host's swap, where it has any."""

    cpus: int
    shared_cpu: bool
    memory_mib: int
    swap_mib: int = 0
    pids: int = 4096
    disk_mib: int = 8192


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a machine as it is numbered inside; `sockets` by inode, CPU time in clock ticks."""

    pid: int
    command: str
    directory: str
    cpu_ticks: int
    runs_s: float
    rss_bytes: int
    sockets: frozenset[int] = frozenset()


class CPUUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel counted since a machine was prepared: `run` differs for each time it was. `throttled_us` is how
    long it was held back, over all its CPUs; `periods` how often the kernel looked at its quota."""

    run: str
    used_us: int
    throttled_us: int = 0
    periods: int = 0


class MemoryUsage(msgspec.Struct, frozen=True, kw_only=True):
    """`used_mib` without what would be given back for the asking (files read and not used lately)."""

    limit_mib: int
    used_mib: int


class ListenSocket(msgspec.Struct, frozen=True, kw_only=True):
    """`address` without brackets; `inode` ties it to a process."""

    proto: str
    address: str
    port: int
    inode: int = 0
