"""The escape suite of a host: its agent runs it by itself, keeps what became of it, and says when that is out of date;
and in a container that is worth nothing the same attempts get through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pantala.kit import binaries
from pantala.testing.scratch import remove, scratch

pytestmark = [pytest.mark.root]

# Runs inside a network namespace of its own, as an agent of a box does.
STORY = """
import anyio, json, sys
from pathlib import Path
import msgspec
from pantala.agent import escape
from pantala.agent.run import run
from pantala.agent.settings import AgentSettings
from pantala.agent.sweep import strangers
from pantala.drivers.container.cgroups import Cgroups
from pantala.errors import Conflict
from pantala.kit.clock import SystemClock
from pantala.testing.poll import until
from pantala.wire.server import BusSettings

base, port = Path(sys.argv[1]), int(sys.argv[2])
settings = AgentSettings(node="iad-1", region="iad", state_dir=base / "state", run_dir=base / "run",
    bus=BusSettings(url=f"nats://127.0.0.1:{port}"), address="10.77.0.1", images="pantala.testing.parts:images",
    cgroup_root=f"pantala/{base.name}", escape_suite_after_s=0.001)
kept = settings.state_dir / "escape-suite.json"

async def there():
    return kept.exists()

async def main():
    listener = await anyio.create_tcp_listener(local_host="0.0.0.0", local_port=port)
    told = {}
    async with anyio.create_task_group() as tasks:
        host = await tasks.start(run, settings)
        await until(there, lambda seen: seen, within_s=60)
        told["left"] = [await host.context.driver.list(), await host.context.network.list(), await strangers(settings)]
        def suites():
            return escape.EscapeSuites(host, state_dir=settings.state_dir, pool4=settings.pool4)
        told["first"] = msgspec.to_builtins(suites().report())
        document = json.loads(kept.read_bytes())
        document["isolation"] |= {"seccomp": "sha256:another", "capabilities": ["CAP_CHOWN"]}
        kept.write_text(json.dumps(document))
        told["outdated"] = suites().report().suite.outdated
        again = suites()
        async with anyio.create_task_group() as both:
            both.start_soon(again.run)
            await anyio.wait_all_tasks_blocked()
            try:
                await again.run()
            except Conflict as error:
                told["twice"] = str(error)
        told["again"] = again.report().suite.outdated
        kept.write_text("{")
        told["unreadable"] = msgspec.to_builtins(suites().report())
        await host.context.network.teardown()
        tasks.cancel_scope.cancel()
    Cgroups(root=settings.cgroup_root, clock=SystemClock()).remove_root()
    await listener.aclose()
    print(json.dumps(told))
anyio.run(main)
"""
HOST = "ip link set lo up; ip link add d0 type veth peer name d1; ip addr add 10.77.0.1/24 dev d0; ip link set d0 up"
PORT = "4222"


def test_a_host_tries_its_own_machines_and_keeps_what_became_of_it() -> None:
    base = scratch("escape")
    try:
        words = [sys.executable, "-c", STORY, str(base), PORT]
        done = subprocess.run(
            ["unshare", "--net", "--", "sh", "-c", f'{HOST}; exec "$@"', "sh", *words],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.strip().splitlines()[-1])
    finally:
        remove(base)
    assert told["left"] == [[], [], []]
    report, suite = told["first"], told["first"]["suite"]
    assert (report["host"], suite["through"], suite["unclear"], suite["outdated"]) == ("iad-1", [], [], [])
    outcomes = {one["name"]: one for one in report["attempts"]}
    assert suite["attempts"] == len(outcomes) == suite["held"] + suite["not_applicable"]
    for name, how in {
        "mount-proc": "mount: EPERM",
        "unshare-user": "unshare: EPERM",
        "io-uring-setup": "io_uring_setup: ENOSYS",
        "overwrite-init": "chmod: EROFS",
        "packet-socket": "socket: EPERM",
        "add-route": "netlink: EPERM",
        "write-memory-of-host": "process_vm_writev: ESRCH",
        "tcp-of-host": "EHOSTUNREACH",
        "tcp-of-host-loopback": "ECONNREFUSED",
        "unix-sockets-of-host": "agent.sock: ENOENT",
        "files-of-platform": "journal.db: ENOENT",
        "write-image-layer": "the image's layer is as it was",
    }.items():
        assert outcomes[name]["outcome"] == "held", outcomes[name]
        assert how in outcomes[name]["detail"]
    assert outcomes["tcp-of-neighbours"]["outcome"] == "not_applicable"
    assert told["outdated"] == ["seccomp filter", "capabilities"]
    assert "already" in told["twice"]
    assert told["again"] == []
    assert told["unreadable"] == {"host": "iad-1", "suite": None, "attempts": []}


def test_in_a_container_that_is_worth_nothing_the_attempts_get_through(tmp_path: Path) -> None:
    """A user namespace with all its rights, no filter, the host's files: the suite is not blind."""
    (tmp_path / "canary").write_text("secret")
    root = tmp_path / "root"
    for folder in ("proc", "sys", "tmp", "etc", "dev"):
        (root / folder).mkdir(parents=True)
    (root / "canary").write_text("secret")
    (root / "etc/hosts").write_text("")
    program = root / "init"
    shutil.copy(binaries.find("pantala-init"), program)
    aims = {"canary": "/canary", "secret": "secret", "survey": {"missing": {"mount-tmpfs": "so it is said"}}}
    container = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", f"--root={root}"]
    done = subprocess.run(
        [*container, "/init", "escape", json.dumps(aims)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    through = {one["name"] for line in done.stdout.splitlines() if (one := json.loads(line))["outcome"] == "through"}
    assert {"file-of-host", "io-uring-setup", "file-capabilities", "unshare-mount"} <= through
    assert "mount-tmpfs" in through, "what gets through is told, whatever the host is said to lack"
    assert not {"raw-socket", "clock-settime"} & through, "these the kernel refuses to anybody but the host"
