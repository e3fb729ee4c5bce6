"""The fleet's processes, started in order and ended together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.fleet import plan
from pantala.host.bus import MAX_PAYLOAD
from pantala.kit import binaries
from pantala.testing.host_keys import HostKeys
from pantala.testing.ports import free_port
from pantala.wire.server import Bootstrapped

CROWD_READY_S = 300.0


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """`started_s`: from the start of the server's process until it listened. `pids` by process."""

    port: int
    token: str
    pids: dict[str, int]
    started_s: float
    folder: Path


@contextmanager
def running(folder: Path) -> Generator[Cluster]:
    bus_port, port = free_port(), free_port()
    seeds = {node: os.urandom(32).hex() for node, _ in plan.nodes()}
    setup = plan.Setup(folder=folder, bus=f"nats://127.0.0.1:{bus_port}", seeds=seeds)
    with ExitStack() as stack:

        def spawn(name: str, *command: str, pipe: bool = False) -> subprocess.Popen[bytes]:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            child = subprocess.Popen(command, stdout=subprocess.PIPE if pipe else log, stderr=log)
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        nats = spawn("bus", str(binaries.find("nats-server")), "-c", str(_bus_settings(folder, bus_port)))
        made = _bootstrap(folder, setup, port)
        setup = msgspec.structs.replace(setup, control_key=made.verify_key)
        agent = spawn(
            "agent", sys.executable, "-m", "pantala.agent", "--settings", str(_agent_settings(setup)), pipe=True
        )
        _ready(agent, "the agent")
        told = folder / "setup.json"
        told.write_bytes(msgspec.json.encode(setup, enc_hook=str))
        crowd = spawn("crowd", sys.executable, "-m", "benchmarks.fleet.crowd", str(told), pipe=True)
        _ready(crowd, "the crowd")
        begun = time.monotonic()
        server = spawn("server", sys.executable, "-m", "benchmarks.fleet.parts", str(folder / "server.json"))
        _listens(server, port, begun)
        pids = {"server": server.pid, "agent": agent.pid, "bus": nats.pid, "crowd": crowd.pid}
        yield Cluster(port=port, token=made.token, pids=pids, started_s=time.monotonic() - begun, folder=folder)


def _bus_settings(folder: Path, port: int) -> Path:
    path = folder / "nats.conf"
    path.write_text(f'listen: "127.0.0.1:{port}"\nmax_payload: {MAX_PAYLOAD}\n')
    return path


def _bootstrap(folder: Path, setup: plan.Setup, port: int) -> Bootstrapped:
    settings = {
        "listen": f"127.0.0.1:{port}",
        "state_dir": str(folder / "state"),
        "bus": {"url": setup.bus},
        "app_domain": "apps.pantala.test",
        "platform_domain": "pantala.test",
        "registry": {"name": plan.REGISTRY},
        "default_region": plan.REGIONS[0],
        "regions": [*plan.REGIONS, plan.REAL_REGION],
        "requests_per_s_max": 1000,
        "requests_burst": 10_000,
    }
    (folder / "server.json").write_bytes(msgspec.json.encode(settings))
    requests = []
    for number, (node, region) in enumerate(plan.nodes()):
        keys = HostKeys()
        request = keys.request(node=node, region=region, zone=node, address=f"10.9.{number // 250}.{number % 250 + 1}")
        requests.append(msgspec.structs.replace(request, verify_key=_verify_key(setup.seeds[node])))
    (folder / "hosts.json").write_bytes(msgspec.json.encode(requests))
    command = [sys.executable, "-m", "pantala.server.bootstrap", "--settings", str(folder / "server.json")]
    command += ["--email", "ada@example.com", "--org", "acme", "--hosts", str(folder / "hosts.json")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120)
    return msgspec.json.decode(done.stdout, type=Bootstrapped)


def _verify_key(seed: str) -> str:
    from pantala.kit.sealing import Signer

    return Signer(bytes.fromhex(seed)).verify_key


def _agent_settings(setup: plan.Setup) -> Path:
    state = setup.folder / "agent"
    state.mkdir()
    (state / "signing").write_bytes(bytes.fromhex(setup.seeds[plan.REAL_NODE]))
    settings = {
        "node": plan.REAL_NODE,
        "region": plan.REAL_REGION,
        "zone": plan.REAL_NODE,
        "state_dir": str(state / "state"),
        "run_dir": str(state / "run"),
        "bus": {"url": setup.bus},
        "trusted_keys": {"control": setup.control_key},
        "signing_key": str(state / "signing"),
        "driver": "benchmarks.fleet.parts:driver",
        "network": "benchmarks.fleet.parts:network",
        "images": "benchmarks.fleet.parts:images",
        "cpus": 1024,
        "memory_mib": 1 << 20,
        "machines_max": 2 * plan.LOCAL_APPS * plan.LOCAL_EACH,
    }
    path = state / "agent.json"
    path.write_bytes(msgspec.json.encode(settings))
    return path


def _ready(child: subprocess.Popen[bytes], what: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == b"ready":
            return
    raise AssertionError(f"{what} ended: see its log")


def _listens(server: subprocess.Popen[bytes], port: int, begun: float) -> None:
    import socket

    while time.monotonic() - begun < 60:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            raise AssertionError("the server ended: see its log")
        time.sleep(0.02)
    raise AssertionError("the server does not listen")
