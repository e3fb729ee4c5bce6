"""Ten minutes without server, SQL and bus: three regions serve, wake, restart, check and resolve; then all agree.

Periods that are days or hours elsewhere (renewal of certificates, what is kept of deletions) are about a minute here,
so that each comes round several times while nobody answers. `SOAK_SECONDS` shortens the time for a look.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
from figures import tell
from probe_rig import probe_source
from soak_instance import INSTANCE
from traffic_rig import Site, failures, loading

from pantala.testing.box import BoxRig, running_box
from pantala.testing.load import Report
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

REGIONS = ("iad", "lhr", "nrt")
OFF_FOR_S = float(os.environ.get("SOAK_SECONDS", "600"))
ROUND_S = 30.0
RATE_EACH = 36
WINDOW_S = 5.0
CHECK = """
[[http_service.checks]]
method = "GET"
path = "/"
interval = "2s"
timeout = "1s"
grace_period = "1s"
"""
NODE_CERTIFICATE_S = 30 * 24 * 3600
PERIODS = {
    "agent.renew_before_s": NODE_CERTIFICATE_S - 60,
    "agent.renew_every_s": 10,
    "agent.tombstones_kept_s": 60,
    "agent.tidy_every_s": 20,
}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    settings = [flag for name, value in PERIODS.items() for flag in ("--settings", f"{name}={json.dumps(value)}")]
    with running_box(
        tmp_path_factory.mktemp("off"), regions=REGIONS, instance=INSTANCE, idle_window_s=WINDOW_S, flags=settings
    ) as rig:
        yield rig


def until(look: Callable[[], str], wanted: Callable[[str], bool]) -> None:
    until_sync(look, wanted, within_s=20, every_s=0.2)


def test_ten_minutes_without_control_plane_and_bus(box: BoxRig, tmp_path: Path) -> None:
    site = Site(box, tmp_path / "steady", "steady")
    site.deploy("0", "--no-ha", auto_stop="off")
    box.pantala("scale", "count", "3", "--region", ",".join(REGIONS), "-a", site.name, "--yes")
    sleepy = Site(box, tmp_path / "sleepy", "sleepy")
    sleepy.deploy("0", "--no-ha", "--primary-region", "nrt")
    source = probe_source(tmp_path, "fragile")
    (source / "fly.toml").write_text((source / "fly.toml").read_text() + CHECK)
    box.pantala("apps", "create", "fragile")
    box.pantala("deploy", "--no-ha", cwd=source)
    before = {app: sorted((m["id"], m["instance_id"]) for m in box.machines(app)) for app in ("steady", "fragile")}
    addresses = {m["region"]: m["private_ip"] for m in box.machines(site.name)}

    def fragile(path: str) -> str:
        return box.edge_of("iad-1", f"https://fragile.apps.pantala.test{path}", check=False)

    reports: dict[str, Report] = {}
    rounds = 0
    with ExitStack() as stack:
        for region in REGIONS:
            client = stack.enter_context(loading(box, site.url, region=region))
            reports[region] = stack.enter_context(client.steady(RATE_EACH))
        off = ["server", *(f"nats-{region}-1" for region in REGIONS)]
        box.pantala("box", "stop", *off, "--kill", "--state", str(box.state))
        ends = time.monotonic() + OFF_FOR_S
        while time.monotonic() < ends:
            rounds += 1
            with loading(box, sleepy.url, region="iad") as client:
                woken = client.burst(3)  # it has slept since the last round
            assert failures(woken) == {}, f"in round {rounds}"
            for region in REGIONS:
                assert fragile(f"/resolve?name={region}.{site.name}.internal") == addresses[region]
            fragile("/sick")  # its check fails: nothing is sent to it
            until(lambda: fragile("/"), lambda said: "health checks" in said)
            until(lambda: fragile("/"), lambda said: said.startswith("Hello"))
            fragile("/exit")  # it ends, and is started again
            until(lambda: fragile("/"), lambda said: said.startswith("Hello"))
            time.sleep(max(min(ROUND_S, ends - time.monotonic()), 0))
        box.pantala("box", "start", "--state", str(box.state))
        begun = time.monotonic()
        until_sync(lambda: agreed(box), bool, within_s=60, every_s=0.2)
        back_s = time.monotonic() - begun
    for region, report in reports.items():
        tell(
            f"{region}: {report.sent} requests, {report.failed} failed, p50 {report.p50_ms} ms, p99 {report.p99_ms} ms"
        )
    tell(
        f"{rounds} rounds of waking, names, checks and restarts in {OFF_FOR_S:.0f} s; agreed {back_s:.1f} s afterwards"
    )
    assert {region: failures(report) for region, report in reports.items() if report.failed} == {}
    now = {app: sorted((m["id"], m["instance_id"]) for m in box.machines(app)) for app in before}
    assert now == before
    renewed = [path.stat().st_mtime for path in box.state.glob("hosts/*/identity/node.pem")]
    until_sync(
        lambda: [path.stat().st_mtime for path in box.state.glob("hosts/*/identity/node.pem")],
        lambda times: all(new > old for new, old in zip(times, renewed, strict=True)),
        within_s=120,
        every_s=1.0,
    )
    site.deploy("1", auto_stop="off")
    for region in REGIONS:
        assert box.curl(site.url, region=region) == "served"
    assert box.pantala("audit", "leaks", "--state", str(box.state)).code == 0


def agreed(box: BoxRig) -> bool:
    done = box.pantala("host", "list", "--json", check=False)
    return done.code == 0 and all(host["reachable"] for host in json.loads(done.stdout))
