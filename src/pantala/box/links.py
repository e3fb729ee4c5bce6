"""How the hosts of a box carry 6PN to one another: what their agents are told, and the tunnel programs that run.

Plain links need no program: the router sends each /80 to its host. With `--links wireguard` every host has a tunnel
device of its own (`pantala.host.tunnels`).
"""

from __future__ import annotations

import msgspec

from pantala.box.layout import ROUTER, WIREGUARD_PORT, Box, Host, LinkKind
from pantala.host.supervisor import Process
from pantala.host.tunnels import kernel_has_wireguard, tunnel_process


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
    if box.links_kind == "plain" or kernel_has_wireguard(ROUTER):
        return []
    return [plan_tunnel(box, host) for host in box.hosts()]


def plan_tunnel(box: Box, host: Host) -> Process:
    return tunnel_process(
        name=f"wireguard-{host.node}", device=host.wireguard_device, netns=host.link.netns, logs=box.logs_dir()
    )
