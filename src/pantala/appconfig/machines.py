"""From configuration to machines: what a machine of one process group runs from."""

from __future__ import annotations

import base64
from collections.abc import Callable

import msgspec

from pantala.appconfig.model import AppConfig
from pantala.appconfig.parse import split_command
from pantala.appconfig.sizes import guest_of_vm
from pantala.wire.machine import (
    Check,
    DNSConfig,
    File,
    Guest,
    Init,
    MachineConfig,
    Restart,
    Service,
    StopConfig,
)
from pantala.wire.machine import (
    Mount as MachineMount,
)

RELEASE_COMMAND, CONSOLE = "fly_app_release_command", "fly_app_console"
"""Process groups that no fly.toml may name."""


def machine_config(
    config: AppConfig,
    group: str,
    *,
    image: str,
    metadata: dict[str, str],
    read_file: Callable[[str], bytes],
    guest: Guest | None = None,
) -> MachineConfig:
    """The config of one group's machines. `guest`: the size they have now, kept where `[[vm]]` says nothing.

    `read_file` reads a `[[files]] local_path`. Raises InvalidRequest.
    """
    default = config.default_group()

    def ours(processes: tuple[str, ...]) -> bool:
        return group in processes if processes else group == default

    services = [item.service for item in config.services if ours(item.processes)]
    checks = {item.name: _with_port(item.check, services) for item in config.checks if ours(item.processes)}
    restart = next((item.restart for item in reversed(config.restarts) if ours(item.processes)), None)
    metrics = next((item.metrics for item in config.metrics if ours(item.processes)), None)
    return MachineConfig(
        image=image,
        init=_init(config, group),
        env=config.env
        | {"FLY_PROCESS_GROUP": group}
        | ({"PRIMARY_REGION": config.primary_region} if config.primary_region else {}),
        guest=guest_of(config, group) or guest or Guest(cpu_kind="shared", cpus=1, memory_mb=256),
        services=services or None,
        checks=checks or None,
        mounts=[
            MachineMount(name=mount.source, path=mount.destination) for mount in config.mounts if ours(mount.processes)
        ]
        or None,
        metadata=metadata | {"fly_platform_version": "v2", "fly_process_group": group},
        metrics=metrics,
        files=[_file(item.file, item.local_path, read_file) for item in config.files if ours(item.processes)] or None,
        restart=restart or Restart(policy="on-failure", max_retries=10),
        stop_config=_stop(config),
        statics=list(config.statics) or None,
    )


def release_command_config(base: MachineConfig, command: str) -> MachineConfig:
    """A throw-away machine that runs the release command: no services, no volumes, not in DNS."""
    init = Init(cmd=split_command(command), entrypoint=base.init.entrypoint if base.init else None)
    return _aside(base, RELEASE_COMMAND, init, {"RELEASE_COMMAND": "1"})


def console_config(base: MachineConfig) -> MachineConfig:
    """A throw-away machine to log in to: like the app's, but it only waits."""
    alone = msgspec.structs.replace(
        base, processes=None, containers=None, volumes=None, statics=None, schedule=None, standbys=None
    )
    return _aside(alone, CONSOLE, Init(exec=["/bin/sleep", "inf"]), {})


def _aside(base: MachineConfig, group: str, init: Init, env: dict[str, str]) -> MachineConfig:
    """Beside the app's machines. A deploy removes what is left of an earlier one."""
    return msgspec.structs.replace(
        base,
        init=init,
        env=(base.env or {}) | env | {"FLY_PROCESS_GROUP": group},
        services=None,
        checks=None,
        mounts=None,
        metadata=(base.metadata or {}) | {"fly_platform_version": "v2", "fly_process_group": group},
        restart=Restart(policy="no"),
        auto_destroy=True,
        dns=DNSConfig(skip_registration=True),
    )


def guest_of(config: AppConfig, group: str) -> Guest | None:
    """The size `[[vm]]` gives a group: the entry that names it, else the one that names none."""
    named = [vm for vm in config.vms if group in vm.processes]
    general = [vm for vm in config.vms if not vm.processes]
    chosen = (named or general)[-1:]
    return guest_of_vm(chosen[0]) if chosen else None


def _init(config: AppConfig, group: str) -> Init:
    command = config.processes.get(group)
    cmd = split_command(command) if command else (list(config.init_cmd) if config.init_cmd else None)
    return Init(
        cmd=cmd or None,
        entrypoint=list(config.init_entrypoint) if config.init_entrypoint else None,
        exec=list(config.init_exec) if config.init_exec else None,
        swap_size_mb=config.swap_size_mb,
    )


def _stop(config: AppConfig) -> StopConfig | None:
    if config.kill_signal is None and config.kill_timeout_s is None:
        return None
    timeout = int(config.kill_timeout_s * 1_000_000_000) if config.kill_timeout_s is not None else None
    return StopConfig(signal=config.kill_signal, timeout=timeout)


def _with_port(check: Check, services: list[Service]) -> Check:
    if check.port is not None:
        return check
    port = next((service.internal_port for service in services), None)
    return msgspec.structs.replace(check, port=port)


def _file(file: File, local_path: str | None, read_file: Callable[[str], bytes]) -> File:
    if local_path is not None:
        return msgspec.structs.replace(file, raw_value=base64.b64encode(read_file(local_path)).decode())
    if file.raw_value is not None and not _is_base64(file.raw_value):
        return msgspec.structs.replace(file, raw_value=base64.b64encode(file.raw_value.encode()).decode())
    return file


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True
