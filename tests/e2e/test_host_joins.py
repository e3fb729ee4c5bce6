"""A fourth server joins a running platform by the lines of docs/guides/hosts.md, works, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from probe_rig import GREETING, probe_source

from pantala.testing.box import CACHE, BoxRig, Done, running_box
from pantala.testing.poll import until_sync

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
REGIONS = ("iad", "lhr", "nrt")
INSTANCE = 6
"""Of a box beside the one that the other tests share."""
NODE, THIRD = "fra-1", 90
SCHEDULABLE_WITHIN_S = 30.0


def documented(heading: str) -> list[list[str]]:
    """The commands of the code blocks below a heading of the guide."""
    page = (ROOT / "docs" / "guides" / "hosts.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line.removeprefix("sudo ")) for block in blocks for line in block.splitlines()]


TOKEN_LINE, JOIN_LINE, RUN_LINE = documented("The next host")


class Server:
    """A machine of its own: a network namespace behind the box's router, and its own folders."""

    def __init__(self, box: BoxRig, folder: Path) -> None:
        self.box = box
        self.address = f"100.{96 + box.instance}.{THIRD}.2"
        self.netns = box.namespace(NODE)
        self.state = folder / "host"
        self.environment = os.environ | {
            "PANTALA_CONFIG_DIR": str(folder / "config"),
            "PANTALA_CACHE_DIR": str(CACHE),
            "PANTALA_HOST_STATE": str(self.state),
            "PANTALA_HOST_RUN": f"/run/pantala/box{box.instance}/{NODE}",
            "PANTALA_HOST_CGROUP": f"pantala{box.instance}/{NODE}",
        }
        self.log = folder / "run.log"
        self.running: subprocess.Popen[bytes] | None = None

    def connect(self) -> None:
        router, gateway = self.box.namespace("router"), f"100.{96 + self.box.instance}.{THIRD}.1"
        for command in (
            f"ip netns add {self.netns}",
            f"ip -n {self.netns} link set lo up",
            f"ip -n {router} link add to-{THIRD} type veth peer name eth0 netns {self.netns}",
            f"ip -n {router} addr add {gateway}/30 dev to-{THIRD}",
            f"ip -n {router} link set to-{THIRD} up",
            f"ip -n {self.netns} addr add {self.address}/30 dev eth0",
            f"ip -n {self.netns} link set eth0 up",
            f"ip -n {self.netns} route add default via {gateway}",
        ):
            subprocess.run(command.split(), check=True, timeout=10)

    def command(self, words: list[str]) -> list[str]:
        assert words[0] == "pantala"
        return ["nsenter", f"--net=/run/netns/{self.netns}", sys.executable, "-m", "pantala.cli.main", *words[1:]]

    def pantala(self, *words: str) -> Done:
        ended = subprocess.run(self.command(["pantala", *words]), env=self.environment, stdin=subprocess.DEVNULL,
                               capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
        return Done(ended.returncode, ended.stdout, ended.stderr)

    def run(self) -> None:
        """Until `stop`, as the guide says for a server without systemd."""
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(self.command(RUN_LINE), env=self.environment, stdout=log, stderr=log)

    def stop(self) -> None:
        if self.running is not None:
            self.running.send_signal(signal.SIGTERM)
            assert self.running.wait(timeout=60) == 0
            self.running = None

    def leave(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.wait(timeout=10)
        if (self.state / "host.json").exists():
            left = self.pantala("host", "leave", "--yes")
            assert left.code == 0, left.output

    def token(self, *flags: str) -> str:
        return json.loads(self.box.pantala(*TOKEN_LINE[1:], "--json", *flags).stdout)["token"]


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[BoxRig]:
    """Its hosts have tunnels, as servers have."""
    links = ("--links", "wireguard")
    with running_box(tmp_path_factory.mktemp("join"), regions=REGIONS, instance=INSTANCE, flags=links) as rig:
        yield rig


@pytest.fixture(scope="module")
def server(box: BoxRig, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    made = Server(box, tmp_path_factory.mktemp("server"))
    made.connect()
    try:
        yield made
    finally:
        made.leave()


def host(box: BoxRig, node: str) -> dict[str, Any]:
    return next((one for one in box.pantala_json("host", "list") if one["id"] == node), {})


def test_what_is_no_token_of_this_platform_is_refused_and_changes_nothing(server: Server) -> None:
    for token, word in (
        ("pjt_nonsense", "not a join token"),
        (altered(server.token(), authority="00" * 32), "another authority"),
        (altered(server.token(), address=f"100.{96 + INSTANCE}.1.2:9"), "does not answer"),
        (altered(server.token(), secret="another"), "not valid"),
        (server.token("--region", "lhr"), "lhr"),
        (server.token("--region", ""), "region"),
    ):
        flags = [] if word == "region" else ["--region", "fra"]
        refused = server.pantala("host", "join", token, *flags)
        assert refused.code == 1, token
        assert word in refused.stderr
        assert not (server.state / "host.json").exists()


def altered(token: str, **changes: str) -> str:
    import base64

    body = token.removeprefix("pjt_")
    text = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))) | changes
    return "pjt_" + base64.urlsafe_b64encode(json.dumps(text).encode()).rstrip(b"=").decode()


def test_the_lines_of_the_guide_make_a_host(box: BoxRig, server: Server) -> None:
    printed = box.pantala(*TOKEN_LINE[1:]).stdout.split()
    token = next(word for word in printed if word.startswith("pjt_"))
    filled = [{"TOKEN": token, "ADDRESS": server.address}.get(word, word) for word in JOIN_LINE]
    assert [{"ADDRESS": server.address}.get(word, word) for word in printed] == filled  # it prints what the guide says
    begun = time.monotonic()
    joined = server.pantala(*filled[1:])
    assert (joined.code, joined.stdout.strip()) == (0, NODE), joined.output
    assert RUN_LINE[:3] == ["pantala", "host", "run"]
    server.run()
    seen = until_sync(lambda: host(box, NODE), lambda one: one.get("reachable", False), within_s=SCHEDULABLE_WITHIN_S)
    assert (seen["region"], seen["address"], seen["status"]) == ("fra", server.address, "active")
    assert time.monotonic() - begun < SCHEDULABLE_WITHIN_S

    again = server.pantala(*filled[1:])
    assert again.code == 1
    assert "is a host already" in again.stderr


def test_a_token_works_once(server: Server, tmp_path: Path) -> None:
    used = json.loads((server.state / "host" / "identity" / "joined.json").read_bytes())
    assert used["node"] == NODE
    token = server.token()
    first = {"state": str(tmp_path / "one"), "address": f"100.{96 + INSTANCE}.{THIRD}.77"}
    other = {"state": str(tmp_path / "two"), "address": f"100.{96 + INSTANCE}.{THIRD}.78"}
    codes: list[tuple[int, str]] = []
    for given in (first, other):
        done = server.pantala("host", "join", token, "--region", "fra", "--state", given["state"], "--address",
                              given["address"], "--no-systemd")  # fmt: skip
        codes.append((done.code, done.stderr))
    assert [code for code, _ in codes] == [0, 1]
    assert "already used" in codes[1][1]


def test_it_gets_a_machine_by_region_and_serves_it(box: BoxRig, server: Server, tmp_path: Path) -> None:
    source = probe_source(tmp_path, "probe-fra")
    box.pantala("apps", "create", "probe-fra")
    box.pantala("deploy", "--no-ha", "--primary-region", "fra", cwd=source)
    assert [machine["region"] for machine in box.machines("probe-fra")] == ["fra"]
    assert own_edge(server) == GREETING


def test_its_machines_are_in_the_private_network(box: BoxRig, server: Server, tmp_path: Path) -> None:
    source = probe_source(tmp_path, "probe-iad")
    box.pantala("apps", "create", "probe-iad")
    box.pantala("deploy", "--no-ha", "--primary-region", "iad", cwd=source)
    until_sync(lambda: own_edge(server, "/reach?host=probe-iad.internal&port=8080"), "open".__eq__, within_s=30)


def own_edge(server: Server, path: str = "/") -> str:
    name = "probe-fra.apps.pantala.test"
    return server.box.run_in(
        NODE, "curl", "-sS", "--max-time", "20", "--cacert", str(server.box.state / "control" / "ca" / "ca.pem"),
        "--resolve", f"{name}:443:{server.address}", f"https://{name}{path}", check=False,
    ).stdout  # fmt: skip


def test_its_machines_outlive_its_processes_and_its_state_them(box: BoxRig, server: Server) -> None:
    before = [(machine["id"], machine["instance_id"]) for machine in box.machines("probe-fra")]
    server.stop()
    until_sync(lambda: host(box, NODE), lambda one: not one["reachable"], within_s=60, every_s=0.5)
    server.run()
    until_sync(lambda: own_edge(server), GREETING.__eq__, within_s=60, every_s=0.5)
    until_sync(lambda: host(box, NODE), lambda one: one["reachable"], within_s=30)
    assert [(machine["id"], machine["instance_id"]) for machine in box.machines("probe-fra")] == before


def test_its_processes_run_once(server: Server) -> None:
    refused = server.pantala(*RUN_LINE[1:])
    assert refused.code == 1
    assert "run already" in refused.stderr


def test_nothing_of_it_is_left_when_it_leaves_and_the_box_ends(box: BoxRig, server: Server) -> None:
    server.stop()
    server.leave()
    assert not server.state.exists()
    box.down()
    assert box.pantala("audit", "leaks", "--state", str(box.state)).code == 0
