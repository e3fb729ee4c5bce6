"""What keeps a container apart, told to whoever asks: read from what machines are made from, not said beside it."""

from __future__ import annotations

import functools
import hashlib
import platform
from typing import Any

import msgspec

from pantala.drivers.container import spec
from pantala.wire.machine import Isolation


def describe(uid_base: int) -> Isolation:
    made = _spec(uid_base)
    process, (mapping,) = made["process"], made["linux"]["uidMappings"]
    first, outside, last = mapping["containerID"], mapping["hostID"], mapping["size"] - 1
    return Isolation(
        driver="container",
        boundary="namespaces of its own for " + ", ".join(one["type"] for one in made["linux"]["namespaces"]),
        kernel=f"the host's, shared (Linux {platform.release()})",
        seccomp=_digest(),
        capabilities=list(process["capabilities"]["bounding"]),
        user_mapping=f"{first}-{first + last} -> {outside}-{outside + last}",
        no_new_privileges=process["noNewPrivileges"],
    )


def _spec(uid_base: int) -> dict[str, Any]:
    return spec.build(
        machine_id="", hostname="", uid_base=uid_base, joins_netns=True, joins_userns=True, cgroup_mount=False
    )


@functools.cache
def _digest() -> str:
    profile = msgspec.json.encode(spec.seccomp.profile(), order="sorted")
    return f"sha256:{hashlib.sha256(profile).hexdigest()}"
