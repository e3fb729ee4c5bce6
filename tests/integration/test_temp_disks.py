"""A `temp_dir` on disk with a size: it holds that and no more, and whoever fills it fills nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from containers_rig import MACHINE, ContainersRig

from pantala.testing.driver_harness import ContainerHarness, container_harness
from pantala.wire.machine import Container, ContainerMount, TempDir, Volume

pytestmark = [pytest.mark.anyio, pytest.mark.root]
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHarness]:
    with container_harness(tmp_path_factory.mktemp("d")) as made:
        yield made


@pytest.fixture
async def rig(harness: ContainerHarness) -> AsyncIterator[ContainersRig]:
    made = ContainersRig(harness)
    yield made
    await made.driver.destroy(MACHINE)
    assert harness.leftovers(MACHINE) == []


def on_disk(name: str, size_mb: int | None) -> Volume:
    return Volume(name=name, temp_dir=TempDir(storage_type="disk", size_mb=size_mb))


def container(name: str, *volumes: str) -> Container:
    return Container(
        name=name,
        image="a",
        cmd=["sh", "-c", "echo up; sleep 1000"],
        mounts=[ContainerMount(name=one, path=f"/{one}") for one in volumes],
    )


FILL = "dd if=/dev/zero of=/small/all bs=1M count=64; wc -c </small/all"


async def test_what_is_beyond_its_size_is_refused_and_nobody_else_notices(rig: ContainersRig) -> None:
    volumes = [on_disk("small", 16), on_disk("other", 8), on_disk("shared", None), on_disk("least", 1)]
    names = [volume.name for volume in volumes]
    await rig.start(container("one", *names), container("two", *names), volumes=volumes)
    await rig.until_said("one | up", "two | up")

    written = (await rig.run(f"{FILL} 2>/dev/null", "one")).split()[-1]
    assert 14 * MIB < int(written) <= 16 * MIB
    assert "No space left" in await rig.run("cp /small/all /small/again 2>&1 || true", "two")
    for name in ("one", "two"):
        await rig.run("for d in / /other /shared /least; do echo fine >$d/ok-$0 && cat $d/ok-$0 || exit 1; done", name)
    assert await rig.run("ls -a /small; stat -c %a /small", "one") == ".\n..\nagain\nall\n1777"


async def test_it_begins_empty_also_where_the_root_is_kept(rig: ContainersRig) -> None:
    for volumes in ([on_disk("small", 16)], [on_disk("small", None)]):
        for _ in range(2):
            await rig.start(container("one", "small"), volumes=volumes, root_kept="always")
            await rig.until_said("one | up")
            assert await rig.run("ls /small; echo kept >/small/file; sync", "one") == ""
            await rig.driver.clear(MACHINE)
