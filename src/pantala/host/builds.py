"""The network namespace that a server's builds run in: away from the control plane's, with rules of its own.

    builds (172.31.255.2) ⇄ this host (172.31.255.1) ⇄ outside, translated

Builds reach the registry, the API (tokens for the registry) and the outside, but neither this host's other ports, nor
other hosts, nor link-local addresses. `python -m pantala.host.builds JSON` makes it; safe to repeat. A box has
such a namespace too, behind its router (`pantala.box.network`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from pantala.errors import InternalError

GATEWAY, ADDRESS = "172.31.255.1", "172.31.255.2"
DEVICE = "pnt-builds"
TABLE = "pantala_builds"
WITHIN_S = 30
RUN_NETNS = Path("/run/netns")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


class Builds(msgspec.Struct, frozen=True, kw_only=True):
    """`netns`: its name. `open`: `address:port` of registry and API. `closed`: networks that builds must not reach."""

    netns: str
    open: list[str]
    closed: list[str]

    def commands(self) -> list[list[str]]:
        """`ip` commands for a machine without it."""
        inside = ["ip", "-n", self.netns]
        return [
            ["ip", "netns", "add", self.netns],
            [*inside, "link", "set", "lo", "up"],
            ["ip", "link", "add", DEVICE, "type", "veth", "peer", "name", "eth0", "netns", self.netns],
            ["ip", "addr", "add", f"{GATEWAY}/30", "dev", DEVICE],
            ["ip", "link", "set", DEVICE, "up"],
            [*inside, "addr", "add", f"{ADDRESS}/30", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "route", "add", "default", "via", GATEWAY],
        ]

    def rules_inside(self) -> str:
        accepted = "".join(
            f"    ip daddr {address} tcp dport {port} accept\n"
            for address, _, port in (listener.rpartition(":") for listener in self.open)
        )
        own = {listener.rpartition(":")[0] for listener in self.open}
        closed = ", ".join(sorted({*self.closed, *own, GATEWAY, "169.254.0.0/16"}))
        return (
            f"table inet {TABLE} {{\n"
            "  chain output {\n"
            "    type filter hook output priority filter; policy accept;\n"
            '    oifname "lo" accept\n'
            "    ct state established,related accept\n"
            f"{accepted}"
            f"    ip daddr {{ {closed} }} reject\n"
            "  }\n"
            "}\n"
        )

    def rules_outside(self) -> str:
        return (
            f"table ip {TABLE} {{\n"
            "  chain postrouting {\n"
            "    type nat hook postrouting priority srcnat; policy accept;\n"
            f'    ip saddr {ADDRESS} oifname != "{DEVICE}" masquerade\n'
            "  }\n"
            "}\n"
        )

    def setup_command(self) -> list[str]:
        """What a unit of systemd runs before the builder."""
        return [sys.executable, "-m", "pantala.host.builds", msgspec.json.encode(self).decode()]

    def raise_network(self) -> None:
        if (RUN_NETNS / self.netns).exists():
            return
        for command in self.commands():
            _run(command)
        _run(["nsenter", f"--net={RUN_NETNS / self.netns}", "nft", "-f", "-"], text=self.rules_inside())
        _run(["nft", "-f", "-"], text=self.rules_outside())
        FORWARDING.write_text("1")

    def lower_network(self) -> None:
        """Repeats safely. Forwarding stays on: others on this machine may need it by now."""
        for command in (["ip", "link", "del", DEVICE], ["ip", "netns", "del", self.netns],
                        ["nft", "delete", "table", "ip", TABLE]):  # fmt: skip
            subprocess.run(command, capture_output=True, timeout=WITHIN_S, check=False)


def _run(command: list[str], *, text: str | None = None) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    if done.returncode != 0:
        raise InternalError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")


def main(arguments: list[str]) -> int:
    """With the JSON document of a `Builds`: units of systemd call it."""
    msgspec.json.decode(arguments[0], type=Builds).raise_network()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
