"""A box whose disks are full: every command says which and how full, and what runs goes on."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest
from probe_rig import GREETING, api_of, asked, deploy_probe

from pantala.testing.box import CACHE, BoxRig, Done, running_box
from pantala.testing.disk import fill, small_folder
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

APP = "steadfast"
INSTANCE = 7
"""Of a box beside the one that the other tests share."""

BLOB_MB = 150
CREATIONS_MAX = 60


@pytest.fixture(scope="module")
def full_box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    work = tmp_path_factory.mktemp("full")
    with (
        small_folder(work / "state", size_mib=900),
        small_folder(CACHE / f"buildkit{INSTANCE}", size_mib=1600),
        running_box(work, idle_window_s=600.0, instance=INSTANCE) as rig,
    ):
        yield rig


@pytest.fixture(scope="module")
def project(full_box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy_probe(full_box, tmp_path_factory.mktemp("source"), APP)


@pytest.fixture
def unchanged(full_box: BoxRig, project: Path) -> Generator[None]:
    """The app answers, its machines are those of before and were not restarted, no layer is left half unpacked."""
    dockerfile = (project / "Dockerfile").read_text()
    before, layers = machines(full_box), kept_layers(full_box)
    yield
    (project / "Dockerfile").write_text(dockerfile)
    assert asked(full_box, APP, "/") == GREETING
    assert machines(full_box) == before
    assert kept_layers(full_box) == layers


def machines(box: BoxRig) -> dict[str, tuple[str, str, str]]:
    return {m["id"]: (m["state"], m["instance_id"], m["config"]["image"]) for m in box.machines(APP)}


def kept_layers(box: BoxRig) -> set[str]:
    images = box.state / "hosts" / "iad-1" / "images"
    until_sync(lambda: list((images / "tmp").iterdir()), lambda left: left == [], within_s=20)
    return {path.name for path in (images / "layers").iterdir()}


def grow(project: Path, megabytes: int) -> None:
    with (project / "Dockerfile").open("a") as file:
        file.write(f"RUN head -c {megabytes}000000 /dev/urandom > /blob\n")


def refused(done: Done, *wanted: str) -> None:
    assert done.code != 0, done.output
    assert len(re.findall(r"^Error: ", done.stderr, flags=re.MULTILINE)) == 1, done.stderr
    for text in (*wanted, "are free", "free some space there or give it a larger disk"):
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("unchanged")
def test_commands_are_refused_while_the_state_has_no_room(full_box: BoxRig) -> None:
    before = machines(full_box)
    filler = fill(full_box.state)
    try:
        no_room = f"no room for the platform's database; nothing was changed: the disk of {full_box.state}"
        refused(refused_creation(full_box), no_room)
        refused(full_box.pantala("machine", "stop", before.popitem()[0], "-a", APP, check=False), no_room)
        with api_of(full_box) as api:
            answer = api.post("/v1/apps", json={"app_name": "another", "org_slug": "tests"})
        assert (answer.status_code, answer.json()["status"]) == (507, "disk_full")
        assert asked(full_box, APP, "/") == GREETING
    finally:
        filler.unlink()
    assert {process["restarts"] for process in full_box.processes().values()} == {0}
    full_box.pantala("apps", "create", "another")


def refused_creation(box: BoxRig) -> Done:
    """The database's log may have some room inside, which a first small change still finds."""
    for number in range(CREATIONS_MAX):
        done = box.pantala("apps", "create", f"filler-{number}", check=False)
        if done.code != 0:
            return done
    raise AssertionError(f"{CREATIONS_MAX} apps were created on a full disk")


@pytest.mark.usefixtures("unchanged")
def test_a_build_without_room_names_its_disk(full_box: BoxRig, project: Path) -> None:
    grow(project, 2500)
    refused(full_box.pantala("deploy", cwd=project, check=False), "no room for this build: the disk of", "buildkit")


@pytest.mark.usefixtures("unchanged")
def test_an_image_without_room_in_the_registry_leaves_nothing_there(full_box: BoxRig, project: Path) -> None:
    grow(project, BLOB_MB)
    filler = fill(full_box.state, leave_mib=BLOB_MB // 2)
    try:
        refused(full_box.pantala("deploy", cwd=project, check=False), "no room for the image in the registry")
    finally:
        filler.unlink()
    assert list((full_box.state / "registry").rglob("_uploads/*")) == []


@pytest.mark.usefixtures("unchanged")
def test_an_image_without_room_on_the_host_leaves_the_old_version(full_box: BoxRig, project: Path) -> None:
    """The registry takes it (once), the host does not (a second time)."""
    grow(project, BLOB_MB)
    filler = fill(full_box.state, leave_mib=BLOB_MB + BLOB_MB // 2)
    try:
        done = full_box.pantala("deploy", cwd=project, check=False)
    finally:
        filler.unlink()
    refused(done, f"could not be updated: no room for the image registry.pantala.test/{APP}:", "still serves")
    assert "putting machine" not in done.output
