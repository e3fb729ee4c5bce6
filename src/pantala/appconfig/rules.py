"""Rules that tie sections together: groups exist, ports meet, strategies fit (as flyctl's `internal/appconfig`)."""

from __future__ import annotations

import re

from pantala.appconfig.model import AppConfig
from pantala.appconfig.reading import Document
from pantala.appconfig.sizes import guest_of_vm
from pantala.errors import InvalidRequest

APP_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
APP_NAME_RULE = "lower-case letters, digits and dashes, at most 63, not starting or ending with a dash"


def check_rules(config: AppConfig, document: Document) -> None:
    if config.app is not None and not APP_NAME.fullmatch(config.app):
        document.error("app", f"{config.app!r} is not a name; it must be {APP_NAME_RULE}")
    if config.primary_region is not None and not re.fullmatch(r"[a-z]{3}", config.primary_region):
        document.error("primary_region", f"{config.primary_region!r} is not a region code such as iad")
    _services(config, document)
    _groups(config, document)
    _deploy(config, document)
    _build(config, document)
    _sizes(config, document)


def _services(config: AppConfig, document: Document) -> None:
    declared = bool(config.processes)
    if declared:
        for group in config.services:
            if not group.processes:
                count = len(config.processes)
                noun = "process" if count == 1 else "processes"
                document.error(
                    "services",
                    f"Service has no processes set but app has {count} {noun} defined; "  # noqa: S608 - no SQL
                    "update fly.toml to set processes for each service",
                )
    owners: dict[tuple[str, int], set[str]] = {}
    for group in config.services:
        for port in group.service.ports or ():
            low, high = port.start_port or port.port or 0, port.end_port or port.port or 0
            for number in range(low, min(high, low + 1000) + 1):
                key = (group.service.protocol or "tcp", number)
                owners.setdefault(key, set()).update(group.processes or (config.default_group(),))
    for (_, number), groups in sorted(owners.items()):
        if len(groups) > 1:
            document.error(
                "services", f"port {number} is declared by several process groups: {', '.join(sorted(groups))}"
            )


def _groups(config: AppConfig, document: Document) -> None:
    known = set(config.groups())
    used = [("services", item.processes) for item in config.services]
    used += [("checks", item.processes) for item in config.checks]
    used += [("restart", item.processes) for item in config.restarts]
    used += [("files", item.processes) for item in config.files]
    used += [("mounts", item.processes) for item in config.mounts]
    used += [("vm", item.processes) for item in config.vms]
    for section, processes in used:
        for name in processes:
            if name not in known:
                noun = "Service" if section == "services" else f"[[{section}]]"
                document.error(
                    section,
                    f"{noun} specifies '{name}' as one of its processes, but no processes are defined with that name; "
                    f"there is {', '.join(sorted(known))}",
                )
    mounted: dict[str, int] = {}
    for mount in config.mounts:
        for name in mount.processes or (config.default_group(),):
            mounted[name] = mounted.get(name, 0) + 1
    for name, count in mounted.items():
        if count > 1:
            document.error("mounts", f"group '{name}' has more than one [[mounts]] section defined")
    if not any(item.service.internal_port for item in config.services):
        for item in config.checks:
            if item.check.port is None:
                document.error(f"checks.{item.name}.port", "is required, because there is no service to take it from")


def _deploy(config: AppConfig, document: Document) -> None:
    if config.deploy.strategy in ("canary", "bluegreen") and config.mounts:
        document.error("deploy.strategy", f"{config.deploy.strategy} cannot be used with [[mounts]]")


def _build(config: AppConfig, document: Document) -> None:
    build = config.build
    chosen = [name for name, value in (("image", build.image), ("dockerfile", build.dockerfile)) if value]
    if len(chosen) > 1:
        document.warn("build", f"several build methods are set ({', '.join(chosen)}); {chosen[0]} is used")
    for key in build.unsupported:
        document.error(f"build.{key}", "is not supported yet; use a Dockerfile or an image")


def _sizes(config: AppConfig, document: Document) -> None:
    for index, vm in enumerate(config.vms):
        field = f"vm[{index}]"
        try:
            guest_of_vm(vm, field=field)
        except InvalidRequest as error:
            document.error(error.field or field, error.message.removeprefix(f"{error.field}: "))
