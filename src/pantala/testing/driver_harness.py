"""What the driver suite needs of each driver: a door to it, a second door as after a killed agent, and its apps."""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio

from pantala.domain.runtime import ImageConfig, Limits, NetworkHandle, RootKept, UnpackedImage
from pantala.drivers.container import ContainerDriver
from pantala.drivers.container.cgroups import Cgroups
from pantala.drivers.container.loops import loop_files
from pantala.drivers.fake import FakeApp, FakeDriver, FakeWorld
from pantala.drivers.protocol import Driver, PrepareSpec
from pantala.kit import binaries, ids
from pantala.kit.clock import SystemClock
from pantala.testing.rootfs import busybox_image
from pantala.wire.guest import Start

UID_BASE = 1_000_000
TERM, KILL, USR1 = 15, 9, 10


def shell(script: str) -> Start:
    return Start(argv=["sh", "-c", script], env={"PATH": "/bin"})


RUNS = Start(argv=["sleep", "1000"], env={"PATH": "/bin"})
EXITS_3 = shell("exit 3")
KILLS_ITSELF = shell("kill -9 $$")
PRINTS = shell("echo one; echo two; echo three; echo oops >&2; sleep 1000")
PRINTS_AND_FAILS = shell("echo one; echo oops >&2; exit 3")
STUBBORN = shell("trap '' TERM; echo ready; while :; do sleep 0.02; done")
GRACEFUL = shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done")
COUNTS = shell("i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
REMEMBERS = shell("echo was here >>/mark; cat /mark; sleep 1000")
MISSING = Start(argv=["/no/such/program"], env={})
EATS_MEMORY = Start(argv=["tail", "/dev/zero"], env={"PATH": "/bin"})

SCRIPTS = {
    tuple(EXITS_3.argv): FakeApp(exit_code=3, ends_after_s=0.0),
    tuple(KILLS_ITSELF.argv): FakeApp(ends_by_signal=KILL, ends_after_s=0.0),
    tuple(PRINTS.argv): FakeApp(output=("one", "two", "three"), errors=("oops",)),
    tuple(PRINTS_AND_FAILS.argv): FakeApp(output=("one",), errors=("oops",), exit_code=3, ends_after_s=0.0),
    tuple(STUBBORN.argv): FakeApp(ignored=(TERM,), output=("ready",)),
    tuple(GRACEFUL.argv): FakeApp(stop_exit_code=7, output=("ready",)),
    tuple(REMEMBERS.argv): FakeApp(writes="was here", tells_written=True),
    tuple(MISSING.argv): FakeApp(refusal="the command /no/such/program was not found", exit_code=127),
    tuple(EATS_MEMORY.argv): FakeApp(oom=True, ends_after_s=0.0),
}


class FakeHarness:
    def __init__(self) -> None:
        self.world = FakeWorld()
        self.world.apps = dict(SCRIPTS)

    def driver(self) -> Driver:
        """Every call is another agent over the same world."""
        return FakeDriver(self.world)

    def spec(
        self,
        *,
        machine_id: str | None = None,
        instance_id: str = "01",
        memory_mib: int = 64,
        root_kept: RootKept = "never",
    ) -> PrepareSpec:
        return PrepareSpec(
            machine_id=machine_id or ids.machine_id(),
            instance_id=instance_id,
            image=UnpackedImage(digest="sha256:fake", layers=(Path("/fake"),), config=ImageConfig()),
            network=NetworkHandle(netns=Path("/fake"), ip4="172.19.0.2", ip6="fdaa::2"),
            limits=Limits(cpus=1, shared_cpu=True, memory_mib=memory_mib, disk_mib=64),
            uid_base=UID_BASE,
            hostname="fake",
            hosts="",
            resolv_conf="",
            root_kept=root_kept,
        )

    async def stop_and_die(self, machine_id: str, *, grace_s: float) -> None:
        """A caller asks for a stop and is killed."""
        await self.driver().stop(machine_id, signal=TERM, grace_s=grace_s)

    async def suspend_and_die(self, machine_id: str) -> None:
        await self.driver().suspend(machine_id)

    def leftovers(self, machine_id: str) -> list[str]:
        return [machine_id] if machine_id in self.world.machines.keys() | self.world.roots.keys() else []

    async def break_prepare(self, spec: PrepareSpec, at: str = "attempt") -> None:
        """A caller is killed half way through `prepare`; there is one such place here."""

        def crash(step: str, _: str) -> None:
            if step == "preparing":
                raise RuntimeError("killed")

        self.world.on_step = crash
        with suppress(RuntimeError):
            await self.driver().prepare(spec)
        self.world.on_step = lambda step, machine_id: None


class ContainerHarness:
    def __init__(self, base: Path, netns: Path, runtime: Path | None = None) -> None:
        self.base = base
        self.netns = netns
        self.init = binaries.find("pantala-init")
        self.cgroup_root = f"pantala/test-{secrets.token_hex(4)}"
        self.runtime = runtime
        self.image = busybox_image(base / "layer")

    def driver(self) -> ContainerDriver:
        return ContainerDriver(
            state_dir=self.base / "state",
            run_dir=self.base / "run",
            cgroup_root=self.cgroup_root,
            init=self.init,
            runtime=self.runtime,
        )

    def spec(
        self,
        *,
        machine_id: str | None = None,
        instance_id: str = "01",
        memory_mib: int = 64,
        root_kept: RootKept = "never",
    ) -> PrepareSpec:
        machine_id = machine_id or ids.machine_id()
        return PrepareSpec(
            machine_id=machine_id,
            instance_id=instance_id,
            image=self.image,
            network=NetworkHandle(netns=self.netns, ip4="172.19.0.2", ip6="fdaa::2"),
            limits=Limits(cpus=1, shared_cpu=True, memory_mib=memory_mib, pids=64, disk_mib=64),
            uid_base=UID_BASE,
            hostname=machine_id,
            hosts=f"127.0.0.1 localhost\n172.19.0.2 {machine_id}\n",
            resolv_conf="nameserver fdaa::3\n",
            root_kept=root_kept,
        )

    async def stop_and_die(self, machine_id: str, *, grace_s: float) -> None:
        await self._in_caller(f"await driver.stop({machine_id!r}, signal={TERM}, grace_s={grace_s})")

    async def suspend_and_die(self, machine_id: str) -> None:
        await self._in_caller(f"await driver.suspend({machine_id!r})")

    async def break_prepare(self, spec: PrepareSpec, at: str = "attempt") -> None:
        """`at`: the file of the machine's run folder whose appearance is the moment."""
        text = pickle.dumps(spec)
        await self._in_caller(
            "async with anyio.create_task_group() as group:\n"
            f"        group.start_soon(driver.prepare, pickle.loads({text!r}))\n"
            f"        while not driver._folder({spec.machine_id!r}).run.joinpath({at!r}).exists():\n"
            "            await anyio.sleep(0)\n"
            "        os.kill(os.getpid(), 9)\n"
        )

    async def _in_caller(self, body: str) -> None:
        """A process of its own runs `body` with a driver and is killed after it."""
        text = f"""
import anyio, os, pickle
from pathlib import Path
from pantala.drivers.container import ContainerDriver
async def main():
    driver = ContainerDriver(state_dir=Path({str(self.base / "state")!r}), run_dir=Path({str(self.base / "run")!r}),
        cgroup_root={self.cgroup_root!r}, init=Path({str(self.init)!r}))
    {body}
    os.kill(os.getpid(), 9)
anyio.run(main)
"""
        done = await anyio.run_process([sys.executable, "-c", text], check=False)
        assert done.returncode == -KILL, done.stderr.decode()

    def leftovers(self, machine_id: str) -> list[str]:
        """Everything on this host that still carries the machine's id."""
        cgroups = Cgroups(root=self.cgroup_root, clock=SystemClock())
        found = [f"process {pid}" for pid in cgroups.pids(machine_id)]
        found += [f"cgroup {name}" for name in cgroups.list() if name == machine_id]
        found += [str(path) for path in self.base.glob(f"*/machines/{machine_id}")]
        found += [path for path in loop_files() if machine_id in path]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [line for line in mounts if str(self.base) in line]
        return found


@contextmanager
def fake_harness() -> Generator[FakeHarness]:
    yield FakeHarness()


@contextmanager
def container_harness(base: Path, runtime: Path | None = None) -> Generator[ContainerHarness]:
    """With a network namespace that has only loopback; removes every machine at the end, whatever the test did."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    netns = Path(f"/proc/{holder.pid}/ns/net")
    harness = None
    try:
        own = Path("/proc/self/ns/net").readlink()
        while netns.readlink() == own:
            os.sched_yield()
        harness = ContainerHarness(base, netns, runtime)
        yield harness
    finally:
        if harness is not None:
            anyio.run(_destroy_all, harness.driver())
            Cgroups(root=harness.cgroup_root, clock=SystemClock()).remove_root()
        holder.kill()
        holder.wait()
        shutil.rmtree(base, ignore_errors=True)


async def _destroy_all(driver: ContainerDriver) -> None:
    for machine_id in await driver.list():
        await driver.destroy(machine_id)
