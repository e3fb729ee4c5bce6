"""The agent's whole configuration: one JSON file, read before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from pantala.domain.runtime import ImageLimits
from pantala.errors import InvalidRequest
from pantala.wire.server import BusSettings


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`state_dir` survives reboots, `run_dir` does not. `trusted_keys`: owner to base64 verify key (control's; nodes
    are believed by their member rows). `edge_key`: a file of 32 bytes, the edge key that the host joined with (newer
    ones come by the catalogue). `node_key` and `signing_key` are made on first use. `identity`: folder of what
    control gave (default `state_dir/identity`; its private halves are `node.key` and `bus.seed` in
    `state_dir/keys`); the certificate is renewed when less than `renew_before_s` remains, looked at every
    `renew_every_s`. `mesh`: `ip:port` of this host's proxy for other proxies. `registries`: registry name to base
    URL; `image_limits`: what images may be (`docs/reference/images.md`). `cpus` and `memory_mib` 0 mean what the
    machine has. `driver`, `network` and `images` name a known part, or a factory `module:attribute`. A
    scheduled run is started at most `schedule_catch_up_s` late. The catalogue:
    own proofs every `beat_s`, others' holdings compared every `gossip_s`, deletions kept `tombstones_kept_s`, looked
    at every `tidy_every_s`. `links`: how 6PN goes to other hosts, by `link_device`: plain (next hop `link_via`,
    where the hosts share a router) or wireguard (UDP `wireguard_port`; `wireguard_endpoint` is `ip:port` for the
    others, by default that port of `address`, empty behind NAT). `entrances`: connections to other ports than 80 and
    443, and to Flycast, are led to the proxy; `edge_addresses`: where this host takes public traffic. The escape suite
    runs by itself `escape_suite_after_s` after a start where it never ran with this driver and init; 0: when asked."""

    node: str
    region: str
    state_dir: Path
    run_dir: Path
    bus: BusSettings
    zone: str = ""
    address: str = "127.0.0.1"
    epoch: int = 1
    control: str = "control"
    trusted_keys: dict[str, str] = {}
    edge_key: Path | None = None
    identity: Path | None = None
    renew_before_s: float = 10 * 24 * 3600.0
    renew_every_s: float = 3600.0
    node_key: Path | None = None
    signing_key: Path | None = None
    proxy_socket: Path | None = None
    mesh: str = ""
    driver: str = "container"
    network: str = "host"
    images: str = "store"
    cgroup_root: str = "pantala"
    registries: dict[str, str] = {}
    image_limits: ImageLimits = ImageLimits()
    pool4: str = "172.19.0.0/16"
    allow_private_ranges: bool = False
    closed_addresses: list[str] = []
    nameserver: str = "fdaa::3"
    idle_window_s: float = 60.0
    autostop_mode: Literal["all_idle", "one_per_pass"] = "all_idle"
    drain_s: float = 30.0
    schedule_catch_up_s: float = 3600.0
    cpus: int = 0
    memory_mib: int = 0
    machines_max: int = 1000
    beat_s: float = 1.0
    gossip_s: float = 1.0
    tombstones_kept_s: float = 7 * 24 * 3600.0
    tidy_every_s: float = 600.0
    links: Literal["none", "plain", "wireguard"] = "none"
    link_device: str = ""
    link_via: str = ""
    wireguard_port: int = 51820
    wireguard_endpoint: str | None = None
    entrances: bool = False
    edge_addresses: list[str] = []
    escape_suite_after_s: float = 60.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_lines_per_app_max: int = 100_000
    log_keep_s: float = 7 * 24 * 3600.0

    @property
    def socket(self) -> Path:
        return self.proxy_socket or self.run_dir / "agent.sock"


def read_path(wanted: type, value: object) -> object:
    """`dec_hook` of documents with paths in them."""
    if wanted is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError


def load(path: Path) -> AgentSettings:
    """Raises InvalidRequest naming what is wrong."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=AgentSettings, dec_hook=read_path)
    except FileNotFoundError as error:
        raise InvalidRequest(f"there is no settings file {path}") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path}: {error}") from error


def save(settings: AgentSettings, path: Path) -> None:
    """For those who start agents: the box and tests. Only root reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(settings, enc_hook=str)))
