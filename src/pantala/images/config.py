"""The parts of an OCI image config that decide how its process runs: read, judged, made ours. Pure."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from pantala.domain.runtime import ImageConfig
from pantala.errors import InvalidRequest
from pantala.images.platforms import Platform, host_architecture, needed, rank
from pantala.images.reference import unparse
from pantala.wire.machine import ImageRef

FIELD = "config.image"


class _RunConfig(msgspec.Struct, frozen=True, rename="pascal"):
    """`config` of an OCI image config; every part may be missing or null."""

    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    exposed_ports: dict[str, Any] | None = None
    labels: dict[str, str] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str] | None = None


class _ImageDocument(msgspec.Struct, frozen=True):
    architecture: str | None = None
    os: str | None = None
    variant: str | None = None
    config: _RunConfig | None = None
    rootfs: _RootFs | None = None


def image_config(image: ImageRef, document: Any) -> ImageConfig:
    """The parts of an OCI image config that count. Raises InvalidRequest for another platform."""
    try:
        found = msgspec.convert(document, _ImageDocument)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{unparse(image)} has no readable config: {error}", field=FIELD) from error
    made_for = Platform(found.os or "linux", found.architecture or host_architecture(), found.variant or "")
    if rank(made_for) is None:
        raise InvalidRequest(
            f"{unparse(image)} is made for {made_for}, this host needs {needed()}",
            field=FIELD,
        )
    config = found.config or _RunConfig()
    _no_nul(image, config)
    ports = (entry.partition("/") for entry in config.exposed_ports or {})
    return ImageConfig(
        entrypoint=tuple(config.entrypoint or ()),
        cmd=tuple(config.cmd or ()),
        env={name: value for name, _, value in (entry.partition("=") for entry in config.env or ())},
        user=config.user or "",
        cwd=config.working_dir or "/",
        stop_signal=config.stop_signal or "",
        exposed_ports=tuple(sorted(int(port) for port, _, kind in ports if port.isdigit() and kind in ("", "tcp"))),
        labels=config.labels or {},
    )


def _no_nul(image: ImageRef, config: _RunConfig) -> None:
    """The kernel ends a word at a NUL, so none can hold one."""
    words = {
        "Entrypoint": config.entrypoint,
        "Cmd": config.cmd,
        "Env": config.env,
        "User": [config.user or ""],
        "WorkingDir": [config.working_dir or ""],
    }
    for name, values in words.items():
        if any("\0" in value for value in values or ()):
            raise InvalidRequest(f"{unparse(image)}: {name} of its config holds a NUL character", field=FIELD)


def read_diff_ids(document: Any) -> list[str]:
    """The digests of the plain layers, the lowest first; empty where the config names none."""
    rootfs = cast("dict[str, Any]", document).get("rootfs")
    try:
        return msgspec.convert(rootfs, _RootFs).diff_ids or []
    except msgspec.ValidationError:
        return []
