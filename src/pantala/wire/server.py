"""Settings of the `pantala server` process: one JSON file, written by `up` or by the operator, read whole at start."""

from __future__ import annotations

import msgspec

from pantala.wire.hosts import Joined


class BusSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the bus is; agents have the same in their settings."""

    url: str
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"BusSettings(url={self.url!r}, user={self.user!r})"


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A node that control may place machines on. `sealing_key` empty: the first one that the node shows is kept."""

    id: str
    region: str
    zone: str = "0000"
    sealing_key: str = ""


class RegistrySettings(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is what image references begin with (`registry.<domain>[:port]`), `url` where this server reaches it,
    `backend` the `ip:port` to which edges forward that host name."""

    name: str
    url: str = ""
    backend: str = ""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`id` names this server across restarts. `listen` is `address:port`; `api_backend` is how edges reach it.

    `edge_key` is a file with the base64 public key that certificate keys are sealed to. `cluster_key` and
    `signing_key` (of control's catalogue rows) are files of 32 bytes, made when they are not there, by default under
    `state_dir`; so are the box authority (`ca/ca.pem`) and the registry's `rootcertbundle` (`registry/token.pem`).
    `builder`: address of buildkitd, empty where no builds are offered.
    """

    id: str = "server-1"
    listen: str
    state_dir: str
    bus: BusSettings
    app_domain: str
    platform_domain: str
    registry: RegistrySettings
    default_region: str
    regions: list[str]
    nodes: list[NodeSettings] = []
    edge_key: str
    cluster_key: str = ""
    signing_key: str = ""
    api_backend: str = ""
    builder: str = ""
    shared_kernel: bool = False
    requests_per_s_max: float = 50.0
    requests_burst: int = 200
    build_upload_bytes_max: int = 512 * 1024 * 1024


class Bootstrapped(msgspec.Struct, frozen=True, kw_only=True):
    """What `python -m pantala.server.bootstrap` prints. `verify_key` is that of control's catalogue rows; `registry_*`
    is what the registry's configuration wants; `hosts` answers the join requests of `--hosts FILE`, in their order."""

    token: str
    expires_at: str
    email: str
    org: str
    ca: str
    verify_key: str
    registry_bundle: str
    registry_service: str
    registry_issuer: str
    hosts: list[Joined] = []
