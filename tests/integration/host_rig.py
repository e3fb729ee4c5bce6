"""A host's namespace with a way out and machines behind it, and `HostNetwork` in it.

[outside]  198.51.100.1 (a server), 10.50.0.1, 169.254.169.254, 2001:db8::1
    │ veth
[host]     198.51.100.2, 10.50.0.2, 2001:db8::2     HostNetwork runs in here, in a process of its own
    │ veth        │ veth
machine a       machine b …
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from pantala.domain.policies import Allowed
from pantala.domain.runtime import NetworkPlan
from pantala.kit import binaries, ids
from pantala.net import sixpn, slots
from pantala.testing.poll import until_sync
from pantala.testing.scratch import remove

SERVER = "198.51.100.1"
HOST = "198.51.100.2"
METADATA = "169.254.169.254"
PRIVATE = "10.50.0.1"

# Serves calls of `HostNetwork` inside the host's namespace, a line each; the object is made anew for every call.
CALLS = """
import anyio, json, msgspec, sys
from pathlib import Path
from pantala.domain.policies import Allowed
from pantala.domain.runtime import NetworkPlan
from pantala.net import HostNetwork
async def call(request):
    network = HostNetwork(run_dir=Path(request["run_dir"]), init=Path(request["init"]), **request["options"])
    argument = request["argument"]
    if request["method"] == "police":
        return await network.police(msgspec.convert(argument, dict[str, Allowed]))
    if request["method"] == "ensure":
        argument = msgspec.convert(argument, NetworkPlan)
    method = getattr(network, request["method"])
    return await (method() if argument is None else method(argument))
for line in sys.stdin:
    print(json.dumps(msgspec.to_builtins(anyio.run(call, json.loads(line)), enc_hook=str)), flush=True)
"""


class Namespace:
    """A network namespace held by a process."""

    def __init__(self) -> None:
        self.holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own = Path("/proc/self/ns/net").readlink()
        until_sync(
            Path(f"/proc/{self.holder.pid}/ns/net").readlink, lambda seen: seen != own, within_s=15, every_s=0.005
        )
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command: str, stdin: str = "") -> str:
        prefix = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", "--"]
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, input=stdin, timeout=30, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()


class Host:
    """A host's namespace with a way out, and `HostNetwork` in it, a new process for each call."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.outside, self.host = Namespace(), Namespace()
        self.listeners: list[subprocess.Popen[bytes]] = []
        self.others: list[subprocess.Popen[str]] = []
        self.options: dict[str, Any] = {}
        self.outside.run(
            "ip",
            "link",
            "add",
            "out0",
            "type",
            "veth",
            "peer",
            "name",
            "up0",
            "netns",
            f"/proc/{self.host.holder.pid}/ns/net",
        )
        for address in (f"{SERVER}/24", f"{PRIVATE}/24", f"{METADATA}/32", "2001:db8::1/64"):
            self.outside.run("ip", "addr", "add", address, "dev", "out0", *(["nodad"] if ":" in address else []))
        self.outside.run("ip", "link", "set", "out0", "up")
        for address in (f"{HOST}/24", "10.50.0.2/24", "2001:db8::2/64"):
            self.host.run("ip", "addr", "add", address, "dev", "up0", *(["nodad"] if ":" in address else []))
        self.host.run("ip", "link", "set", "up0", "up")
        self.host.run("ip", "route", "add", "default", "via", SERVER)
        self.host.run("ip", "-6", "route", "add", "default", "via", "2001:db8::1")
        self.caller = subprocess.Popen(
            [*where_prefix(self.host), sys.executable, "-c", CALLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def call(self, method: str, argument: Any = None) -> Any:
        request = {
            "run_dir": str(self.base / "net"),
            "init": str(binaries.find("pantala-init")),
            "options": self.options,
            "method": method,
            "argument": argument,
        }
        assert self.caller.stdin is not None
        assert self.caller.stdout is not None
        self.caller.stdin.write(json.dumps(request).encode() + b"\n")
        self.caller.stdin.flush()
        answer = self.caller.stdout.readline()
        assert answer, f"{method} failed, see stderr"
        return json.loads(answer)

    def add(self, network: int, slot: int, allowed: Allowed | None = None) -> Machine:
        given_out = slots.addresses(slot)
        plan = NetworkPlan(
            machine_id=ids.machine_id(),
            slot=slot,
            network=network,
            ip4=str(given_out.machine),
            gateway4=str(given_out.gateway),
            ip6=str(sixpn.machine_address(network, 1, slot + 1)),
            uid_base=1_000_000 + 65_536 * slot,
            allowed=allowed,
        )
        return Machine(self, plan)

    def police(self, allowed: Allowed, *machines: Machine) -> None:
        self.call("police", {machine.plan.machine_id: msgspec.to_builtins(allowed) for machine in machines})

    def serve(self, where: Namespace | Machine, address: str, port: int) -> None:
        """Something that answers with the caller's address."""
        command = [*PYTHON, ECHO, address, str(port)]
        listener = subprocess.Popen([*where_prefix(where), *command], stdout=subprocess.PIPE)
        self.listeners.append(listener)
        assert listener.stdout is not None
        assert listener.stdout.readline() == b"ready\n"

    def close(self) -> None:
        for listener in (*self.listeners, *self.others):
            listener.kill()
            listener.wait()
            for end in (listener.stdin, listener.stdout):
                if end is not None:
                    end.close()
        if self.caller.poll() is None:
            for machine_id in self.call("list"):
                self.call("remove", machine_id)
        self.caller.kill()
        self.caller.communicate()
        self.host.close()
        self.outside.close()
        remove(self.base)


PYTHON = [sys.executable, "-I", "-S", "-c"]
ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
print("ready", flush=True)
while True:
    connection, peer = server.accept()
    connection.sendall(peer[0].encode())
    connection.close()
"""
RECEIVE = """
import socket, sys
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
while True:
    print(server.recvfrom(100)[1][0], flush=True)
"""
SEND = """
import socket, sys
client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
client.bind((sys.argv[1], 0))
client.sendto(b"hello", (sys.argv[2], int(sys.argv[3])))
"""
CONNECT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])) as s:
        print(s.makefile().read())
except OSError as error:
    print("refused", error)
"""


class Machine:
    def __init__(self, host: Host, plan: NetworkPlan) -> None:
        self.host, self.plan = host, plan
        self.handle: dict[str, str] = host.call("ensure", msgspec.to_builtins(plan))

    def reach(self, address: str, port: int = 7000) -> str:
        """What was answered, or "refused …"."""
        command = [*where_prefix(self), *PYTHON, CONNECT, address, str(port), "3"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def where_prefix(where: Namespace | Machine) -> list[str]:
    if isinstance(where, Namespace):
        return ["nsenter", f"--net=/proc/{where.holder.pid}/ns/net", "--"]
    return ["nsenter", f"--net={where.handle['netns']}", "--"]
