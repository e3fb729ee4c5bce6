"""The tunnel that carries the private network from one server to the others: WireGuard of the kernel, which the agent
makes, else `wireguard-go`, which outlives the agent. Also used by a box with `--links wireguard`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from pantala.host.place import Place
from pantala.host.supervisor import Process
from pantala.kit import binaries

SOCKETS = Path("/var/run/wireguard")
"""Fixed in wireguard-go; devices' names tell the hosts of this machine apart."""
DEVICE = "pantala-wg"
PORT = 51820
PROBE = "wgprobe"


def agent_fields() -> dict[str, Any]:
    """What a server's agent is told of it."""
    return {"links": "wireguard", "link_device": DEVICE, "wireguard_port": PORT}


def own_tunnel(place: Place) -> list[Process]:
    """The tunnel program of a server; none where the kernel has WireGuard, or the host has no tunnel."""
    if place.agent.get("links") != "wireguard" or kernel_has_wireguard():
        return []
    device = str(place.agent["link_device"])
    return [tunnel_process(name="wireguard", device=device, netns=place.netns, logs=place.logs_dir)]


def tunnel_process(*, name: str, device: str, netns: str, logs: Path) -> Process:
    return Process(
        name=name,
        command=[str(binaries.find("wireguard-go")), "-f", device],
        netns=netns,
        env={"LOG_LEVEL": "error"},
        log=str(logs / f"{name}.log"),
        ready=f"unix:{SOCKETS / device}.sock",
    )


def kernel_has_wireguard(netns: str = "") -> bool:
    """Only making a device tells: the module is loaded on demand."""
    link = ["ip", *(["-n", netns] if netns else []), "link"]
    made = subprocess.run([*link, "add", PROBE, "type", "wireguard"], capture_output=True, timeout=10, check=False)
    if made.returncode == 0:
        subprocess.run([*link, "del", PROBE], capture_output=True, timeout=10, check=False)
    return made.returncode == 0
