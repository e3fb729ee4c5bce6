"""No request is lost while apps are deployed, sleep and wake: measured by a client that repeats nothing."""

from __future__ import annotations

import time
from collections.abc import Generator

import msgspec
import pytest
from figures import tell
from traffic_rig import TOML, Client, Site, failures, loading

from pantala.testing.box import BoxRig

pytestmark = pytest.mark.root

RATE = 110
DEPLOYS = 5
CYCLES = 50
CYCLES_BY_THE_BOX = 10
WINDOW_S = 3.0
"""The box's idle window; `running_box` sets it."""


@pytest.fixture(scope="module")
def site(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    site = Site(box, tmp_path_factory.mktemp("traffic") / "source", "traffic")
    site.deploy("0")
    yield site
    box.pantala("apps", "destroy", site.name, "--yes")


@pytest.fixture
def client(box: BoxRig, site: Site) -> Generator[Client]:
    with loading(box, site.url) as client:
        yield client


def test_deploys_under_load_lose_no_request(site: Site, client: Client) -> None:
    with client.steady(RATE) as report:
        for version in range(1, DEPLOYS + 1):
            site.deploy(str(version))
    tell(f"{DEPLOYS} deploys: {msgspec.json.encode(report).decode()}")
    assert failures(report) == {}
    assert set(report.versions) == {str(version) for version in range(DEPLOYS + 1)}
    assert report.rate >= 100
    assert min(report.on_kept, report.on_new) > report.sent / 4


def test_many_requests_for_a_sleeping_app_wake_one_machine(site: Site, client: Client) -> None:
    site.stop_all()
    site.until_states("stopped", "stopped")
    before_ms = time.time_ns() // 1_000_000
    report = client.burst(15)
    assert failures(report) == {}
    assert report.sent == 15
    assert list(site.starts(since_ms=before_ms).values()) == [1]


def test_requests_at_the_edge_of_the_idle_window(site: Site, client: Client) -> None:
    """Each pause ends a little later around the moment when the box puts machines to sleep."""
    total = 0
    for step in range(8):
        time.sleep(WINDOW_S - 0.4 + step * 0.2)
        for _ in range(4):
            report = client.burst(3)
            total += report.sent
            assert failures(report) == {}, f"at {step}"
    assert total == 96


def test_every_first_request_after_a_sleep_is_answered(site: Site, client: Client) -> None:
    site.box.pantala("scale", "count", "1", "-a", site.name, "--yes", cwd=site.source)
    [machine] = [machine["id"] for machine in site.box.machines(site.name)]
    slowest = 0.0
    for cycle in range(CYCLES):
        if cycle < CYCLES_BY_THE_BOX:
            site.until_states("stopped")
        else:
            site.box.pantala("machine", "stop", machine, "-a", site.name)
        report = client.burst(1)
        assert failures(report) == {}, f"in cycle {cycle}"
        slowest = max(slowest, report.max_ms)
    tell(f"{CYCLES} sleeps and wakes, the slowest first answer after {slowest} ms")


def test_the_floor_stays_up_and_without_autostop_all_do(site: Site) -> None:
    site.deploy("floor", floor=1)
    site.box.pantala("scale", "count", "2", "-a", site.name, "--yes", cwd=site.source)
    site.until_states("started", "stopped")
    time.sleep(WINDOW_S + 2)
    assert site.states() == ["started", "stopped"]
    site.deploy("off", auto_stop="off")
    for machine in site.box.machines(site.name):
        site.box.pantala("machine", "start", machine["id"], "-a", site.name)
    time.sleep(WINDOW_S + 2)
    assert site.states() == ["started", "started"]


def test_a_wrong_address_is_named_at_once(site: Site) -> None:
    (site.source / "fly.toml").write_text(TOML.format(name=site.name, auto_stop="off", floor=0))
    image = site.box.machines(site.name)[0]["config"]["image"]
    begun = time.monotonic()
    said = site.box.pantala(
        "deploy", "--yes", "-e", "BIND=127.0.0.1", "--image", image, cwd=site.source, check=False
    )  # fmt: skip
    assert said.code != 0
    assert "the app listens on 127.0.0.1:8080; bind 0.0.0.0:8080" in said.output
    tell(f"named and put back after {time.monotonic() - begun:.1f} s")
    assert site.box.curl(site.url) == "served"
