"""One machine with several containers, by the real driver and the real init."""

from __future__ import annotations

import base64
import shutil

import msgspec

from pantala.domain import containers
from pantala.domain.process import Identity
from pantala.domain.runtime import ImageConfig, RootKept, UnpackedImage
from pantala.drivers.protocol import Runtime
from pantala.testing.driver_harness import ContainerHarness
from pantala.testing.poll import until
from pantala.wire.guest import SSH, ContainerState, Exec, Executed
from pantala.wire.machine import Container, ImageRef, MachineConfig, Volume

WITHIN_S = 20.0
MACHINE = "m1"


class ContainersRig:
    """One machine with the containers that a test names; `b` is an image of its own, with a user of its own."""

    def __init__(self, harness: ContainerHarness) -> None:
        self.harness = harness
        self.driver = harness.driver()
        self.config = MachineConfig()
        other = harness.base / "other"
        if not other.exists():
            shutil.copytree(harness.image.layers[0], other, symlinks=True)
            (other / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nkeeper:x:1234:1234::/:/bin/sh\n")
            (other / "etc/group").write_text("root:x:0:\nkeeper:x:1234:\n")
            (other / "var").mkdir()
            (other / "var/cache").symlink_to("/kept")  # absolute: it leads elsewhere outside
            (other / "kept").mkdir()
            (other / "only-b").write_text("b\n")
        self.b = UnpackedImage(
            digest="sha256:b", layers=(other,), config=ImageConfig(user="keeper", cmd=("sleep", "1000"))
        )

    async def start(
        self,
        *made: Container,
        volumes: list[Volume] | None = None,
        image: str | None = None,
        ssh: SSH | None = None,
        root_kept: RootKept = "never",
    ) -> None:
        self.config = MachineConfig(image=image, containers=list(made), volumes=volumes)
        named = {one.image for one in made} | {one.image for one in volumes or [] if one.image}
        base = self.harness.image
        main = containers.main_image(self.config)
        whole = msgspec.structs.replace(
            self.b if main == "b" else base, others={name: self.b if name == "b" else base for name in named - {main}}
        )
        spec = msgspec.structs.replace(
            self.harness.spec(machine_id=MACHINE, root_kept=root_kept),
            image=whole,
            containers=containers.roots(self.config, whole),
            volumes=containers.volumes(self.config, whole, 64),
        )
        identity = Identity(
            app="app",
            machine_id=MACHINE,
            instance_id="01",
            region="iad",
            image=ImageRef(registry="r", repository="a"),
            private_ip="fdaa::2",
            memory_mb=64,
        )
        secrets = {"TOKEN": "s3cret", "FILE": base64.b64encode(b"of a secret").decode()}
        await self.driver.prepare(spec)
        message = containers.start_message(whole, self.config, identity, secrets)
        await self.driver.start(MACHINE, msgspec.structs.replace(message, ssh=ssh))

    async def lines(self) -> list[str]:
        return [record.text for record in await self.driver.logs(MACHINE, 0)]

    async def until_said(self, *wanted: str) -> list[str]:
        return await until(self.lines, lambda said: set(wanted) <= set(said), within_s=WITHIN_S)

    async def state(self, name: str) -> ContainerState:
        return next(one for one in await self.driver.containers(MACHINE) if one.name == name)

    async def until_state(self, name: str, **wanted: object) -> ContainerState:
        return await until(
            lambda: self.state(name),
            lambda state: all(getattr(state, key) == value for key, value in wanted.items()),
            within_s=WITHIN_S,
        )

    async def run(self, script: str, container: str = "") -> str:
        done = await self.exec(script, container)
        assert done.exit_code == 0, base64.b64decode(done.stderr_base64)
        return base64.b64decode(done.stdout_base64).decode().strip()

    async def exec(self, script: str, container: str) -> Executed:
        return await self.driver.exec(MACHINE, Exec(argv=["sh", "-c", script], container=container))

    async def stop(self, grace_s: float = 20.0) -> Runtime:
        await self.driver.stop(MACHINE, signal=2, grace_s=grace_s)
        return await self.driver.wait(MACHINE)
