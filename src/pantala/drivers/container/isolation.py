"""What keeps a container apart, told to whoever asks: read from what machines are made from, not said beside it."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from pantala.drivers.container import spec
from pantala.wire.machine import Isolation

VERSION_WITHIN_S = 5.0


def describe(uid_base: int, *, runtime: str = "", init: str = "") -> Isolation:
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
        runtime=runtime,
        init=init,
    )


def version_of(program: Path) -> str:
    """What a runtime says of itself, asked again when its file is another. Empty when it does not say."""
    return _version(program, _file(program))


def digest_of(program: Path) -> str:
    return _file_digest(program, _file(program))


def _file(path: Path) -> tuple[int, int, int]:
    """Another one after the file was replaced."""
    try:
        there = path.stat()
    except OSError:
        return (0, 0, 0)
    return (there.st_ino, there.st_size, there.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _version(program: Path, file: tuple[int, int, int]) -> str:
    del file
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, timeout=VERSION_WITHIN_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


@functools.lru_cache(maxsize=4)
def _file_digest(program: Path, file: tuple[int, int, int]) -> str:
    del file
    try:
        with program.open("rb") as opened:
            return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
    except OSError:
        return ""


def _spec(uid_base: int) -> dict[str, Any]:
    return spec.build(
        machine_id="", hostname="", uid_base=uid_base, joins_netns=True, joins_userns=True, cgroup_mount=False
    )


@functools.cache
def _digest() -> str:
    profile = msgspec.json.encode(spec.seccomp.profile(), order="sorted")
    return f"sha256:{hashlib.sha256(profile).hexdigest()}"
