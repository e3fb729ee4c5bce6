"""An app whose answers can be counted, deployed as often as a test likes, and clients that load it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from figures import tell

from pantala.testing.box import BoxRig
from pantala.testing.load import Report
from pantala.testing.poll import until_sync

APP = """\
import os
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BIND = os.environ.get("BIND", "::")  # the private network is IPv6, the edge comes by IPv4


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536
    disable_nagle_algorithm = True

    def do_GET(self):
        body = b"served"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        version = os.environ.get("FLY_REGION") if self.path == "/region" else os.environ.get("VERSION", "0")
        self.send_header("X-Version", version)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    address_family = socket.AF_INET6 if ":" in BIND else socket.AF_INET


Server((BIND, 8080), Handler).serve_forever()
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
def loading(box: BoxRig, url: str, *, region: str = "") -> Generator[Client]:
    """A client in a region; by default in the box's first."""
    client = [sys.executable, "-m", "pantala.testing.load", url]
    at = ["box", "at", region or box.region, "--state", str(box.state), "--"]
    command = [sys.executable, "-m", "pantala.cli.main", *at]
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


def failures(report: Report) -> Any:
    return report.failures and (report.failures, report.details)


RATE_EACH = 36
"""Requests a second from each region: of three above 100 together."""


class Loads:
    """Clients in every region that load an app at once; their reports when the block ends."""

    def __init__(self, box: BoxRig, url: str, regions: Sequence[str]) -> None:
        self._box = box
        self._url = url
        self._regions = regions
        self._stack = ExitStack()
        self.reports: dict[str, Report] = {}

    def __enter__(self) -> Loads:
        for region in self._regions:
            client = self._stack.enter_context(loading(self._box, self._url, region=region))
            self.reports[region] = self._stack.enter_context(client.steady(RATE_EACH))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def lost(self, *regions: str) -> dict[str, object]:
        return {region: failures(self.reports[region]) for region in regions if self.reports[region].failed}

    def say(self, what: str) -> None:
        for region, report in self.reports.items():
            tell(
                f"{what}: {region} {report.sent} requests, {report.failed} failed, failing for {report.failing_s} s, "
                f"p50 {report.p50_ms} ms, p99 {report.p99_ms} ms, slowest {report.max_ms} ms"
            )
