"""The OCI runtime specification of a machine, as a value: everything that hardens it is in this file.

Paths of sources are below `ENCLOSURE`, where `pantala-init enclose` puts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from pantala.domain.containers import ROOTS
from pantala.domain.runtime import ContainerRoot
from pantala.drivers.container import facts, seccomp
from pantala.wire.guest import API_SOCKET

# Covered by a tmpfs in the mount namespace of the helper only; exists everywhere and anyone may pass through.
ENCLOSURE = "/tmp"  # noqa: S108 - nothing is created in the host's /tmp
INIT_IN_MACHINE = "/.pantala/init"
IDS = 65_536
API_FOLDER = str(PurePosixPath(API_SOCKET).parent)
"""Where PID 1 makes its socket; containers see the same folder."""

# What root of a machine may still do, inside its own user namespace: be root towards its own files, users, processes
# and ports. Not there, compared with the common container default: MKNOD (devices cannot be made in a user namespace),
# NET_RAW (ping works by net.ipv4.ping_group_range; raw sockets forge packets), AUDIT_WRITE (the host's audit log),
# SETFCAP (file capabilities have no effect under no_new_privs).
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def build(
    *,
    machine_id: str,
    hostname: str,
    uid_base: int,
    joins_netns: bool,
    joins_userns: bool,
    cgroup_mount: bool,
    containers: Sequence[ContainerRoot] = (),
) -> dict[str, Any]:
    """`joins_*`: the namespace is at `ENCLOSURE/ns/`, else the runtime makes it. `cgroup_mount`: version 2 only.
    `containers`: further roots, at `ENCLOSURE/containers/`; each looks like the machine's own.
    """
    user: dict[str, Any] = {"type": "user"}
    network: dict[str, Any] = {"type": "network"}
    if joins_userns:
        user["path"] = f"{ENCLOSURE}/ns/user"
    if joins_netns:
        network["path"] = f"{ENCLOSURE}/ns/net"
    mapping = [{"containerID": 0, "hostID": uid_base, "size": IDS}]
    owns_network = joins_userns or not joins_netns
    mounts = _mounts(owns_network=owns_network, cgroup_mount=cgroup_mount)
    mounts.append(_mount(INIT_IN_MACHINE, "bind", f"{ENCLOSURE}/init", "bind", "ro", "nosuid", "nodev"))
    roots = [f"{ROOTS}/{one.name}" for one in containers]
    hooks: dict[str, Any] = {}
    if containers:
        # What is nested comes with what it is in.
        paths = [mount["destination"] for mount in mounts if mount["destination"] != INIT_IN_MACHINE]
        paths = [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]
        words = ["pantala-init", "furnish", ENCLOSURE, *paths, API_FOLDER, "--"]
        for one in containers:
            words += [one.name, *(f"{volume}={path}" for volume, path in one.mounts)]
        hooks = {"hooks": {"createContainer": [{"path": f"{ENCLOSURE}/init", "args": words}]}}
    for one, root in zip(containers, roots, strict=True):
        mounts.append(_mount(root, "bind", f"{ENCLOSURE}/containers/{one.name}", "bind", "rw", "nosuid", "nodev"))
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "annotations": {"pantala.machine": machine_id},
        "root": {"path": f"{ENCLOSURE}/root", "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [INIT_IN_MACHINE],
            # Without HOME the runtime looks for one in the image's /etc/passwd, which may be a pipe or without an end.
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"],
            "cwd": "/",
            "noNewPrivileges": True,
            # A host that itself runs out of memory ends machines before the platform (whose processes have 0).
            "oomScoreAdj": 500,
            "capabilities": {name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted")},
        },
        "mounts": mounts,
        **hooks,
        "linux": {
            "namespaces": [
                user,
                network,
                *({"type": kind} for kind in ("mount", "pid", "ipc", "uts", "cgroup")),
            ],
            "uidMappings": mapping,
            "gidMappings": mapping,
            "maskedPaths": [root + path for root in ("", *roots) for path in MASKED_PATHS],
            "readonlyPaths": [root + path for root in ("", *roots) for path in READONLY_PATHS],
            "seccomp": seccomp.profile(),
            "rootfsPropagation": "private",
        },
    }


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _mounts(*, owns_network: bool, cgroup_mount: bool) -> list[dict[str, Any]]:
    """What the platform mounts in the machine's root, and so in its containers'."""
    quiet = ("nosuid", "noexec", "nodev")
    # sysfs shows the devices of a network namespace, so only its owner may mount it; otherwise the helper did.
    sys = (
        _mount("/sys", "sysfs", "sysfs", *quiet, "ro")
        if owns_network
        else _mount("/sys", "bind", f"{ENCLOSURE}/sys", "bind", *quiet, "ro")
    )
    terminals = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
    mounts = [
        _mount("/proc", "proc", "proc", *quiet),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "noexec", "mode=755", "size=1m"),
        _mount("/dev/pts", "devpts", "devpts", *terminals),
        _mount("/dev/shm", "tmpfs", "shm", *quiet, "mode=1777", "size=64m"),  # noqa: S108 - a path inside the machine
        _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
        sys,
    ]
    if cgroup_mount:
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *quiet, "relatime", "ro"))
    for name in ("hosts", "resolv.conf", "hostname"):
        mounts.append(_mount(f"/etc/{name}", "bind", f"{ENCLOSURE}/files/{name}", "bind", "rw", *quiet))
    for name, path in facts.WRITTEN.items():
        mounts.append(_mount(path, "bind", f"{ENCLOSURE}/files/{name}", "bind", "ro", *quiet))
    for name in facts.SERVED:
        mounts.append(_mount(f"/proc/{name}", "bind", f"{ENCLOSURE}/facts/{name}", "bind", "ro", *quiet))
    return mounts
