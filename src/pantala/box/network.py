"""The box's namespaces and links: lists of commands from pure functions, and the few lines that run them.

Everything is named after the box (`pnt-…`, table `pantala_box`), so that `down` and `audit leaks` find it by name even
when the record of the box is gone.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec

from pantala.box.layout import API_PORT, EDGE_ADDRESS, PREFIX, REGISTRY_PORT, ROUTER, SUBNET, TABLE, UPLINK, Box
from pantala.errors import InternalError

RUN_NETNS = Path("/run/netns")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
COMMAND_TIMEOUT_S = 30


def raise_network(box: Box) -> Box:
    """Make namespaces, links and the way out; the box with what has to be put back later."""
    existed = RUN_NETNS.is_dir() and RUN_NETNS.is_mount()
    before = FORWARDING.read_text().strip()
    box = msgspec.structs.replace(box, created_run_netns=not existed, forwarding_before=before)
    box.record().write_bytes(msgspec.json.encode(box))  # before anything that would have to be undone
    for command in up_commands(box):
        run(command)
    run(["nft", "-f", "-"], text=uplink_rules())
    run(["nsenter", f"--net={RUN_NETNS / box.builds().netns}", "nft", "-f", "-"], text=build_rules(box))
    FORWARDING.write_text("1")
    return box


def lower_network(box: Box | None) -> None:
    """Remove whatever bears the box's names; repeats safely, also without a record."""
    _quiet(["ip", "link", "del", UPLINK])
    for name in leftover_namespaces():
        _quiet(["ip", "netns", "del", name])
    _quiet(["nft", "delete", "table", "ip", TABLE])
    if box is not None:
        FORWARDING.write_text(box.forwarding_before)
        if box.created_run_netns and RUN_NETNS.is_dir() and not any(RUN_NETNS.iterdir()):
            _quiet(["umount", str(RUN_NETNS)])
            RUN_NETNS.rmdir()


def leftover_namespaces() -> list[str]:
    if not RUN_NETNS.is_dir():
        return []
    return sorted(path.name for path in RUN_NETNS.iterdir() if path.name.startswith(PREFIX))


def up_commands(box: Box) -> list[list[str]]:
    """`ip` commands in order, for a machine without the box."""
    commands = [["ip", "netns", "add", name] for name in box.namespaces()]
    commands += [["ip", "-n", name, "link", "set", "lo", "up"] for name in box.namespaces()]
    commands += [
        ["ip", "link", "add", UPLINK, "type", "veth", "peer", "name", "uplink", "netns", ROUTER],
        ["ip", "addr", "add", f"{SUBNET}.0.1/30", "dev", UPLINK],
        ["ip", "link", "set", UPLINK, "up"],
        ["ip", "-n", ROUTER, "addr", "add", f"{SUBNET}.0.2/30", "dev", "uplink"],
        ["ip", "-n", ROUTER, "link", "set", "uplink", "up"],
        ["ip", "-n", ROUTER, "route", "add", "default", "via", f"{SUBNET}.0.1"],
        ["ip", "route", "add", f"{SUBNET}.0.0/16", "via", f"{SUBNET}.0.2", "dev", UPLINK],
        ["ip", "netns", "exec", ROUTER, "sysctl", "-qw", "net.ipv4.ip_forward=1"],
    ]
    for link in box.links():
        device = link.router_device
        commands += [
            ["ip", "-n", ROUTER, "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", link.netns],
            ["ip", "-n", ROUTER, "addr", "add", f"{link.gateway}/30", "dev", device],
            ["ip", "-n", ROUTER, "link", "set", device, "up"],
            ["ip", "-n", link.netns, "addr", "add", f"{link.address}/30", "dev", "eth0"],
            ["ip", "-n", link.netns, "link", "set", "eth0", "up"],
            ["ip", "-n", link.netns, "route", "add", "default", "via", link.gateway],
        ]
    for host in box.hosts():
        commands.append(["ip", "-n", host.link.netns, "addr", "add", f"{EDGE_ADDRESS}/32", "dev", "lo"])
    control = box.control().link
    commands.append(["ip", "-n", ROUTER, "route", "add", f"{EDGE_ADDRESS}/32", "via", control.address])
    return commands


def uplink_rules() -> str:
    """What leaves the box through this machine is translated; nothing else of this machine is touched."""
    return (
        f"table ip {TABLE} {{\n"
        "  chain postrouting {\n"
        "    type nat hook postrouting priority srcnat; policy accept;\n"
        f'    ip saddr {SUBNET}.0.0/16 oifname != "{UPLINK}" masquerade\n'
        "  }\n"
        "}\n"
    )


def build_rules(box: Box) -> str:
    """Builds may reach the registry, the token service and the outside; no host, no link-local address."""
    control = box.control().link.address
    return (
        "table inet pantala_builds {\n"
        "  chain output {\n"
        "    type filter hook output priority filter; policy accept;\n"
        '    oifname "lo" accept\n'
        "    ct state established,related accept\n"
        f"    ip daddr {control} tcp dport {{ {REGISTRY_PORT}, {API_PORT} }} accept\n"
        f"    ip daddr {{ {SUBNET}.0.0/16, 169.254.0.0/16 }} reject\n"
        "  }\n"
        "}\n"
    )


def run(command: list[str], *, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise InternalError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")


def _quiet(command: list[str]) -> None:
    """For removals, where not being there is as good."""
    subprocess.run(command, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
