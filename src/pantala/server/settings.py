"""Reading `ServerSettings`, and the paths that follow from them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pantala.control.context import ControlSettings
from pantala.errors import InvalidRequest
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
        registry_url=settings.registry.url,
        shared_kernel=settings.shared_kernel,
        beat_s=settings.beat_s,
        bus_hubs=tuple(settings.bus_hubs),
        bus_routes=tuple(settings.bus_routes),
        edge_addresses=tuple(settings.edge_addresses),
        closed_addresses=tuple(settings.closed_addresses),
        pools=settings.pools,
        acme_directory=settings.acme_directory,
        acme_ca_file=settings.acme_ca_file,
        acme_email=settings.acme_email,
        acme_eab_kid=settings.acme_eab_kid,
        acme_eab_key_file=settings.acme_eab_key_file,
        sign_names=settings.sign_names,
        resolvers=tuple(settings.resolvers),
        standby_after_s=settings.standby_after_s,
        audit_kept_s=settings.audit_kept_s,
        writers=settings.buckets.writers if settings.buckets else {},
    )


def database_path(settings: ServerSettings) -> Path:
    return Path(settings.state_dir) / "control.db"


def cluster_key_path(settings: ServerSettings) -> Path:
    return Path(settings.cluster_key or Path(settings.state_dir) / "cluster.key")


def signing_key_path(settings: ServerSettings) -> Path:
    return Path(settings.signing_key or Path(settings.state_dir) / "signing.key")


def address_of(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{listen!r} is not address:port", field="listen")
    return host.strip("[]"), int(port)
