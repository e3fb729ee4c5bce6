"""The server as a process: a real nats-server, a real registry that trusts its tokens, SIGKILL and restart."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx2
import msgspec
import pytest

from pantala.kit.bus_nats import connect
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.host_keys import HostKeys
from pantala.testing.poll import until_sync
from pantala.testing.ports import free_port

pytestmark = pytest.mark.anyio

ENDED_WITHIN_S = 30.0

# The composition that the tests use: real bus and store, a table for rows, a registry that resolves everything.
SERVE = """
import sys
from contextlib import asynccontextmanager
from pathlib import Path
import anyio
from pantala.server import settings
from pantala.server.compose import NoBuilder, Parts
from pantala.server.main import serve
from pantala.testing.fake_agent import FakeAgent
from pantala.testing.fake_registry import FakeRegistry
from pantala.testing.platform import FakeSightings, RowTable

@asynccontextmanager
async def join(settings, *, bus, clock, epoch):
    Path(settings.state_dir, "epoch").write_text(str(epoch))
    sightings = FakeSightings(clock)
    sightings.add(FakeAgent(bus))  # what the test's own agent says of itself
    yield Parts(sink=RowTable(), registry=FakeRegistry(), builder=NoBuilder(), sightings=sightings)

anyio.run(serve, settings.read(Path(sys.argv[1])), join)
"""


class Place:
    """A folder with settings, the processes started in it, and the admin's token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.nats_port, self.port = free_port(), free_port()
        self.settings = folder / "server.json"
        self.settings.write_text(
            json.dumps(
                {
                    "listen": f"127.0.0.1:{self.port}",
                    "state_dir": str(folder / "state"),
                    "bus": {"url": f"nats://127.0.0.1:{self.nats_port}"},
                    "app_domain": "apps.pantala.test",
                    "platform_domain": "pantala.test",
                    "registry": {"name": "registry.pantala.test"},
                    "default_region": "iad",
                    "regions": ["iad"],
                }
            )
        )
        self.made: dict[str, Any] = {}
        self.keys = HostKeys()
        self.hosts = folder / "hosts.json"
        self.hosts.write_bytes(msgspec.json.encode([self.keys.request(node="node-1")]))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        log = self.stack.enter_context((self.folder / f"{Path(command[0]).name}-{time.time_ns()}.log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def serve(self) -> subprocess.Popen[bytes]:
        process = self.spawn(sys.executable, "-c", SERVE, str(self.settings))
        until_sync(lambda: listening(self.port), bool, within_s=20)
        return process

    def bootstrap(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "pantala.server.bootstrap", "--settings", str(self.settings)]
        done = subprocess.run(
            [*command, "--email", "ada@example.com", "--org", "acme", "--hosts", str(self.hosts)],
            check=True,
            capture_output=True,
            text=True,
        )
        made: dict[str, Any] = json.loads(done.stdout)
        return made


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
async def place(tmp_path: Path) -> AsyncGenerator[Place]:
    made = Place(tmp_path)
    nats_server = Path(sys.executable).parent / "nats-server"
    with made.stack:
        made.spawn(str(nats_server), "-a", "127.0.0.1", "-p", str(made.nats_port))
        until_sync(lambda: listening(made.nats_port), bool, within_s=10)
        made.made = made.bootstrap()
        yield made


async def test_acknowledged_work_survives_a_kill_and_sigterm_ends_it_cleanly(place: Place) -> None:
    headers = {"authorization": f"Bearer {place.made['token']}"}
    async with connect(f"nats://127.0.0.1:{place.nats_port}") as bus:
        agent = FakeAgent(bus)
        await agent.serve()
        server = place.serve()
        async with httpx2.AsyncClient(base_url=place.url, headers=headers) as http:
            await http.post("/v1/apps", json={"app_name": "web", "org_slug": "acme"})
            body = {"config": {"image": "registry.pantala.test/web:v1"}}
            machine = (await http.post("/v1/apps/web/machines", json=body)).json()
        server.kill()
        await anyio.to_thread.run_sync(server.wait)
        server = await anyio.to_thread.run_sync(place.serve)
        async with httpx2.AsyncClient(base_url=place.url, headers=headers) as http:
            again = (await http.get(f"/v1/apps/web/machines/{machine['id']}")).json()
        assert again == machine
        assert (place.folder / "state" / "epoch").read_text() == "2"
        server.send_signal(signal.SIGTERM)
        assert await anyio.to_thread.run_sync(lambda: server.wait(timeout=15)) == 0


async def test_a_registry_believes_our_tokens_and_only_for_what_they_say(place: Place) -> None:
    program = shutil.which("docker-registry")
    assert program, "docker-registry is needed (Debian package docker-registry)"
    port = free_port()
    config = place.folder / "registry.yml"
    config.write_text(
        json.dumps(
            {
                "version": 0.1,
                "storage": {"filesystem": {"rootdirectory": str(place.folder / "images")}},
                "http": {"addr": f"127.0.0.1:{port}"},
                "log": {"level": "warn"},
                "auth": {
                    "token": {
                        "realm": f"{place.url}/v2/token",
                        "service": place.made["registry_service"],
                        "issuer": place.made["registry_issuer"],
                        "rootcertbundle": place.made["registry_bundle"],
                    }
                },
            }
        )
    )
    place.spawn(program, "serve", str(config))
    server = await anyio.to_thread.run_sync(place.serve)
    assert server.poll() is None
    await anyio.to_thread.run_sync(lambda: until_sync(lambda: listening(port), bool, within_s=10))
    headers = {"authorization": f"Bearer {place.made['token']}"}
    async with (
        httpx2.AsyncClient(base_url=place.url) as api,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as registry,
    ):
        await api.post("/v1/apps", json={"app_name": "web", "org_slug": "acme"}, headers=headers)

        async def token(*scopes: str, as_docker: bool = False) -> dict[str, str]:
            query = {"service": "pantala-registry", "scope": list(scopes)}
            login = httpx2.BasicAuth("x", place.made["token"]) if as_docker else None
            answer = await api.get("/v2/token", params=query, headers={} if as_docker else headers, auth=login)
            assert answer.status_code == 200, answer.text
            return {"authorization": f"Bearer {answer.json()['token']}"}

        refused = await registry.get("/v2/web/manifests/v1")
        assert refused.status_code == 401
        assert 'service="pantala-registry"' in refused.headers["www-authenticate"]
        push = await token("repository:web:pull,push", as_docker=True)
        layer = b"{}"
        digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
        upload = await registry.post("/v2/web/blobs/uploads/", headers=push)
        assert upload.status_code == 202, upload.text
        put = f"{upload.headers['location']}&digest={digest}"
        assert (await registry.put(put, content=layer, headers=push)).status_code == 201
        pull = await token("repository:web:pull")
        assert (await registry.get(f"/v2/web/blobs/{digest}", headers=pull)).content == layer
        assert (await registry.post("/v2/web/blobs/uploads/", headers=pull)).status_code == 401
        others = await token("repository:other:pull,push")
        assert (await registry.post("/v2/other/blobs/uploads/", headers=others)).status_code == 401
        bad = await api.get("/v2/token?scope=repository:web:pull", auth=httpx2.BasicAuth("x", "wrong"))
        assert bad.status_code == 401
        assert bad.headers["www-authenticate"].startswith("Basic ")


async def test_an_address_in_use_is_said_in_one_line(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", place.port))
        taken.listen()
        done = subprocess.run(
            [sys.executable, "-c", SERVE, str(place.settings)], capture_output=True, text=True, check=False, timeout=30
        )
    assert done.returncode != 0
    assert f"cannot listen on 127.0.0.1:{place.port}" in done.stderr


async def test_wrong_settings_end_the_process_with_one_clear_line(place: Place) -> None:
    place.settings.write_text(place.settings.read_text().replace('"listen"', '"lisen"'))
    done = subprocess.run(
        [sys.executable, "-m", "pantala.server", "--settings", str(place.settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "listen" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_clients_that_stop_in_the_middle_are_ended_and_others_served(place: Place) -> None:
    def unfinished(text: str) -> bytes:
        """What the server says to it until it ends the connection."""
        with socket.create_connection(("127.0.0.1", place.port), timeout=ENDED_WITHIN_S) as client:
            client.sendall(text.encode())
            said = b""
            while piece := client.recv(65536):
                said += piece
            return said

    head = f"POST /v1/apps HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {place.made['token']}\r\n"
    said: dict[str, bytes] = {}

    async def ask(name: str, text: str) -> None:
        said[name] = await anyio.to_thread.run_sync(unfinished, text)

    server = await anyio.to_thread.run_sync(place.serve)
    begun = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, "nothing", "")
        tasks.start_soon(ask, "half a head", head)
        tasks.start_soon(ask, "half a body", head + 'content-length: 99\r\n\r\n{"app_name"')
        async with httpx2.AsyncClient(
            base_url=place.url, headers={"authorization": f"Bearer {place.made['token']}"}
        ) as http:
            made = await http.post("/v1/apps", json={"app_name": "web", "org_slug": "acme"})
            assert made.status_code == 201
            assert time.monotonic() - begun < ENDED_WITHIN_S
    assert (said["nothing"], said["half a head"]) == (b"", b"")
    assert said["half a body"].startswith(b"HTTP/1.1 408 ")
    assert server.poll() is None
