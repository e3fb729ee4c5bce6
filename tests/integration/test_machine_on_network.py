"""A machine whole: container driver and host network together, reached over IPv4 and 6PN by a client on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pantala.kit import binaries
from pantala.testing.rootfs import busybox_image
from pantala.testing.scratch import remove, scratch

pytestmark = [pytest.mark.root]

# Runs inside a network namespace of its own, as an agent of a box does.
STORY = """
import anyio, json, subprocess, sys
from pathlib import Path
from pantala.domain.runtime import ImageConfig, Limits, NetworkPlan, UnpackedImage
from pantala.drivers.container import ContainerDriver
from pantala.drivers.container.cgroups import Cgroups
from pantala.drivers.protocol import PrepareSpec
from pantala.kit import ids
from pantala.kit.clock import SystemClock
from pantala.net import HostNetwork, sixpn, slots
from pantala.testing.poll import until
from pantala.wire.guest import STATICS_PORT, Start, StaticPath, Statics

base, init, root = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

async def get(url):
    done = await anyio.run_process(["curl", "-gsS", "-m", "2", url], check=False)
    return done.stdout.decode()

async def main():
    driver = ContainerDriver(state_dir=base / "state", run_dir=base / "run", cgroup_root=root, init=init)
    network = HostNetwork(run_dir=base / "net", init=init)
    await network.setup()
    machine_id = ids.machine_id()
    plan = NetworkPlan(machine_id=machine_id, slot=0, network=7, ip4=str(slots.addresses(0).machine),
        gateway4=str(slots.addresses(0).gateway), ip6=str(sixpn.machine_address(7, 1, 1)), uid_base=1_000_000)
    image = UnpackedImage(digest="", layers=(base / "layer",), config=ImageConfig())
    answers = {}
    try:
        handle = await network.ensure(plan)
        await driver.prepare(PrepareSpec(machine_id=machine_id, instance_id="01", image=image, network=handle,
            limits=Limits(cpus=1, shared_cpu=True, memory_mib=64, disk_mib=64), uid_base=plan.uid_base,
            hostname=machine_id, hosts="127.0.0.1 localhost\\n", resolv_conf="nameserver fdaa::3\\n"))
        assert await network.listening(machine_id) == []
        statics = Statics(listen=f"0.0.0.0:{STATICS_PORT}", paths=[StaticPath(url_prefix="/s", guest_path="/www")])
        app = Start(argv=["httpd", "-f", "-p", "80", "-h", "/www"], env={"PATH": "/bin"}, user="app", statics=statics)
        await driver.start(machine_id, app)
        both = [80, STATICS_PORT]
        ports = lambda seen: sorted(s.port for s in seen)
        await until(lambda: network.listening(machine_id), lambda seen: ports(seen) == both, within_s=20)
        answers["static"] = await get(f"http://{plan.ip4}:{STATICS_PORT}/s/index.html")
        answers["not from 6PN"] = await get(f"http://[{plan.ip6}]:{STATICS_PORT}/s/index.html")
        answers["ip4"] = await get(f"http://{plan.ip4}/")
        answers["ip6"] = await get(f"http://[{plan.ip6}]/")
        await driver.stop(machine_id, signal=15, grace_s=5)
        answers["exit"] = (await driver.wait(machine_id)).exit.signal
    finally:
        await driver.destroy(machine_id)
        await network.teardown()
        Cgroups(root=root, clock=SystemClock()).remove_root()
    answers["left"] = [await driver.list(), await network.list()]
    print(json.dumps(answers))
anyio.run(main)
"""


def test_a_machine_serves_on_a_low_port_as_a_user_without_rights() -> None:
    base = scratch("machine")
    try:
        busybox_image(base / "layer")
        command = [sys.executable, "-c", STORY, str(base), str(binaries.find("pantala-init")), f"pantala/{base.name}"]
        done = subprocess.run(
            ["unshare", "--net", "--", *command], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (
            '{"static": "hello from a machine\\n", "not from 6PN": "", "ip4": "hello from a machine\\n", '
            '"ip6": "hello from a machine\\n", "exit": 15, "left": [[], []]}'
        )
        assert str(base) not in Path("/proc/self/mountinfo").read_text()
    finally:
        remove(base)
