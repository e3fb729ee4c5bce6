"""Edges behind one address, distances and cuts, in real namespaces with BIRD and the relay.

The proxies are stand-ins (`network_rig.py`): what is tried here is where the router sends a client, and when.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from network_rig import EDGE, INSTANCE, NetworkRig, network_rig

from pantala.testing.poll import until_sync

pytestmark = [pytest.mark.root]
REGIONS = ["iad", "lhr", "nrt"]
RTT_MS = {("iad", "lhr"): 75, ("iad", "nrt"): 160, ("lhr", "nrt"): 220}
LEFT_WITHIN_S = 1.0

# Asks again and again until its stdin ends, on new connections and on one that is kept; prints what went wrong, then
# how often it asked. A kept connection is opened anew only after an answer said `Connection: close`.
CLIENT = f"""
import http.client, select, sys
asked, kept = 0, None
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0.005)[0]:
    try:
        kept = kept or http.client.HTTPConnection("{EDGE}", timeout=5)
        for connection in (http.client.HTTPConnection("{EDGE}", timeout=5), kept):
            connection.request("GET", "/")
            answer = connection.getresponse()
            body = answer.read()
            asked += 1
            if answer.status != 200:
                print("failed", answer.status, flush=True)
        if kept.sock is None:
            kept = None
    except (OSError, http.client.HTTPException) as error:
        print("failed", repr(error), flush=True)
        kept = None
print("asked", asked, flush=True)
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkRig]:
    with network_rig(tmp_path_factory.mktemp("edges"), regions=REGIONS) as rig:
        yield rig


@pytest.fixture
def settled(rig: NetworkRig) -> NetworkRig:
    """Every region is served by its own edge."""
    rig.settle(REGIONS)
    return rig


def moved_after_s(rig: NetworkRig, region: str, harm: Callable[[], object]) -> tuple[str, float]:
    """Who answers instead of the region's own edge, and how long after the harm it first did."""
    begun = time.monotonic()
    harm()
    node = until_sync(lambda: rig.answered_by(region), lambda seen: seen not in ("", f"{region}-1"), within_s=10)
    return node, time.monotonic() - begun


@contextmanager
def ending(process: Popen[str]) -> Generator[Iterator[str]]:
    """The lines that it says; killed, and its pipes closed, whatever becomes of the test."""
    assert process.stdout is not None
    with process:
        try:
            yield process.stdout
        finally:
            process.kill()


def each_is_served_by_its_own(rig: NetworkRig) -> None:
    """All at once; a session between router and edge that ends on a busy machine is back in a second."""
    own = [f"{region}-1" for region in REGIONS]
    until_sync(lambda: [rig.answered_by(region) for region in REGIONS], own.__eq__, within_s=15)


def test_the_nearest_edge_answers(settled: NetworkRig) -> None:
    each_is_served_by_its_own(settled)


@pytest.mark.parametrize(("region", "next_best"), [("nrt", "iad-1"), ("lhr", "iad-1"), ("iad", "lhr-1")])
def test_a_proxy_that_is_killed_is_left_for_the_next_edge(settled: NetworkRig, region: str, next_best: str) -> None:
    try:
        node, took_s = moved_after_s(
            settled, region, lambda: settled.call("kill", f"edge-{region}-1", int(signal.SIGKILL))
        )
    finally:
        settled.call("start_edge", f"{region}-1")
    assert node == next_best
    assert took_s < LEFT_WITHIN_S


def test_a_host_that_falls_silent_is_left_and_found_again(settled: NetworkRig) -> None:
    try:
        node, took_s = moved_after_s(settled, "lhr", lambda: settled.call("cut", "lhr-1"))
    finally:
        settled.call("heal", "lhr-1")
    assert node == "iad-1"
    assert took_s < LEFT_WITHIN_S + 0.5  # the command itself takes a part of it
    until_sync(lambda: settled.answered_by("lhr"), lambda seen: seen == "lhr-1", within_s=15)


@pytest.mark.parametrize("what", ["edge-lhr-1", "announcer-lhr-1"], ids=["proxy told to end", "announcer told to end"])
def test_an_edge_that_leaves_loses_nothing(settled: NetworkRig, what: str) -> None:
    at_lhr = ["nsenter", f"--net=/run/netns/pnt{INSTANCE}-at-lhr", "--"]
    ask = Popen([*at_lhr, sys.executable, "-c", CLIENT], stdin=PIPE, stdout=PIPE, text=True)
    with ending(ask) as client:
        assert next(client) == "begun\n"
        fetch = Popen([*at_lhr, "curl", "-sSN", "--max-time", "10", f"http://{EDGE}/slow"], stdout=PIPE, text=True)
        with ending(fetch) as slow:
            assert next(slow) == "lhr-1\n"
            settled.call("kill", what, int(signal.SIGTERM))
            until_sync(lambda: settled.answered_by("lhr"), lambda node: node == "iad-1", within_s=15)
            finished = list(slow)  # what the edge had begun before it was asked to leave
            assert fetch.wait(timeout=10) == 0
        said, _ = ask.communicate("", timeout=30)
    settled.call("restart_edge", "lhr-1")
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("failed")] == []
    assert int(lines[-1].split()[1]) > 20
    assert finished == ["lhr-1\n"] * 19


def test_a_cut_region_keeps_its_own_clients_and_hears_no_one_else(settled: NetworkRig) -> None:
    def reaches(client: str, third: int) -> bool:
        return "1 received" in settled.run(
            f"at-{client}", "ping", "-c1", "-W1", f"100.{96 + int(INSTANCE)}.{third}.2", check=False
        )

    assert reaches("iad", 3)
    settled.call("cut", "nrt")
    try:
        assert not reaches("iad", 3)
        assert not reaches("nrt", 1)
        assert reaches("nrt", 3)
        assert reaches("iad", 2)
        each_is_served_by_its_own(settled)
        settled.call("kill", "edge-iad-1", int(signal.SIGKILL))
        until_sync(lambda: settled.answered_by("iad"), lambda node: node == "lhr-1", within_s=15)
    finally:
        settled.call("heal")
        settled.call("start_edge", "iad-1")
    assert reaches("iad", 3)


def test_a_host_that_is_attached_later_takes_its_share_and_leaves_no_trace(settled: NetworkRig) -> None:
    before = settled.run("router", "ip", "rule")
    settled.call("add_link", "syd-1", region="syd")
    until_sync(lambda: settled.call("birdc", "bird-router", "show route"), lambda said: "edge_4" in said, within_s=10)
    settled.run("syd-1", "ping", "-c1", "-W2", f"100.{96 + int(INSTANCE)}.1.2")
    settled.call("kill", "edge-nrt-1", int(signal.SIGKILL))
    try:
        until_sync(lambda: settled.answered_by("nrt"), lambda node: node == "syd-1", within_s=15)
    finally:
        settled.call("start_edge", "nrt-1")
    settled.call("remove_link", "syd-1")
    assert settled.run("router", "ip", "rule") == before
    assert "edge_4" not in settled.call("birdc", "bird-router", "show protocols")
    assert not Path(f"/run/netns/pnt{INSTANCE}-syd-1").exists()


# -- distances ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(rig: NetworkRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkRig]:
    """A second box with distances, in the first one's place."""
    rig.close()
    with network_rig(tmp_path_factory.mktemp("apart"), regions=REGIONS, distances=True) as far:
        far.settle(REGIONS)
        yield far


def rtts_ms(rig: NetworkRig, netns: str, address: str) -> list[float]:
    said = rig.run(netns, "ping", "-c15", "-i0.05", "-W2", address)
    return sorted(float(found) for found in re.findall(r"time=([\d.]+)", said))


@pytest.mark.parametrize("pair", RTT_MS, ids="-".join)
def test_a_round_trip_takes_as_long_as_the_matrix_says(apart: NetworkRig, pair: tuple[str, str]) -> None:
    here, there = pair
    third = REGIONS.index(there) + 1
    for source in (f"at-{here}", f"{here}-1"):
        seen = rtts_ms(apart, source, f"100.{96 + int(INSTANCE)}.{third}.2")
        assert RTT_MS[pair] <= seen[0] <= RTT_MS[pair] + 2  # the quickest: a busy machine adds to the others


def test_within_a_region_nothing_waits(apart: NetworkRig) -> None:
    before = apart.call("stats")["packets"]
    assert rtts_ms(apart, "at-lhr", f"100.{96 + int(INSTANCE)}.2.2")[0] < 2
    assert apart.answered_by("lhr") == "lhr-1"
    assert apart.call("stats")["packets"] == before


# Sends for a while on several connections and prints Mbit/s received, the first second left out.
RECEIVE = """
import selectors, socket, sys, time
server = socket.create_server(("", 9000))
print("ready", flush=True)
watched = selectors.DefaultSelector()
for _ in range(int(sys.argv[1])):
    watched.register(server.accept()[0], 1)
begun, received = time.monotonic() + 1, 0
while watched.get_map():
    for key, _ in watched.select():
        data = key.fileobj.recv(1 << 18)
        if not data:
            watched.unregister(key.fileobj)
            key.fileobj.close()
        elif time.monotonic() > begun:
            received, last = received + len(data), time.monotonic()
print(received * 8 / (last - begun) / 1e6)
"""
SEND = """
import socket, sys, threading, time
def send():
    with socket.create_connection((sys.argv[1], 9000)) as s:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            s.sendall(bytes(1 << 17))
for _ in range(int(sys.argv[2])):
    threading.Thread(target=send).start()
"""


def carried_mbit_s(rig: NetworkRig, flows: str) -> float:
    inside = ["nsenter", f"--net=/run/netns/pnt{INSTANCE}-lhr-1", "--"]
    with Popen([*inside, sys.executable, "-c", RECEIVE, flows], stdout=PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        rig.run("iad-1", sys.executable, "-c", SEND, f"100.{96 + int(INSTANCE)}.2.2", flows)
        return float(receiver.communicate(timeout=30)[0])


def test_the_way_between_regions_carries_150_mbit_s(apart: NetworkRig) -> None:
    seen: list[float] = []
    while not seen or (seen[-1] < 150 and len(seen) < 3):  # a busy machine takes from what it carries
        seen.append(carried_mbit_s(apart, "8"))
    assert seen[-1] >= 150, f"{seen} Mbit/s"


def test_a_client_of_a_dead_edge_waits_for_the_way_to_the_next_one(apart: NetworkRig) -> None:
    """The address is the same: only the way that a packet takes says how far it is."""
    apart.call("kill", "edge-nrt-1", int(signal.SIGKILL))
    try:
        until_sync(lambda: apart.answered_by("nrt"), lambda node: node == "iad-1", within_s=15)
        connect = ["curl", "-s", "-o", "/dev/null", "-w", "%{time_connect}", f"http://{EDGE}/"]
        took = [float(apart.run("at-nrt", *connect)) for _ in range(5)]  # the quickest: a busy machine adds to the way
        assert 0.160 <= min(took) <= 0.170, took
    finally:
        apart.call("start_edge", "nrt-1")


def test_loss_is_felt_and_taken_back(apart: NetworkRig) -> None:
    apart.call("loss", 0.5)
    said = apart.run("at-iad", "ping", "-c40", "-i0.02", "-W1", f"100.{96 + int(INSTANCE)}.2.2", check=False)
    received = int(re.findall(r"(\d+) received", said)[0])
    assert 1 <= received <= 25  # a quarter of 40 is expected; each bound is off by less than 1 in 10^5 runs
    apart.call("loss", 0.0)
    assert len(rtts_ms(apart, "at-iad", f"100.{96 + int(INSTANCE)}.2.2")) == 15


def test_without_the_relay_packets_pass_at_once(apart: NetworkRig) -> None:
    apart.call("kill", "relay", int(signal.SIGKILL))
    assert rtts_ms(apart, "at-iad", f"100.{96 + int(INSTANCE)}.2.2")[0] < 75
