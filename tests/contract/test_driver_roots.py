"""What a machine wrote to its root, and when it is there again: the same of every driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from pantala.domain.runtime import ContainerRoot, RootKept, UnpackedImage
from pantala.drivers.protocol import Driver, PrepareSpec
from pantala.testing import driver_harness as h
from pantala.testing.driver_harness import ContainerHarness, FakeHarness
from pantala.testing.poll import until
from pantala.wire.guest import GuestContainer, Start

pytestmark = pytest.mark.anyio

Harness = FakeHarness | ContainerHarness
WITHIN_S = 20.0
MIB = 1024 * 1024


@pytest.fixture(params=["fake", pytest.param("container", marks=pytest.mark.root)])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    making = h.fake_harness() if request.param == "fake" else h.container_harness(tmp_path / "host")
    with making as made:
        yield made


@pytest.fixture
def real(tmp_path: Path) -> Iterator[ContainerHarness]:
    with h.container_harness(tmp_path / "host") as made:
        yield made


async def run(driver: Driver, spec: PrepareSpec, app: Start = h.REMEMBERS, *, lines: int = 1) -> list[str]:
    """What it says."""
    await driver.prepare(spec)
    await driver.start(spec.machine_id, app)
    seen = await until(lambda: driver.logs(spec.machine_id, 0), lambda said: len(said) >= lines, within_s=WITHIN_S)
    return [record.text for record in seen]


@pytest.mark.parametrize(
    ("kept", "same_version", "other_version"),
    [("never", 1, 1), ("restart", 2, 1), ("always", 2, 2)],
)
async def test_a_root_is_kept_for_whom_it_was_promised(
    harness: Harness, kept: RootKept, same_version: int, other_version: int
) -> None:
    for instance_id, runs in (("01", same_version), ("02", other_version)):
        driver, spec = harness.driver(), harness.spec(root_kept=kept)
        assert await run(driver, spec) == ["was here"]
        await driver.clear(spec.machine_id)
        again = replace(spec, instance_id=instance_id)
        assert await run(harness.driver(), again, lines=runs) == ["was here"] * runs


@pytest.mark.parametrize("kept", ["restart", "always"])
async def test_a_kept_root_belongs_to_its_machine_until_that_is_destroyed(harness: Harness, kept: RootKept) -> None:
    driver, spec = harness.driver(), harness.spec(root_kept=kept)
    await run(driver, spec)
    await driver.clear(spec.machine_id)
    assert await driver.inspect(spec.machine_id) is None
    assert await driver.list() == [spec.machine_id]
    assert await driver.logs(spec.machine_id, 0) == []
    await driver.clear(spec.machine_id)
    assert await driver.list() == [spec.machine_id]

    await driver.destroy(spec.machine_id)

    assert harness.leftovers(spec.machine_id) == []
    assert await run(driver, spec) == ["was here"]


async def test_nothing_stays_of_a_root_that_is_not_kept(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec()
    await run(driver, spec)
    await driver.clear(spec.machine_id)
    assert harness.leftovers(spec.machine_id) == []


async def test_a_root_that_is_not_wanted_any_more_is_gone(harness: Harness) -> None:
    driver, spec = harness.driver(), harness.spec(root_kept="always")
    await run(driver, spec)
    await driver.clear(spec.machine_id)
    assert await run(driver, replace(spec, instance_id="02", root_kept="never")) == ["was here"]
    await driver.clear(spec.machine_id)
    assert await run(driver, replace(spec, instance_id="03")) == ["was here"]


@pytest.mark.parametrize("moment", ["attempt", "init.sock", "console"])
async def test_a_killed_caller_costs_no_root(harness: Harness, moment: str) -> None:
    driver, spec = harness.driver(), harness.spec(root_kept="always")
    await run(driver, spec)
    await driver.clear(spec.machine_id)
    later = replace(spec, instance_id="02")
    await harness.break_prepare(later, moment)
    assert await run(harness.driver(), later, lines=2) == ["was here"] * 2
    await driver.clear(spec.machine_id)
    await harness.break_prepare(later, moment)
    await driver.destroy(spec.machine_id)
    assert harness.leftovers(spec.machine_id) == []


@pytest.mark.root
async def test_what_the_machine_changed_wins_over_a_new_image(real: ContainerHarness, tmp_path: Path) -> None:
    def image(text: str) -> UnpackedImage:
        layer = tmp_path / text
        (layer / "data").mkdir(parents=True)
        for name in ("changed", "deleted", "untouched"):
            (layer / "data" / name).write_text(f"{name} {text}\n")
        (layer / "data" / text).touch()
        return replace(real.image, layers=(*real.image.layers, layer))

    driver, spec = real.driver(), real.spec(root_kept="always")
    spec = replace(spec, image=image("one"))
    await run(driver, spec, h.shell("echo mine >/data/changed; rm /data/deleted; chmod 711 /; chown 33 /; echo done"))
    await driver.clear(spec.machine_id)
    asks = h.shell("cd /data; ls; cat changed untouched; stat -c '%a %u' /")
    said = await run(driver, replace(spec, instance_id="02", image=image("two")), asks, lines=6)
    assert said == ["changed", "two", "untouched", "mine", "untouched two", "711 33"]


FILLS = "dd if=/dev/zero of=/{name} bs=1M count=1000 2>/dev/null; wc -c </{name}; echo {name} done"


@pytest.mark.root
async def test_a_kept_root_is_of_limited_size_and_may_grow(real: ContainerHarness) -> None:
    driver, spec = real.driver(), real.spec(root_kept="always")
    first = await run(driver, spec, h.shell(FILLS.format(name="a")), lines=2)
    assert 0 < int(first[0]) < 64 * MIB
    await driver.clear(spec.machine_id)

    larger = replace(spec, instance_id="02", limits=replace(spec.limits, disk_mib=256))
    script = "wc -c </a; " + FILLS.format(name="b")
    said = await run(driver, larger, h.shell(script), lines=3)
    assert said[0] == first[0]
    assert 128 * MIB < int(first[0]) + int(said[1]) < 256 * MIB


@pytest.mark.root
async def test_containers_keep_their_files_but_not_those_of_one_that_is_gone(real: ContainerHarness) -> None:
    driver, spec = real.driver(), real.spec(root_kept="always")

    async def runs_so_far(instance_id: str, *names: str) -> dict[str, int]:
        roots = tuple(ContainerRoot(name=name, layers=real.image.layers) for name in names)
        await driver.prepare(replace(spec, instance_id=instance_id, containers=roots))
        script = "echo $0 was here >>/mark; cat /mark; echo said; sleep 1000"
        crew = [
            GuestContainer(
                name=name,
                root=f"/.pantala/containers/{name}",
                argv=["sh", "-c", script, name],
                env={"PATH": "/bin"},
            )
            for name in names
        ]
        await driver.start(spec.machine_id, Start(argv=[], env={"PATH": "/bin"}, containers=crew))
        seen = await until(
            lambda: driver.logs(spec.machine_id, 0),
            lambda said: sum(record.text.endswith("said") for record in said) == len(names),
            within_s=WITHIN_S,
        )
        await driver.clear(spec.machine_id)
        return {name: sum(f"{name} was here" in record.text for record in seen) for name in names}

    assert await runs_so_far("01", "a", "b") == {"a": 1, "b": 1}
    assert await runs_so_far("02", "a") == {"a": 2}
    assert await runs_so_far("03", "a", "b") == {"a": 3, "b": 1}
