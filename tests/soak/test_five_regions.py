"""Five replicas in five regions, each of which is lost in turn under load: every client is served again within 5 s."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path

import pytest
from soak_instance import INSTANCE
from traffic_rig import Loads, Site, failures

from pantala.testing.box import BoxRig, running_box
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

REGIONS = ("iad", "lhr", "nrt", "mad", "gru")
SERVED_AGAIN_WITHIN_S = 5.0
LOST_FOR_S = 8.0


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    with running_box(tmp_path_factory.mktemp("five"), regions=REGIONS, instance=INSTANCE, idle_window_s=600.0) as rig:
        yield rig


def test_any_one_of_five_regions_can_be_lost(box: BoxRig, tmp_path: Path) -> None:
    site = Site(box, tmp_path / "source", "five")
    site.deploy("0", "--no-ha", auto_stop="off")
    spread = ("--region", ",".join(REGIONS), "--max-per-region", "1")
    box.pantala("scale", "count", "5", *spread, "-a", site.name, "--yes")
    assert sorted(machine["region"] for machine in box.machines(site.name)) == sorted(REGIONS)
    for lost in REGIONS:
        with Loads(box, site.url, REGIONS) as loads:
            time.sleep(1)
            box.pantala("box", "cut", f"{lost}-1", "--state", str(box.state))
            time.sleep(LOST_FOR_S)
            box.pantala("box", "heal", "--state", str(box.state))
            time.sleep(2)
        loads.say(f"{lost}-1 cut off")
        assert loads.lost(*(region for region in REGIONS if region != lost)) == {}
        assert loads.reports[lost].failing_s < SERVED_AGAIN_WITHIN_S, failures(loads.reports[lost])
        until_sync(
            lambda: box.pantala_json("host", "list"), lambda seen: all(h["reachable"] for h in seen), within_s=30
        )
    assert box.pantala("audit", "leaks", "--state", str(box.state)).code == 0
