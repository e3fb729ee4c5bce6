"""How the hosts of a box carry 6PN to one another: what their agents are told, and the tunnel programs that run.

Plain links need no program: the router sends each /80 to its host. With `--links wireguard` every host has a tunnel
device; where the kernel has WireGuard the agent makes it, elsewhere `wireguard-go` does, and outlives the agent.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec

from pantala.box.layout import ROUTER, WIREGUARD_PORT, Box, Host, LinkKind
from pantala.host.supervisor import Process
from pantala.kit import binaries

SOCKETS = Path("/var/run/wireguard")
"""Fixed in wireguard-go; the device's name tells the hosts of all boxes apart."""
PROBE = "wgprobe"


class AgentLinks(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of AgentSettings of the same names."""

    links: LinkKind
    link_device: str
    link_via: str = ""
    wireguard_port: int = WIREGUARD_PORT


def agent_links(box: Box, host: Host) -> AgentLinks:
    """What the host's agent is told: `AgentSettings(..., **msgspec.structs.asdict(agent_links(box, host)))`."""
    if box.links_kind == "plain":
        return AgentLinks(links="plain", link_device="eth0", link_via=host.link.gateway6)
    return AgentLinks(links="wireguard", link_device=host.wireguard_device)


def plan_tunnels(box: Box) -> list[Process]:
    """Tunnel programs, to be started before the agents. None for plain links, or a kernel with WireGuard."""
    if box.links_kind == "plain" or kernel_has_wireguard():
        return []
    return [plan_tunnel(box, host) for host in box.hosts()]


def plan_tunnel(box: Box, host: Host) -> Process:
    device = host.wireguard_device
    return Process(
        name=f"wireguard-{host.node}",
        command=[str(binaries.find("wireguard-go")), "-f", device],
        netns=host.link.netns,
        env={"LOG_LEVEL": "error"},
        log=str(box.logs_dir() / f"wireguard-{host.node}.log"),
        ready=f"unix:{SOCKETS / device}.sock",
    )


def kernel_has_wireguard() -> bool:
    """Only making a device tells: the module is loaded on demand. In the router, where nobody minds."""
    inside = ["ip", "-n", ROUTER, "link"]
    made = subprocess.run([*inside, "add", PROBE, "type", "wireguard"], capture_output=True, timeout=10, check=False)
    if made.returncode == 0:
        subprocess.run([*inside, "del", PROBE], capture_output=True, timeout=10, check=False)
    return made.returncode == 0
