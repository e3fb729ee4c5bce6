"""One box of three regions: a host for each, one platform, and an end that leaves nothing, however it comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from probe_rig import GREETING, probe_source

from pantala.testing.box import BoxRig, running_box
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

REGIONS = ("iad", "lhr", "nrt")
INSTANCE = 7
"""Of a box beside the one that the other tests share."""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    with running_box(tmp_path_factory.mktemp("regions"), regions=REGIONS, instance=INSTANCE) as rig:
        yield rig


@pytest.fixture(scope="module")
def apps(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An app in each region, by region."""
    found: dict[str, str] = {}
    for region in REGIONS:
        found[region] = f"probe-{region}"
        source = probe_source(tmp_path_factory.mktemp("source"), found[region])
        box.pantala("apps", "create", found[region])
        box.pantala("deploy", "--no-ha", "--primary-region", region, cwd=source)
    return found


def hosts(box: BoxRig) -> dict[str, dict[str, Any]]:
    return {host["id"]: host for host in box.pantala_json("host", "list")}


def test_there_is_a_reachable_host_in_each_region(box: BoxRig) -> None:
    seen = hosts(box)
    assert {name: host["region"] for name, host in seen.items()} == {f"{region}-1": region for region in REGIONS}
    assert all(host["reachable"] and host["status"] == "active" for host in seen.values())


def test_an_app_runs_in_its_region_and_its_own_edge_serves_it(box: BoxRig, apps: dict[str, str]) -> None:
    for region, app in apps.items():
        assert [machine["region"] for machine in box.machines(app)] == [region]
        assert box.edge_of(f"{region}-1", f"https://{app}.apps.pantala.test/") == GREETING


def test_every_edge_knows_every_app(box: BoxRig, apps: dict[str, str]) -> None:
    """One catalogue: an edge that cannot reach a machine says so, it does not say that there is no such app."""
    for region in REGIONS:
        for app in apps.values():
            status = ("-o", os.devnull, "-w", "%{http_code}")
            said = box.edge_of(f"{region}-1", f"https://{app}.apps.pantala.test/", *status)
            assert said in ("200", "503"), f"{app} at {region}: {said}"


def test_everything_comes_back_as_it_was(box: BoxRig, apps: dict[str, str]) -> None:
    before = {app: [(machine["id"], machine["instance_id"]) for machine in box.machines(app)] for app in apps.values()}
    joined = {name: host["joined_at"] for name, host in hosts(box).items()}
    box.down()
    box.up("--idle-window", "60")  # the regions are those that it had
    assert {name: host["joined_at"] for name, host in hosts(box).items()} == joined
    for region, app in apps.items():
        until_sync(
            lambda region=region, app=app: box.edge_of(f"{region}-1", f"https://{app}.apps.pantala.test/", check=False),
            GREETING.__eq__,
            within_s=60,
            every_s=0.5,
        )
    after = {app: [(machine["id"], machine["instance_id"]) for machine in box.machines(app)] for app in apps.values()}
    assert after == before


def test_a_killed_supervisor_leaves_nothing_behind(box: BoxRig, apps: dict[str, str]) -> None:
    assert apps
    status = json.loads((box.state / "status.json").read_bytes())
    os.kill(status["supervisor"], signal.SIGKILL)
    box.down()
    assert box.pantala("audit", "leaks", "--state", str(box.state)).code == 0


def test_a_killed_start_leaves_nothing_behind(box: BoxRig) -> None:
    """It was in the middle of starting the hosts."""
    command = [sys.executable, "-m", "pantala.cli.main", "up", "--state", str(box.state), "--org", "tests"]
    with subprocess.Popen(command, env=box.environment, stderr=subprocess.DEVNULL) as up:
        until_sync((box.state / "status.json").exists, bool, within_s=60)
        up.kill()
    box.down()
    assert box.pantala("audit", "leaks", "--state", str(box.state)).code == 0
    box.up()
    assert all(host["reachable"] for host in hosts(box).values())


def test_the_last_word_says_what_it_took(box: BoxRig) -> None:
    box.down()
    said = box.up().stderr
    line = next(line for line in said.splitlines() if line.strip().startswith("3 hosts in "))
    assert " GB: " in line
    assert all(kind in line for kind in ("agent", "nats", "proxy", "server"))


def test_a_state_keeps_its_regions_and_takes_more(box: BoxRig) -> None:
    before = {name: host["address"] for name, host in hosts(box).items()}
    box.down()
    refused = box.pantala("up", "--state", str(box.state), "--regions", "lhr,nrt", check=False)
    assert refused.code == 1
    assert "a host in iad" in refused.output
    box.up("--regions", "fra,nrt,lhr,iad")
    after = {name: host["address"] for name, host in hosts(box).items() if host["reachable"]}
    assert after.pop("fra-1") not in before.values()
    assert after == before


def test_regions_that_cannot_be_are_refused_before_anything_changes(tmp_path: Path, box: BoxRig) -> None:
    for regions in ("iad,iad", "narita", ",".join(f"a{a}{b}" for a in "abcdef" for b in "abcdef")):
        refused = box.pantala("up", "--state", str(tmp_path / "other"), "--regions", regions, check=False)
        assert refused.code == 1
        assert "--regions" in refused.output
        assert not (tmp_path / "other").exists()
