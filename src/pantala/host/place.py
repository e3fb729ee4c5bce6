"""Where one host is on its machine: folders, addresses, namespace. A box has one for each of its hosts, a server one.

<state>/keys/            sealing.key, signing.key, bus.seed, node.key: made here, never leave
<state>/identity/        what control gave: node.pem, authority.pem, bus.creds, edge.key; joined.json
<state>/agent.json       settings of the host's processes, written anew at each start
<state>/proxy.json
<state>/nats.conf
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

BUS_PORT, ROUTES_PORT, LEAVES_PORT, MESH_PORT, ADMIN_PORT = 4222, 6222, 7422, 4443, 9180


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """`state` survives reboots, `run` does not. `address`: where other hosts reach this one. `listen`: addresses that
    take public traffic; none where the host is no edge. `netns`: name of the network namespace that the processes run
    in, empty for the machine's own. `suffix`: ends the names of its processes, so that hosts of one box differ.
    `agent`: fields of AgentSettings that are this host's own, such as its links to other hosts."""

    state: str
    run: str
    logs: str
    address: str
    listen: list[str] = []
    netns: str = ""
    suffix: str = ""
    cgroup_root: str = "pantala"
    agent: dict[str, Any] = {}

    @property
    def state_dir(self) -> Path:
        return Path(self.state)

    @property
    def run_dir(self) -> Path:
        return Path(self.run)

    @property
    def logs_dir(self) -> Path:
        return Path(self.logs)

    def key(self, name: str) -> Path:
        return self.state_dir / "keys" / name

    def identity(self, name: str) -> Path:
        return self.state_dir / "identity" / name

    @property
    def joined(self) -> Path:
        return self.identity("joined.json")

    @property
    def agent_settings(self) -> Path:
        return self.state_dir / "agent.json"

    @property
    def proxy_settings(self) -> Path:
        return self.state_dir / "proxy.json"

    @property
    def bus_settings(self) -> Path:
        return self.state_dir / "nats.conf"

    @property
    def feed_socket(self) -> Path:
        return self.run_dir / "proxy.sock"

    @property
    def bus_url(self) -> str:
        return f"nats://{self.address}:{BUS_PORT}"

    @property
    def mesh(self) -> str:
        """Where its proxy listens for other proxies."""
        return f"{self.address}:{MESH_PORT}"

    def make_folders(self) -> None:
        for folder in (self.run_dir, self.logs_dir, self.state_dir / "keys", self.state_dir / "identity"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
