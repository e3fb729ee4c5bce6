"""Three regions as their users see them: near answers, private names, deploys, and whatever of it dies in turn.

Loads come from clients in each region, repeat nothing, and count resets and time-outs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from figures import tell
from probe_rig import probe_source
from traffic_rig import Loads, Site, failures, loading

from pantala.testing.box import BoxRig, running_box
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

REGIONS = ("iad", "lhr", "nrt")
INSTANCE = 4
"""Of a box beside the one that the other tests share."""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    with running_box(tmp_path_factory.mktemp("three"), regions=REGIONS, instance=INSTANCE, idle_window_s=600.0) as rig:
        yield rig


@pytest.fixture(scope="module")
def site(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An app with a machine in each region."""
    site = Site(box, tmp_path_factory.mktemp("traffic") / "source", "spread")
    site.deploy("0", "--no-ha", auto_stop="off")
    box.pantala("scale", "count", "3", "--region", "iad,lhr,nrt", "--max-per-region", "1", "-a", site.name, "--yes")
    return site


@pytest.fixture(scope="module")
def probes(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An app that looks about, with a machine in each region."""
    source = probe_source(tmp_path_factory.mktemp("probes"), "probes")
    box.pantala("apps", "create", "probes")
    box.pantala("deploy", "--no-ha", cwd=source)
    box.pantala("regions", "add", "lhr", "nrt", "-a", "probes", "--yes")
    return "probes"


def of_region(box: BoxRig, app: str) -> dict[str, dict[str, str]]:
    return {machine["region"]: machine for machine in box.machines(app)}


def seen_from(box: BoxRig, region: str, path: str) -> str:
    """What the probe in a region sees: asked of that region's own edge."""
    return box.edge_of(f"{region}-1", f"https://probes.apps.pantala.test{path}")


def test_one_scale_command_puts_a_machine_into_each_region(box: BoxRig, site: Site) -> None:
    assert sorted(of_region(box, site.name)) == sorted(REGIONS)
    [group] = json.loads(box.pantala("scale", "show", "-a", site.name, "--json").stdout)
    assert group["regions"] == dict.fromkeys(REGIONS, 1)


def test_each_client_is_answered_in_its_own_region(box: BoxRig, site: Site) -> None:
    for region in REGIONS:
        with loading(box, f"{site.url}region", region=region) as client:
            report = client.burst(30)
        assert failures(report) == {}
        assert report.versions == {region: 30}


def test_it_is_the_same_everywhere(box: BoxRig, site: Site) -> None:
    """Body, certificate and headers; only what names the place differs."""
    said = {r: box.curl(site.url, "-D", "-", "-w", "%{certs}", region=r).splitlines() for r in REGIONS}
    places = ("fly-request-id", "date", "via", "server")
    same = {r: [line for line in lines if not line.lower().startswith(places)] for r, lines in said.items()}
    assert same["lhr"] == same["iad"]
    assert same["nrt"] == same["iad"]
    images = {machine["config"]["image"].partition("@")[2] for machine in box.machines(site.name)}
    assert len(images) == 1


def test_private_names_and_addresses_lead_from_region_to_region(box: BoxRig, site: Site, probes: str) -> None:
    there = of_region(box, site.name)
    addresses = {region: machine["private_ip"] for region, machine in there.items()}
    for region in REGIONS:
        found = seen_from(box, region, f"/resolve?name={site.name}.internal").split()
        assert set(found) == set(addresses.values())
        for other in REGIONS:
            assert seen_from(box, region, f"/resolve?name={other}.{site.name}.internal") == addresses[other]
            assert seen_from(box, region, f"/reach?host={addresses[other]}&port=8080") == "open", (region, other)
            assert seen_from(box, region, f"/reach?host={addresses[other]}&port=8081") != "open"
        machine = there["nrt"]["id"]
        assert seen_from(box, region, f"/resolve?name={machine}.vm.{site.name}.internal") == addresses["nrt"]
        assert seen_from(box, region, "/resolve?name=nobody.internal").startswith("none")


def test_a_stopped_machine_leaves_the_names_of_every_region_within_a_second(
    box: BoxRig, site: Site, probes: str
) -> None:
    name = f"/resolve?name=nrt.{site.name}.internal"
    machine = of_region(box, site.name)["nrt"]
    box.pantala("machine", "stop", machine["id"], "-a", site.name)
    begun = time.monotonic()
    for region in REGIONS:
        until_sync(lambda region=region: seen_from(box, region, name), lambda s: s.startswith("none"), within_s=5)
    tell(f"a stop was seen in every region after {time.monotonic() - begun:.2f} s, three requests included")
    box.pantala("machine", "start", machine["id"], "-a", site.name)
    for region in REGIONS:
        until_sync(lambda region=region: seen_from(box, region, name), machine["private_ip"].__eq__, within_s=5)


def test_a_deploy_in_three_regions_under_load_loses_no_request(box: BoxRig, site: Site) -> None:
    with Loads(box, site.url, REGIONS) as loads:
        for version in ("1", "2"):
            site.deploy(version, auto_stop="off")
    loads.say("two deploys")
    assert loads.lost(*REGIONS) == {}
    assert sum(report.rate for report in loads.reports.values()) >= 100
    assert sorted(of_region(box, site.name)) == sorted(REGIONS), "a deploy keeps the spread"


def test_a_machine_asleep_in_another_region_is_woken_by_a_request(
    box: BoxRig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = Site(box, tmp_path_factory.mktemp("sleepy") / "source", "sleepy")
    site.deploy("0", "--no-ha", "--primary-region", "nrt")
    [machine] = box.machines(site.name)
    assert machine["region"] == "nrt"
    box.pantala("machine", "stop", machine["id"], "-a", site.name)
    before_ms = time.time_ns() // 1_000_000
    with loading(box, site.url, region="iad") as client:
        report = client.burst(15)
    tell(f"15 requests in iad for a machine asleep in nrt: p50 {report.p50_ms} ms, slowest {report.max_ms} ms")
    assert failures(report) == {}
    assert site.starts(since_ms=before_ms) == {machine["id"]: 1}

    box.pantala("machine", "stop", machine["id"], "-a", site.name)
    headers = box.curl(site.url, "-D", "-", "-o", "/dev/null", region="iad")
    request_id = next(line.split()[1] for line in headers.splitlines() if line.lower().startswith("fly-request-id"))
    edge, worker = json.loads(box.pantala("trace", request_id, "--json").stdout)["parts"]
    assert (edge["region"], edge["records"][0]["role"]) == ("iad", "edge")
    assert (worker["region"], worker["records"][0]["role"]) == ("nrt", "worker")
    assert worker["records"][0]["waited_us"]["cold"] > 0


@pytest.mark.parametrize("part", ["agent", "nats"])
def test_a_killed_agent_or_bus_of_a_host_costs_no_request(box: BoxRig, site: Site, part: str) -> None:
    with Loads(box, site.url, REGIONS) as loads:
        box.pantala("box", "stop", f"{part}-lhr-1", "--kill", "--state", str(box.state))
        time.sleep(3)  # for as long as it is down, nothing else is waited for
        box.pantala("box", "start", "--state", str(box.state))
        time.sleep(2)
    loads.say(f"{part}-lhr-1 killed")
    assert loads.lost(*REGIONS) == {}
    until_sync(lambda: box.pantala_json("host", "list"), lambda seen: all(h["reachable"] for h in seen), within_s=30)


def test_an_edge_that_is_told_to_end_loses_nothing(box: BoxRig, site: Site) -> None:
    with Loads(box, site.url, REGIONS) as loads:
        time.sleep(1)
        box.pantala("box", "stop", "proxy-lhr-1", "--state", str(box.state))
        box.pantala("box", "start", "--state", str(box.state))
        time.sleep(2)
    loads.say("proxy-lhr-1 told to end")
    assert loads.lost(*REGIONS) == {}


def test_a_killed_proxy_is_left_for_the_next_edge(box: BoxRig, site: Site) -> None:
    with Loads(box, site.url, REGIONS) as loads:
        time.sleep(1)
        box.pantala("box", "stop", "proxy-lhr-1", "--kill", "--state", str(box.state))
        time.sleep(4)
        box.pantala("box", "start", "--state", str(box.state))
        time.sleep(3)
    loads.say("proxy-lhr-1 killed")
    assert loads.lost("iad", "nrt") == {}
    assert loads.reports["lhr"].failing_s < 2.5, failures(loads.reports["lhr"])


def what_lhr_says(box: BoxRig) -> str:
    """Of an app without machines; before it hears of it, that there is no such name."""
    return box.edge_of("lhr-1", "https://born-meanwhile.apps.pantala.test/", check=False)


def test_a_host_cut_off_is_left_and_comes_back(box: BoxRig, site: Site) -> None:
    with Loads(box, site.url, REGIONS) as loads:
        time.sleep(1)
        box.pantala("box", "cut", "lhr-1", "--state", str(box.state))
        time.sleep(6)
        box.pantala("apps", "create", "born-meanwhile")
        box.pantala("box", "heal", "--state", str(box.state))
        begun = time.monotonic()
        until_sync(
            lambda: what_lhr_says(box), lambda said: "services in its fly.toml" in said, within_s=30, every_s=0.1
        )
        tell(f"lhr-1 knew what it had missed {time.monotonic() - begun:.2f} s after the heal")
        time.sleep(2)
    loads.say("lhr-1 cut off")
    assert loads.lost("iad", "nrt") == {}
    assert loads.reports["lhr"].failing_s < 2.5, failures(loads.reports["lhr"])
    until_sync(lambda: box.pantala_json("host", "list"), lambda seen: all(h["reachable"] for h in seen), within_s=30)


def test_a_host_that_dies_whole_is_left_and_its_machines_are_adopted(box: BoxRig, site: Site) -> None:
    before = {machine["id"]: machine["instance_id"] for machine in box.machines(site.name)}
    with Loads(box, site.url, REGIONS) as loads:
        time.sleep(1)
        box.pantala("box", "stop", "lhr-1", "--kill", "--state", str(box.state))
        time.sleep(4)
        box.pantala("box", "start", "--state", str(box.state))
        time.sleep(3)
    loads.say("lhr-1 killed")
    assert loads.lost("iad", "nrt") == {}
    assert loads.reports["lhr"].failing_s < 2.5, failures(loads.reports["lhr"])
    until_sync(lambda: box.pantala_json("host", "list"), lambda seen: all(h["reachable"] for h in seen), within_s=30)
    assert {machine["id"]: machine["instance_id"] for machine in box.machines(site.name)} == before
    assert box.pantala("audit", "leaks", "--state", str(box.state)).code == 0


def test_without_the_control_plane_all_goes_on(box: BoxRig, site: Site, tmp_path: Path) -> None:
    """Server, SQL and every bus stopped: serving, waking, restarts and names go on; afterwards all agree."""
    sleepy = of_region(box, "sleepy")["nrt"]
    box.pantala("machine", "stop", sleepy["id"], "-a", "sleepy")
    before = sorted((m["id"], m["instance_id"]) for m in box.machines(site.name))
    with Loads(box, site.url, REGIONS) as loads:
        box.pantala("box", "stop", "server", *(f"nats-{region}-1" for region in REGIONS), "--kill", "--state",
                    str(box.state))  # fmt: skip
        time.sleep(5)
        with loading(box, "https://sleepy.apps.pantala.test/", region="iad") as client:
            woken = client.burst(5)
        address = seen_from(box, "iad", f"/resolve?name=lhr.{site.name}.internal")
        agents = [f"agent-{region}-1" for region in REGIONS]
        box.pantala("box", "stop", *agents, "--kill", "--state", str(box.state))
        box.pantala("box", "start", *agents, "--state", str(box.state))
        time.sleep(3)
        box.pantala("box", "start", "--state", str(box.state))
        time.sleep(2)
    loads.say("control plane off")
    assert failures(woken) == {}
    assert address.startswith("fdaa:")
    assert loads.lost(*REGIONS) == {}
    until_sync(
        lambda: box.pantala("host", "list", "--json", check=False),
        lambda done: done.code == 0 and all(host["reachable"] for host in json.loads(done.stdout)),
        within_s=60,
        every_s=0.5,
    )
    assert sorted((m["id"], m["instance_id"]) for m in box.machines(site.name)) == before
    until_sync(lambda: of_region(box, "sleepy")["nrt"]["state"], "started".__eq__, within_s=20)
    site.deploy("9", auto_stop="off")
    assert box.curl(site.url, region="nrt") == "served"


def machines_of_firewall(box: BoxRig, node: str) -> list[str]:
    """Machines that the firewall of a host still knows."""
    text = box.run_in(node, "nft", "list", "set", "inet", "pantala", "source6").stdout
    return re.findall(r'comment "(\w+)"', text)


def test_a_drained_host_loses_no_request_and_takes_machines_again(box: BoxRig, site: Site) -> None:
    box.pantala("apps", "destroy", "sleepy", "--yes", check=False)  # an app of nrt alone would stay there
    with Loads(box, site.url, REGIONS) as loads:
        tell(box.pantala("host", "drain", "nrt-1").output.strip())
        places = sorted(machine["region"] for machine in box.machines(site.name))
        time.sleep(2)
    loads.say("nrt-1 drained")
    assert "nrt" not in places
    assert len(places) == 3
    assert loads.lost(*REGIONS) == {}
    until_sync(lambda: machines_of_firewall(box, "nrt-1"), lambda left: left == [], within_s=30)
    box.pantala("host", "drain", "nrt-1", "--undo")
    box.pantala("regions", "add", "nrt", "-a", site.name, "--yes")


def test_a_lost_host_is_replaced_and_never_runs_its_old_copies_again(box: BoxRig, site: Site) -> None:
    lost = [machine["id"] for machine in box.machines(site.name) if machine["region"] == "lhr"]
    assert lost
    box.pantala("box", "stop", "lhr-1", "--kill", "--state", str(box.state))
    begun = time.monotonic()
    box.pantala("host", "lost", "lhr-1", "--yes")
    until_sync(
        lambda: {m["id"]: (m["region"], m["state"]) for m in box.machines(site.name) if m["id"] in lost},
        lambda seen: set(seen) == set(lost) and all(r != "lhr" and s == "started" for r, s in seen.values()),
        within_s=60,
        every_s=0.2,
    )
    tell(
        f"{len(lost)} machine(s) of the lost host ran elsewhere {time.monotonic() - begun:.1f} s after it was declared"
    )
    assert box.curl(site.url, region="lhr") == "served", "its clients go to the next edge"
    box.pantala("box", "start", "--state", str(box.state))
    until_sync(lambda: machines_of_firewall(box, "lhr-1"), lambda left: left == [], within_s=60, every_s=0.5)
    seen = {host["id"]: host["status"] for host in box.pantala_json("host", "list")}
    assert seen.get("lhr-1") in (None, "lost")
