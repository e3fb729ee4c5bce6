"""An app's configuration as fly.toml says it, parsed. Durations are seconds, memory MiB."""

from __future__ import annotations

from typing import Any

import msgspec

from pantala.wire.machine import (
    Check,
    Concurrency,
    File,
    Metrics,
    Port,
    Restart,
    Service,
    Static,
)

DEFAULT_GROUP = "app"


class Build(msgspec.Struct, frozen=True, kw_only=True):
    image: str | None = None
    dockerfile: str | None = None
    ignorefile: str | None = None
    target: str | None = None
    args: dict[str, str] = {}
    unsupported: tuple[str, ...] = ()


class Deploy(msgspec.Struct, frozen=True, kw_only=True):
    strategy: str = "rolling"
    max_unavailable: float = 0.33
    wait_timeout_s: float = 300.0
    release_command: str | None = None
    release_command_timeout_s: float = 300.0


class VM(msgspec.Struct, frozen=True, kw_only=True):
    """`processes` empty: every group that no other `[[vm]]` names."""

    size: str | None = None
    cpus: int | None = None
    cpu_kind: str | None = None
    memory_mib: int | None = None
    max_memory_mib: int | None = None
    isolation: str | None = None
    persist_rootfs: str | None = None
    processes: tuple[str, ...] = ()


class GroupService(msgspec.Struct, frozen=True, kw_only=True):
    service: Service
    processes: tuple[str, ...]


class GroupCheck(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    check: Check
    processes: tuple[str, ...]


class GroupFile(msgspec.Struct, frozen=True, kw_only=True):
    """`local_path` is read at deploy, relative to the configuration file."""

    file: File
    local_path: str | None
    processes: tuple[str, ...]


class GroupRestart(msgspec.Struct, frozen=True, kw_only=True):
    restart: Restart
    processes: tuple[str, ...]


class GroupMetrics(msgspec.Struct, frozen=True, kw_only=True):
    metrics: Metrics
    processes: tuple[str, ...]


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    destination: str
    initial_size_gb: int | None
    processes: tuple[str, ...]


class AppConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`document` is the file as it was read, unknown keys included, so that it can be kept with the release."""

    app: str | None
    primary_region: str | None
    kill_signal: str | None
    kill_timeout_s: float | None
    swap_size_mb: int | None
    env: dict[str, str]
    processes: dict[str, str]
    build: Build
    deploy: Deploy
    services: tuple[GroupService, ...]
    checks: tuple[GroupCheck, ...]
    mounts: tuple[Mount, ...]
    vms: tuple[VM, ...]
    restarts: tuple[GroupRestart, ...]
    files: tuple[GroupFile, ...]
    statics: tuple[Static, ...]
    metrics: tuple[GroupMetrics, ...]
    console_command: str | None
    init_cmd: tuple[str, ...] | None
    init_entrypoint: tuple[str, ...] | None
    init_exec: tuple[str, ...] | None
    document: dict[str, Any]

    def groups(self) -> list[str]:
        """Process groups in order; one implicit group without `[processes]`."""
        return list(self.processes) or [DEFAULT_GROUP]

    def default_group(self) -> str:
        groups = self.groups()
        return DEFAULT_GROUP if DEFAULT_GROUP in groups else min(groups)


__all__ = [
    "DEFAULT_GROUP",
    "VM",
    "AppConfig",
    "Build",
    "Concurrency",
    "Deploy",
    "GroupCheck",
    "GroupFile",
    "GroupMetrics",
    "GroupRestart",
    "GroupService",
    "Mount",
    "Port",
]
