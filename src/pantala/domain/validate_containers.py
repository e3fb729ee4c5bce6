"""Are `containers` and `volumes` of a machine config acceptable? Part of `domain/validate.py`. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pantala.domain import guests
from pantala.domain.validate_program import check_files, check_own_variables, check_restart, check_stop
from pantala.errors import InvalidRequest
from pantala.wire.machine import Container, Healthcheck, HTTPHealth, MachineConfig, Volume

CONTAINERS_MAX = 16
VOLUMES_MAX = 16
CHECKS_MAX = 8
CHECK_S_MAX = 3600
THRESHOLD_MAX = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_HOST = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_NAME_RULE = "begins with a letter or a digit, then letters, digits, - and _, at most 63"
OWN_PATHS = ("/proc", "/sys", "/dev", "/.pantala", "/.fly")
"""Where the platform mounts its own things in each root."""


def check_containers(config: MachineConfig) -> None:
    """Raises InvalidRequest for the first thing that is wrong."""
    containers, volumes = config.containers or [], config.volumes or []
    if not containers:
        if volumes:
            raise InvalidRequest("volumes are mounted by containers; there are none", field="config.volumes")
        return
    _alone(config)
    _named(containers, "config.containers", CONTAINERS_MAX)
    _named(volumes, "config.volumes", VOLUMES_MAX)
    _volumes(volumes, config)
    by_name = {one.name: one for one in containers}
    for index, container in enumerate(containers):
        field = f"config.containers[{index}]"
        if not container.image:
            raise InvalidRequest("an image is required", field=f"{field}.image")
        check_own_variables(container.env, container.secrets, container.env_from, field)
        check_files(container.files, f"{field}.files")
        check_restart(container.restart, f"{field}.restart")
        check_stop(container.stop, f"{field}.stop")
        _mounts(container, {volume.name for volume in volumes}, field)
        _healthchecks(container.healthchecks or [], f"{field}.healthchecks")
        _dependencies(container, by_name, field)
    if cycle := find_cycle({one.name: [d.name for d in one.depends_on or []] for one in containers}):
        raise InvalidRequest(
            f"containers wait for each other: {' → '.join(cycle)}; one of them has to start first",
            field="config.containers",
        )


def find_cycle(waits_for: Mapping[str, Sequence[str]]) -> list[str]:
    """A circle of names, its first one repeated at the end; empty if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in waits_for.get(name, ()):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    for name in waits_for:
        if found := visit(name):
            return found
    return []


def _alone(config: MachineConfig) -> None:
    """What belongs to a machine with one root."""
    if config.processes:
        raise InvalidRequest("processes do not go with containers; make each a container", field="config.processes")
    if config.statics:
        raise InvalidRequest(
            "statics do not go with containers, each of which has files of its own", field="config.statics"
        )
    for name in ("exec", "entrypoint", "cmd"):
        if config.init is not None and getattr(config.init, name):
            raise InvalidRequest(f"give each container its own {name}", field=f"config.init.{name}")


def _named(things: Sequence[Container | Volume], field: str, most: int) -> None:
    if len(things) > most:
        raise InvalidRequest(f"at most {most}", field=field)
    seen: set[str] = set()
    for index, thing in enumerate(things):
        if not _NAME.fullmatch(thing.name):
            raise InvalidRequest(f"{thing.name!r}: a name {_NAME_RULE}", field=f"{field}[{index}].name")
        if thing.name in seen:
            raise InvalidRequest(f"{thing.name!r} is there twice", field=f"{field}[{index}].name")
        seen.add(thing.name)


def _volumes(volumes: Sequence[Volume], config: MachineConfig) -> None:
    size, in_memory, on_disk = guests.resolve(config), 0, 0
    for index, volume in enumerate(volumes):
        field = f"config.volumes[{index}]"
        if (volume.temp_dir is None) == (not volume.image):
            raise InvalidRequest("give temp_dir or image", field=field)
        if volume.temp_dir is None:
            continue
        size_mb, kind = volume.temp_dir.size_mb, volume.temp_dir.storage_type
        if size_mb is not None and size_mb < 1:
            raise InvalidRequest("is at least 1", field=f"{field}.temp_dir.size_mb")
        if kind == "memory":
            in_memory += size_mb or 0
            if in_memory > size.memory_mb:
                raise InvalidRequest(
                    f"volumes in memory have {in_memory} MB, the machine {size.memory_mb} MB",
                    field=f"{field}.temp_dir.size_mb",
                )
            continue
        on_disk += size_mb or 0
        if on_disk > size.rootfs_gb * 1024:
            raise InvalidRequest(
                f"volumes on disk have {on_disk} MB, which are more than the {size.rootfs_gb} GB of the machine's disk",
                field=f"{field}.temp_dir.size_mb",
            )


def _mounts(container: Container, volumes: set[str], field: str) -> None:
    paths: list[str] = []
    for index, mount in enumerate(container.mounts or []):
        here = f"{field}.mounts[{index}]"
        if mount.name not in volumes:
            raise InvalidRequest(f"{mount.name!r} is not one of config.volumes", field=f"{here}.name")
        parts = mount.path.split("/")
        if not mount.path.startswith("/") or ".." in parts or not any(parts):
            raise InvalidRequest(f"{mount.path!r} is not an absolute path below /", field=f"{here}.path")
        path = "/" + "/".join(part for part in parts if part not in ("", "."))
        if any(path == own or path.startswith(f"{own}/") for own in OWN_PATHS):
            raise InvalidRequest(f"{path} is the platform's", field=f"{here}.path")
        if path in paths:
            raise InvalidRequest(f"{path} is there twice", field=f"{here}.path")
        paths.append(path)


def _healthchecks(checks: Sequence[Healthcheck], field: str) -> None:
    if len(checks) > CHECKS_MAX:
        raise InvalidRequest(f"at most {CHECKS_MAX}", field=field)
    seen: set[str] = set()
    for index, check in enumerate(checks):
        here = f"{field}[{index}]"
        if not check.name or check.name in seen:
            raise InvalidRequest(f"{check.name!r} is empty or there twice", field=f"{here}.name")
        seen.add(check.name)
        if sum(kind is not None for kind in (check.http, check.tcp, check.exec)) != 1:
            raise InvalidRequest("give one of http, tcp, exec", field=here)
        port = check.http.port if check.http else check.tcp.port if check.tcp else 1
        if not 1 <= port <= 65535:
            raise InvalidRequest(f"{port} is not a port; ports are 1 to 65535", field=f"{here}.port")
        if check.exec is not None and not check.exec.command:
            raise InvalidRequest("a command is required", field=f"{here}.exec.command")
        if check.http is not None:
            _check_tls(check.http, f"{here}.http")
            lines = [check.http.path or "/", check.http.method or "GET"]
            lines += [text for header in check.http.headers or [] for text in (header.name, *header.values)]
            if not lines[0].startswith("/") or any(ord(c) < 32 for text in lines for c in text):
                raise InvalidRequest("a path begins with /, and no text has control characters", field=f"{here}.http")
        for name, low, high in (
            ("interval", 1, CHECK_S_MAX),
            ("timeout", 1, CHECK_S_MAX),
            ("grace_period", 0, CHECK_S_MAX),
            ("success_threshold", 1, THRESHOLD_MAX),
            ("failure_threshold", 1, THRESHOLD_MAX),
        ):
            value: int | None = getattr(check, name)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"{value} is not between {low} and {high}", field=f"{here}.{name}")


def _check_tls(asked: HTTPHealth, field: str) -> None:
    name = asked.tls_server_name
    if asked.scheme != "https":
        if asked.tls_skip_verify or name:
            raise InvalidRequest("must be https for what is said of TLS", field=f"{field}.scheme")
    elif name and not _HOST.fullmatch(name):
        raise InvalidRequest(f"{name!r} is not a name in DNS", field=f"{field}.tls_server_name")
    elif not name and not asked.tls_skip_verify:
        raise InvalidRequest(
            "name whom the container's certificate is for, or set tls_skip_verify; it is asked at localhost, which no "
            "public authority vouches for",
            field=f"{field}.tls_server_name",
        )


def _dependencies(container: Container, by_name: Mapping[str, Container], field: str) -> None:
    for index, wanted in enumerate(container.depends_on or []):
        here = f"{field}.depends_on[{index}]"
        other = by_name.get(wanted.name)
        if other is None:
            raise InvalidRequest(f"{wanted.name!r} is not one of config.containers", field=f"{here}.name")
        if wanted.condition == "healthy" and not other.healthchecks:
            raise InvalidRequest(f"{wanted.name} has no healthchecks", field=f"{here}.condition")
