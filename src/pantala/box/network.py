"""The box's namespaces and links: lists of commands from pure functions, and the few lines that run them.

Everything is named after the box (`pnt-…`, table `pantala_box`), so that `down` and `audit leaks` find it by name even
when the record of the box is gone.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pantala.box import forwarding, relay
from pantala.box.layout import (
    API_PORT,
    EDGE_ADDRESS,
    EVERYTHING6,
    LINKS_MAX,
    POOL,
    PREFIX,
    PUBLIC,
    REGISTRY_PORT,
    ROUTER,
    SUBNET,
    TABLE,
    UPLINK,
    Box,
    Host,
    Link,
)
from pantala.box.router import (
    Cuts,
    add_cut,
    heal,
    queue_commands,
    router_rules,
    routing_commands,
    unrouting_commands,
)
from pantala.box.routing import reconfigure
from pantala.errors import CapacityError, Conflict, InternalError, InvalidRequest, NotFound

RUN_NETNS = Path("/run/netns")
COMMAND_TIMEOUT_S = 30
LOSS_MAX = 0.9
LAST_METRIC = "4096"


def raise_network(box: Box) -> Box:
    """Make namespaces, links and the way out; the box with what has to be put back later."""
    existed = RUN_NETNS.is_dir() and RUN_NETNS.is_mount()
    box = msgspec.structs.replace(box, created_run_netns=not existed)
    _save(box)  # before anything that would have to be undone
    for command, text in batched(up_commands(box)):
        run(command, text=text)
    run(["ip", "netns", "exec", ROUTER, "nft", "-f", "-"], text=router_rules(box, read_cuts(box)))
    run(["nft", "-f", "-"], text=uplink_rules())
    run(["nsenter", f"--net={RUN_NETNS / box.builds().netns}", "nft", "-f", "-"], text=build_rules(box))
    forwarding.hold()
    return box


def lower_network(box: Box | None) -> None:
    """Remove whatever bears the box's names; repeats safely, also without a record."""
    _quiet(["ip", "link", "del", UPLINK])
    for name in leftover_namespaces():
        _quiet(["ip", "netns", "del", name])
    _quiet(["nft", "delete", "table", "ip", TABLE])
    forwarding.release()
    if box is not None and box.created_run_netns and RUN_NETNS.is_dir() and not any(RUN_NETNS.iterdir()):
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
        ["ip", "netns", "exec", ROUTER, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"],
    ]
    for link in box.links():
        commands += link_commands(box, link)
    # Until BIRD knows better, and where there is nothing to choose.
    for net in PUBLIC:
        fallback = [net, "via", box.control().link.address, "metric", LAST_METRIC]
        commands.append(["ip", "-n", ROUTER, "route", "add", *fallback])
    if box.pool6:
        nearest = ["via", box.control().link.address6, "metric", LAST_METRIC]
        commands.append(["ip", "-n", ROUTER, "route", "add", box.pool6, *nearest])
    if box.distances:
        commands += queue_commands()
    return commands


def batched(commands: Sequence[list[str]]) -> list[tuple[list[str], str | None]]:
    """The same with few programs, which are told the rest on stdin: to start one takes longer than what it does, and 35
    regions need a thousand. This machine's own come first, then the router's, whose links reach into the others."""
    told: dict[tuple[str, ...], list[str]] = {("ip",): [], ("ip", "-n", ROUTER): []}
    others: list[tuple[list[str], str | None]] = []
    for command in commands:
        if command[:3] == ["ip", "netns", "exec"] or command[0] != "ip":
            others.append((command, None))
            continue
        start = command.index("-n") + 2 if "-n" in command[:3] else 1
        told.setdefault(tuple(command[:start]), []).append(" ".join(command[start:]))
    batches = [([*program, "-batch", "-"], "\n".join(lines) + "\n") for program, lines in told.items() if lines]
    return [*batches, *others]


def link_commands(box: Box, link: Link) -> list[list[str]]:
    """What connects one namespace, which is there, with the router."""
    device, netns = link.router_device, link.netns
    commands = [
        ["ip", "-n", ROUTER, "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", netns],
        ["ip", "-n", ROUTER, "addr", "add", f"{link.gateway}/30", "dev", device],
        ["ip", "-n", ROUTER, "link", "set", device, "up"],
        ["ip", "-n", netns, "addr", "add", f"{link.address}/30", "dev", "eth0"],
        ["ip", "-n", netns, "link", "set", "eth0", "up"],
        ["ip", "-n", netns, "route", "add", "default", "via", link.gateway],
    ]
    host = next((host for host in box.all_hosts() if host.link == link), None)
    if host is not None and host.edge:
        commands.append(["ip", "-n", netns, "addr", "add", f"{EDGE_ADDRESS}/32", "dev", "lo"])
        commands.append(["ip", "-n", netns, "route", "add", "local", POOL, "dev", "lo"])
        if box.pool6:
            commands.append(["ip", "-n", netns, "route", "add", "local", box.pool6, "dev", "lo"])
    if box.links_kind == "plain" and box.region_of(link) is not None:
        commands += [
            ["ip", "-n", ROUTER, "addr", "add", f"{link.gateway6}/64", "dev", device, "nodad"],
            ["ip", "-n", netns, "addr", "add", f"{link.address6}/64", "dev", "eth0", "nodad"],
            ["ip", "-n", netns, "route", "add", EVERYTHING6, "via", link.gateway6],
        ]
    return commands + routing_commands(box, link)


# -- a running box changes -------------------------------------------------------------------------------------------


def add_link(box: Box, name: str, *, region: str, edge: bool = True) -> tuple[Box, Host]:
    """Connect one more host: a namespace `pnt-<name>` with addresses like those of the others. The box does not run
    what is in it; `routing.plan_edge` says what announces it. Raises Conflict when the name is taken."""
    if any(host.node == name for host in box.all_hosts()):
        raise Conflict(f"this box has a host {name} already")
    used = {link.third for link in box.links()}
    third = next((number for number in range(1, LINKS_MAX + 1) if number not in used), None)
    if third is None:
        raise CapacityError(f"a box has {LINKS_MAX} hosts at most", excluded={"links": 1})
    host = Host(node=name, region=region, link=Link(netns=f"{PREFIX}{name}", third=third), edge=edge)
    grown = msgspec.structs.replace(box, attached=[*box.attached, host])
    _save(grown)
    try:
        run(["ip", "netns", "add", host.link.netns])
        run(["ip", "-n", host.link.netns, "link", "set", "lo", "up"])
        for command in link_commands(grown, host.link):
            run(command)
        refresh_router(grown)
    except BaseException:
        remove_link(grown, name)
        raise
    return grown, host


def remove_link(box: Box, name: str) -> Box:
    """Take an attached host's namespace away; what lives in it loses its network. Raises NotFound."""
    host = next((host for host in box.attached if host.node == name), None)
    if host is None:
        raise NotFound(f"no host {name} was attached to this box")
    shrunk = msgspec.structs.replace(box, attached=[other for other in box.attached if other != host])
    for command in unrouting_commands(box, host.link):
        _quiet(command)
    _quiet(["ip", "-n", ROUTER, "link", "del", host.link.router_device])
    _quiet(["ip", "netns", "del", host.link.netns])
    _save(shrunk)
    cuts = read_cuts(box)
    if name in cuts.nodes:
        _write_cuts(shrunk, heal(cuts, [name]))
    refresh_router(shrunk)
    return shrunk


def refresh_router(box: Box) -> None:
    """Firewall, BIRD and relay of the router follow the box as it is now."""
    cuts = read_cuts(box)
    run(["ip", "netns", "exec", ROUTER, "nft", "-f", "-"], text=router_rules(box, cuts))
    reconfigure(box, cuts)
    relay.reload(box, loss=cuts.loss)


def cut(box: Box, name: str) -> Cuts:
    """Cut a region or a node off from the others. Raises InvalidRequest when it is neither."""
    return _change_cuts(box, add_cut(box, read_cuts(box), name))


def heal_cuts(box: Box, names: Sequence[str]) -> Cuts:
    """Take cuts back, all of them without names. Raises InvalidRequest for what is not cut off."""
    return _change_cuts(box, heal(read_cuts(box), names))


def set_loss(box: Box, loss: float) -> Cuts:
    """Lose a share of the packets between regions. Raises InvalidRequest where no relay could."""
    if not box.distances:
        raise InvalidRequest("this box has no distances between its regions", hint="`pantala up --distances`")
    if not 0 <= loss <= LOSS_MAX:
        raise InvalidRequest(f"must be 0 to {LOSS_MAX:g}", field="--loss")
    return _change_cuts(box, msgspec.structs.replace(read_cuts(box), loss=loss))


def read_cuts(box: Box) -> Cuts:
    try:
        return msgspec.json.decode((box.run_dir / "cuts.json").read_bytes(), type=Cuts)
    except FileNotFoundError:
        return Cuts()


def _change_cuts(box: Box, cuts: Cuts) -> Cuts:
    _write_cuts(box, cuts)
    refresh_router(box)
    return cuts


def _write_cuts(box: Box, cuts: Cuts) -> None:
    (box.run_dir / "cuts.json").write_bytes(msgspec.json.encode(cuts))


def _save(box: Box) -> None:
    fresh = box.record().with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(box))
    fresh.rename(box.record())


# -- rules of this machine and of builds -----------------------------------------------------------------------------


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
