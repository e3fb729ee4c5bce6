"""Reading `ServerSettings`, and the paths that follow from them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pantala.control.context import ControlSettings
from pantala.errors import InvalidRequest
from pantala.kit.sealing import unb64
from pantala.wire.server import ServerSettings


def read(path: Path) -> ServerSettings:
    """Raises InvalidRequest naming the file and the setting that is wrong."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServerSettings)
    except OSError as error:
        raise InvalidRequest(f"cannot be read: {error}", field=str(path)) from error
    except msgspec.MsgspecError as error:
        raise InvalidRequest(str(error), field=str(path)) from error


def control_settings(settings: ServerSettings) -> ControlSettings:
    return ControlSettings(
        app_domain=settings.app_domain,
        platform_domain=settings.platform_domain,
        registry=settings.registry.name,
        default_region=settings.default_region,
        regions=tuple(settings.regions),
        api_backend=settings.api_backend,
        registry_backend=settings.registry.backend,
        shared_kernel=settings.shared_kernel,
    )


def database_path(settings: ServerSettings) -> Path:
    return Path(settings.state_dir) / "control.db"


def cluster_key_path(settings: ServerSettings) -> Path:
    return Path(settings.cluster_key or Path(settings.state_dir) / "cluster.key")


def signing_key_path(settings: ServerSettings) -> Path:
    return Path(settings.signing_key or Path(settings.state_dir) / "signing.key")


def edge_key(settings: ServerSettings) -> str:
    """The edges' public key. Raises InvalidRequest when the file does not hold one."""
    path = Path(settings.edge_key)
    try:
        text = path.read_text().strip()
        length = len(unb64(text))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read as base64: {error}", field="edge_key") from error
    if length != 32:
        raise InvalidRequest(f"{path} holds {length} bytes; an X25519 public key has 32", field="edge_key")
    return text


def address_of(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{listen!r} is not address:port", field="listen")
    return host.strip("[]"), int(port)
