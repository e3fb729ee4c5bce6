"""Several containers in one machine: which images it needs, which roots are made, what PID 1 runs in them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from pantala.domain import process, signals
from pantala.domain.restart import MAX_RETRIES
from pantala.domain.runtime import ContainerRoot, UnpackedImage, VolumeRoot
from pantala.errors import InvalidRequest
from pantala.wire.guest import API_SOCKET, ContainerState, GuestContainer, GuestDependency, GuestHealthcheck, Start
from pantala.wire.machine import Container, ContainerStatus, Healthcheck, HTTPHealth, MachineConfig

ROOTS = "/.pantala/containers"
"""Where a machine keeps the roots of its containers."""
INTERVAL_S = 10
TIMEOUT_S = 5


def main_image(config: MachineConfig) -> str:
    """What the machine's own image is: its config's, else that of its first container."""
    return config.image or (config.containers[0].image if config.containers else "")


def other_images(config: MachineConfig) -> list[str]:
    """Images besides the main one, as the config names them."""
    named = [one.image for one in config.containers or []]
    named += [volume.image for volume in config.volumes or [] if volume.image]
    return [name for name in dict.fromkeys(named) if name != main_image(config)]


def image_of(name: str, config: MachineConfig, image: UnpackedImage) -> UnpackedImage:
    return image if name == main_image(config) else image.others[name]


def check_there(config: MachineConfig, name: str) -> None:
    """Raises InvalidRequest when a caller names a container that the machine does not have; "" names none."""
    there = [one.name for one in config.containers or []]
    if name and name not in there:
        told = f"the machine has {', '.join(there)}" if there else "the machine has no containers"
        raise InvalidRequest(f"there is no {name!r}; {told}", field="container")


def roots(config: MachineConfig, image: UnpackedImage) -> tuple[ContainerRoot, ...]:
    return tuple(
        ContainerRoot(
            name=one.name,
            layers=image_of(one.image, config, image).layers,
            mounts=tuple((mount.name, mount.path) for mount in one.mounts or []),
        )
        for one in config.containers or []
    )


def volumes(config: MachineConfig, image: UnpackedImage, memory_mb: int) -> tuple[VolumeRoot, ...]:
    """One in memory without a size gets half of the machine's, as the kernel's own default is; one on disk shares the
    machine's."""
    made: list[VolumeRoot] = []
    for one in config.volumes or []:
        if one.image:
            made.append(VolumeRoot(name=one.name, layers=image_of(one.image, config, image).layers))
        elif one.temp_dir is not None and one.temp_dir.storage_type == "memory":
            made.append(VolumeRoot(name=one.name, memory_mib=one.temp_dir.size_mb or memory_mb // 2))
        else:
            made.append(VolumeRoot(name=one.name, disk_mib=one.temp_dir.size_mb if one.temp_dir else None))
    return tuple(made)


def stop_timeout_s(config: MachineConfig) -> float | None:
    """What the machine's own stop takes when nobody said: they end one after the other."""
    if not config.containers or (config.stop_config is not None and config.stop_config.timeout):
        return None
    return min(sum(signals.stop_timeout_s(one.stop, None) for one in config.containers), signals.TIMEOUT_MAX_S)


def start_message(
    image: UnpackedImage, config: MachineConfig, identity: process.Identity, secrets: Mapping[str, str]
) -> Start:
    """What PID 1 runs: containers, or the app with what is beside it. Raises InvalidRequest naming what is missing."""
    if not config.containers:
        return process.start_message(image.config, config, identity, secrets)
    return Start(
        argv=[],
        env=process.environment(image.config, config, identity, secrets),  # of sessions in the machine itself
        hostname=process.hostname(config, identity.machine_id),
        api_socket=API_SOCKET,
        containers=[_container(index, image, config, identity, secrets) for index in range(len(config.containers))],
    )


def _container(
    index: int, image: UnpackedImage, config: MachineConfig, identity: process.Identity, secrets: Mapping[str, str]
) -> GuestContainer:
    """The machine's variables and files are every container's, under its own."""
    one, field = (config.containers or [])[index], f"config.containers[{index}]"
    own = image_of(one.image, config, image).config
    given = {} if one.ignore_app_secrets else secrets
    env = process.environment(own, config, identity, given) | (one.env or {})
    env |= process.named_secrets(one.secrets or [], secrets, field)
    env |= process.fields(one.env_from or [], identity)
    files = process.files(config.files or [], secrets, "config.files")
    files += process.files(one.files or [], secrets, f"{field}.files")
    policy, max_retries = _restart(one, config.containers or [])
    return GuestContainer(
        name=one.name,
        root=f"{ROOTS}/{one.name}",
        argv=process.argv(own, one, field),
        env=env,
        user=one.user or own.user,
        cwd=own.cwd or "/",
        files=files,
        depends_on=[GuestDependency(name=d.name, condition=d.condition or "started") for d in one.depends_on or []],
        healthchecks=[_healthcheck(check) for check in one.healthchecks or []],
        restart=policy,
        max_retries=max_retries,
        stop_signal=signals.stop_signal(one.stop, None, own.stop_signal),
        stop_grace_ms=round(signals.stop_timeout_s(one.stop, None) * 1000),
    )


def _restart(one: Container, containers: Sequence[Container]) -> tuple[Literal["no", "always", "on-failure"], int]:
    """`always`, unless another waits for its successful end: such a one has a job and then is done."""
    waited_for = any(
        wanted.name == one.name and wanted.condition == "exited_successfully"
        for other in containers
        for wanted in other.depends_on or []
    )
    given = one.restart
    policy: Literal["no", "always", "on-failure"] = "on-failure" if waited_for else "always"
    if given is not None and given.policy in ("no", "always", "on-failure"):
        policy = given.policy
    return policy, given.max_retries if given and given.max_retries is not None else MAX_RETRIES


def _healthcheck(check: Healthcheck) -> GuestHealthcheck:
    made = GuestHealthcheck(
        name=check.name,
        kind=check.kind or "readiness",
        interval_ms=1000 * (check.interval or INTERVAL_S),
        timeout_ms=1000 * (check.timeout or TIMEOUT_S),
        grace_ms=1000 * (check.grace_period or 0),
        success_threshold=check.success_threshold or 1,
        failure_threshold=check.failure_threshold or 3,
        stops=check.unhealthy == "stop",
    )
    if check.http is not None:
        return msgspec.structs.replace(
            made,
            http_port=check.http.port,
            http_method=(check.http.method or "GET").upper(),
            http_path=check.http.path or "/",
            http_headers=[(header.name, ",".join(header.values)) for header in check.http.headers or []],
            tls=_tls(check.http),
            tls_server_name=check.http.tls_server_name or "",
        )
    if check.tcp is not None:
        return msgspec.structs.replace(made, tcp_port=check.tcp.port)
    return msgspec.structs.replace(made, argv=list(check.exec.command) if check.exec else [])


def _tls(asked: HTTPHealth) -> Literal["off", "unverified", "verified"]:
    if asked.scheme != "https":
        return "off"
    return "unverified" if asked.tls_skip_verify else "verified"


def statuses(states: Sequence[ContainerState]) -> list[ContainerStatus]:
    """For the machine's document."""
    return [
        ContainerStatus(
            name=one.name,
            state=one.state,
            health=None if one.health == "none" else one.health,
            exit_code=one.exit_code,
            restarts=one.restarts,
        )
        for one in states
    ]


def told(before: ContainerState | None, now: ContainerState) -> list[tuple[str, str]]:
    """What a machine's history says of a change: words for the event, with a sentence."""
    was = before or ContainerState(name=now.name, state="pending")
    out: list[tuple[str, str]] = []
    ran = was.state in ("started", "stopping")
    has_ended = now.restarts > was.restarts or (now.state in ("restarting", "stopped") and was.exit_code is None)
    has_ended = has_ended or (ran and now.state in ("restarting", "stopped"))
    if has_ended and now.exit_code is not None:
        again = "" if now.state == "stopped" else "; it is started again"
        out.append(("container_exited", f"container {now.name} exited with code {now.exit_code}{again}"))
    if now.state == "started" and (not ran or now.restarts > was.restarts):
        out.append(("container_started", f"container {now.name} started"))
    if now.health == "unhealthy" and was.health != "unhealthy":
        failing = ", ".join(check.name for check in now.checks if not check.passing)
        out.append(("container_unhealthy", f"container {now.name} is unhealthy: {failing}"))
    return out
