"""Images of every kind, by way of a real registry, our client, the store and the container driver: each starts, or says
why not, and none leaves anything behind or touches what is beside the store."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import image_cases_registry
import msgspec
import pytest
from image_cases import ATTRIBUTES, BASE, CASES, NOTE, Case

from pantala.domain import process
from pantala.domain.runtime import ImageLimits, UnpackedImage
from pantala.errors import InvalidRequest, NotFound, PantalaError
from pantala.images.reference import parse
from pantala.images.registry import RegistryClient
from pantala.images.store import FileImageStore
from pantala.testing import images as i
from pantala.testing.driver_harness import ContainerHarness, container_harness
from pantala.testing.images import Made, Shelf, shelf
from pantala.testing.registry import NAME, registry_process
from pantala.wire.machine import ImageRef, MachineConfig

pytestmark = [pytest.mark.anyio, pytest.mark.root]

SHELF = "shelf.test"
LIMITS = ImageLimits(
    manifest_bytes=256 * 1024,
    config_bytes=64 * 1024,
    layer_bytes=64 * 1024**2,
    layer_entries=1_000,
    image_bytes=150_000_000,
    ratio_from_bytes=8 * 1024**2,
)
WITHIN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Rig:
    folder: Path
    harness: ContainerHarness
    registry: str
    shelf: Shelf

    @property
    def store_root(self) -> Path:
        return self.folder / "store"

    @asynccontextmanager
    async def store(self, limits: ImageLimits = LIMITS) -> AsyncGenerator[tuple[FileImageStore, RegistryClient]]:
        client = RegistryClient(endpoints={NAME: self.registry, SHELF: self.shelf.url}, limits=limits)
        try:
            yield FileImageStore(self.store_root, client, limits=limits), client
        finally:
            await client.aclose()

    def state(self) -> dict[str, set[str]]:
        """What the store holds, and what is beside it."""
        held = {
            name: {path.name for path in (self.store_root / name).iterdir()}
            for name in ("layers", "images", "facts", "marks", "tmp")
        }
        return held | {"beside": {path.name for path in self.folder.iterdir()}}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("corpus")
    work = tmp_path_factory.mktemp("corpus-rig")
    (folder / "canary").write_text("untouched")
    with registry_process(work / "registry") as url, shelf() as made, container_harness(work / "host") as harness:
        FileImageStore(folder / "store", RegistryClient(limits=LIMITS), limits=LIMITS)
        yield Rig(folder=folder, harness=harness, registry=url, shelf=made)
    assert (folder / "canary").read_text() == "untouched"
    assert (folder / "canary").stat().st_nlink == 1


async def offered(rig: Rig, client: RegistryClient, made: Made, *, lies: bool, tag: str) -> ImageRef:
    """The image at a registry: a real one, or one that takes anything."""
    if lies:
        rig.shelf.put(tag, made)
        return parse(f"{SHELF}/app:{tag}")
    files: dict[str, Path] = {}
    for digest, blob in made.blobs.items():
        files[digest] = rig.harness.base / f"blob-{digest[-16:]}"
        files[digest].write_bytes(blob)
    repository = parse(f"{NAME}/app:{tag}")
    try:
        for digest, (media_type, manifest) in made.manifests.items():
            at = msgspec.structs.replace(repository, tag=digest)
            await client.push(at, blobs=files, manifest=manifest, media_type=media_type)
        await client.push(repository, blobs=files, manifest=made.manifest, media_type=made.media_type)
    finally:
        for file in files.values():
            file.unlink()
    return repository


async def run(rig: Rig, image: UnpackedImage, reference: ImageRef) -> tuple[int, list[str]]:
    """A machine of the image to its end: exit code and output. Raises what a start raises."""
    driver = rig.harness.driver()
    spec = msgspec.structs.replace(rig.harness.spec(), image=image)
    identity = process.Identity(
        app="app",
        machine_id=spec.machine_id,
        instance_id="01",
        region="iad",
        image=reference,
        private_ip="fdaa::2",
        memory_mb=64,
    )
    start = process.start_message(image.config, MachineConfig(), identity, {})
    try:
        with anyio.fail_after(WITHIN_S):
            await driver.prepare(spec)
            await driver.start(spec.machine_id, start)
            ended = await driver.wait(spec.machine_id)
        assert ended.exit is not None
        return ended.exit.exit_code, [record.text for record in await driver.logs(spec.machine_id, 0)]
    finally:
        await driver.destroy(spec.machine_id)
        assert rig.harness.leftovers(spec.machine_id) == []


def test_the_corpus_is_what_it_claims() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(bool(case.says) + bool(case.fails) + bool(case.refused) == 1 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
async def test_it_starts_or_says_why_not(rig: Rig, case: Case) -> None:
    tag = f"t{CASES.index(case)}"
    before = rig.state()
    async with rig.store() as (store, client):
        reference = await offered(rig, client, case.make(), lies=case.lies, tag=tag)
        if case.refused:
            with pytest.raises((InvalidRequest, NotFound)) as refusal:
                await store.ensure(reference, pull_token="")
            assert re.search(case.refused, str(refusal.value)), str(refusal.value)
            assert f"app:{tag}" in str(refusal.value)
            after = rig.state()
            assert [name for name, held in after.items() if not held <= before[name]] == []
            return
        image = await store.ensure(reference, pull_token="")
        assert rig.state()["tmp"] == set()
        assert await store.find(image.digest) == image
        if case.fails:
            with pytest.raises(PantalaError) as failure:
                await run(rig, image, reference)
            assert re.search(case.fails, str(failure.value)), str(failure.value)
            assert isinstance(failure.value, InvalidRequest) or getattr(failure.value, "guest_fault", False)
            return
        assert await run(rig, image, reference) == (case.code, list(case.says))


async def test_attributes_reach_the_disk(rig: Rig) -> None:
    async with rig.store() as (store, client):
        made = i.image(BASE, i.tar(i.program("tool", "x", pax_headers=ATTRIBUTES)), run={"Cmd": ["/tool"]})
        image = await store.ensure(await offered(rig, client, made, lies=False, tag="attributes"), pull_token="")
    tool = image.layers[-1] / "tool"
    assert sorted(os.listxattr(tool)) == ["security.capability", "user.note"]
    assert os.getxattr(tool, "user.note") == b"kept"


async def test_a_manifest_of_another_digest_is_refused_and_the_right_one_taken(rig: Rig) -> None:
    good, other = i.image(BASE, NOTE, run={"Cmd": ["cat", "/note"]}), i.image(BASE, run={"Cmd": ["true"]})
    async with rig.store() as (store, _):
        rig.shelf.put(good.digest, other)
        reference = parse(f"{SHELF}/app@{good.digest}")
        with pytest.raises(InvalidRequest, match=f"{good.digest} the registry sent another manifest, {other.digest}"):
            await store.ensure(reference, pull_token="")
        rig.shelf.put(good.digest, good)
        image = await store.ensure(reference, pull_token="")
        assert await run(rig, image, reference) == (0, ["here"])


async def test_a_bomb_ends_within_the_limits_that_hosts_have(rig: Rig) -> None:
    """Sixteen gigabytes in sixteen megabytes: refused by ratio long before they were read."""
    async with rig.store(ImageLimits()) as (store, client):
        made = i.image(image_cases_registry.of_zeros(1000), run={"Cmd": ["/x"]})
        reference = await offered(rig, client, made, lies=True, tag="bomb")
        with anyio.fail_after(WITHIN_S):
            with pytest.raises(InvalidRequest, match="unpacks to more than 200 times its size"):
                await store.ensure(reference, pull_token="")


async def test_a_tree_deeper_than_python_goes_is_removed(rig: Rig) -> None:
    """It unpacks; a store that opens after a crash removes what is left of it, however deep."""
    entries: list[i.Entry] = []
    for step in range(5):
        entries += [i.text(f"l{step}/" + "d/" * 240 + "f", ""), i.link(f"l{step + 1}", f"l{step}/" + "d/" * 240)]
    async with rig.store(ImageLimits()) as (store, client):
        made = i.image(BASE, i.tar(*entries), run={"Cmd": ["cat", "/l4/" + "d/" * 240 + "f"]})
        reference = await offered(rig, client, made, lies=False, tag="deep")
        image = await store.ensure(reference, pull_token="")
        assert await run(rig, image, reference) == (0, [])
        layer = image.layers[-1]
        layer.rename(rig.store_root / "tmp" / "left.tree")
        again = FileImageStore(rig.store_root, client, limits=LIMITS)
        assert rig.state()["tmp"] == set()
        assert await again.find(image.digest) is None


async def test_the_same_blob_over_other_layers_fits_each(rig: Rig) -> None:
    """Three images share a layer that leaves out its directory: each sees it as its own lower layers have it."""
    late = i.tar(i.text("x/late", "late\n"))
    lower = {
        "plain": i.tar(i.text("early", "")),
        "folder": i.tar(i.folder("x", mode=0o770, uid=7)),
        "link": i.tar(i.folder("y"), i.link("x", "y")),
    }
    said = {"plain": ["755 0", "no"], "folder": ["770 7", "no"], "link": ["755 0", "/y/late"]}
    async with rig.store() as (store, client):
        for name, below in lower.items():
            script = "stat -L -c '%a %u' /x; ls /y/late 2>/dev/null || echo no"
            made = i.image(BASE, below, late, run={"Cmd": ["/bin/sh", "-c", script]})
            reference = await offered(rig, client, made, lies=False, tag=f"fit-{name}")
            image = await store.ensure(reference, pull_token="")
            assert await run(rig, image, reference) == (0, said[name])


async def test_nothing_stays_when_images_go(rig: Rig) -> None:
    async with rig.store() as (store, _):
        await store.prune(set())
    held = rig.state()
    assert (held["layers"], held["images"], held["facts"], held["marks"], held["tmp"]) == (set(),) * 5
