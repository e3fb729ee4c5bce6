"""No request is lost while apps are deployed, sleep and wake: measured by a client that repeats nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pantala.testing.box import BoxRig
from pantala.testing.load import Report
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

RATE = 110
DEPLOYS = 5
CYCLES = 50
CYCLES_BY_THE_BOX = 10
WINDOW_S = 3.0
"""The box's idle window; `running_box` sets it."""

APP = """\
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536
    disable_nagle_algorithm = True

    def do_GET(self):
        body = b"served"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Version", os.environ.get("VERSION", "0"))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256


Server((os.environ.get("BIND", "0.0.0.0"), 8080), Handler).serve_forever()
"""
DOCKERFILE = """\
FROM python:3.11-slim
COPY app.py /app.py
CMD ["python", "-S", "/app.py"]
"""
TOML = """\
app = "{name}"
primary_region = "iad"

[http_service]
internal_port = 8080
force_https = true
auto_stop_machines = "{auto_stop}"
auto_start_machines = true
min_machines_running = {floor}
"""


class Site:
    """An app of these tests; `deploy` makes each of its settings and versions real."""

    def __init__(self, box: BoxRig, source: Path, name: str) -> None:
        self.box, self.source, self.name = box, source, name
        self.url = f"https://{name}.apps.pantala.test/"
        source.mkdir()
        (source / "app.py").write_text(APP)
        (source / "Dockerfile").write_text(DOCKERFILE)
        box.pantala("apps", "create", name)

    def deploy(self, version: str, *flags: str, auto_stop: str = "stop", floor: int = 0) -> None:
        (self.source / "fly.toml").write_text(TOML.format(name=self.name, auto_stop=auto_stop, floor=floor))
        self.box.pantala("deploy", "--yes", "-e", f"VERSION={version}", *flags, cwd=self.source)

    def states(self) -> list[str]:
        return sorted(machine["state"] for machine in self.box.machines(self.name))

    def until_states(self, *states: str, within_s: float = 30.0) -> None:
        until_sync(self.states, lambda seen: seen == sorted(states), within_s=within_s, every_s=0.3)

    def starts(self, *, since_ms: int) -> dict[str, int]:
        """How often each machine came up since then."""
        found: dict[str, int] = {}
        for machine in self.box.machines(self.name):
            said = self.box.pantala_json("machine", "status", machine["id"], "-a", self.name)
            ready = [event for event in said["events"] if event["type"] == "ready" and event["timestamp"] >= since_ms]
            if ready:
                found[machine["id"]] = len(ready)
        return found

    def stop_all(self) -> None:
        ids = [machine["id"] for machine in self.box.machines(self.name) if machine["state"] != "stopped"]
        if ids:
            self.box.pantala("machine", "stop", *ids, "-a", self.name)


class Client:
    """The load client in the client namespace."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def burst(self, count: int) -> Report:
        self._say(f"burst {count}")
        return self._answer()

    @contextmanager
    def steady(self, rate: int) -> Generator[Report]:
        """The report is filled in when the block ends."""
        report = Report()
        self._say(f"start {rate}")
        try:
            yield report
        finally:
            self._say("stop")
            done = self._answer()
            for field in Report.__struct_fields__:
                setattr(report, field, getattr(done, field))

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Report:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the load client ended"
        return msgspec.json.decode(line, type=Report)


@contextmanager
def loading(box: BoxRig, url: str) -> Generator[Client]:
    client = [sys.executable, "-m", "pantala.testing.load", url]
    command = [sys.executable, "-m", "pantala.cli.main", "box", "at", box.region, "--state", str(box.state), "--"]
    with subprocess.Popen(
        command + client, env=box.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Client(process)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=30)
        finally:
            process.kill()


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


def failures(report: Report) -> Any:
    return report.failures and (report.failures, report.details)


def test_deploys_under_load_lose_no_request(site: Site, client: Client) -> None:
    with client.steady(RATE) as report:
        for version in range(1, DEPLOYS + 1):
            site.deploy(str(version))
    print(f"{DEPLOYS} deploys: {msgspec.json.encode(report).decode()}")
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
    print(f"{CYCLES} sleeps and wakes, the slowest first answer after {slowest} ms")


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
    print(f"named and put back after {time.monotonic() - begun:.1f} s")
    assert site.box.curl(site.url) == "served"
