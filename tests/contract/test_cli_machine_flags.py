"""`pantala machine run|update`: what a config says that nobody reads, ports and files of a machine that is there."""

from __future__ import annotations

import base64
import json

import pytest
from commands import Cli

from pantala.testing.fake_agent import FakeMachine
from pantala.wire.machine import MachineConfig

pytestmark = pytest.mark.anyio
IMAGE = "registry.pantala.test/shop:v1"
APP = ("-a", "shop")


@pytest.fixture
async def made(cli: Cli) -> FakeMachine:
    await cli.platform.create_app("shop")
    config = {
        "image": IMAGE,
        "guest": {"cpus": 1, "memory_mb": 256, "persist_rootfs": "restart"},
        "services": [{"protocol": "tcp", "internal_port": 8080, "ports": [{"port": 80, "handlers": ["http"]}]}],
        "files": [{"guest_path": "/etc/motd", "raw_value": "aGk="}, {"guest_path": "/etc/kept", "raw_value": "aGk="}],
    }
    made = await cli.platform.create_machine("shop", config=config)
    return cli.agent.machines[made["id"]]


def ports(config: MachineConfig) -> list[tuple[int | None, str | None, list[tuple[int | None, list[str]]]]]:
    return [
        (one.internal_port, one.protocol, [(port.port, port.handlers or []) for port in one.ports or []])
        for one in config.services or []
    ]


async def test_fields_that_nobody_reads_are_named_with_the_nearest_one(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    config = {
        "gest": {},
        "guest": {"cpus": 1, "memory": 256},
        "env": {"gest": "any name will do"},
        "services": [{"protocol": "tcp", "internal_port": 80, "ports": [{"port": 443, "handler": ["tls"]}]}],
        "checks": {"up": {"type": "tcp", "port": 80, "intervall": "15s"}},
    }
    ended = await cli.run("m", "run", IMAGE, *APP, "-d", "--machine-config", json.dumps(config))
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if line.startswith("warning: ")] == [
        "warning: --machine-config: gest: unknown field, not used; did you mean guest?",
        "warning: --machine-config: guest.memory: unknown field, not used; did you mean memory_mb?",
        "warning: --machine-config: services[0].ports[0].handler: unknown field, not used; did you mean handlers?",
        "warning: --machine-config: checks.up.intervall: unknown field, not used; did you mean interval?",
    ]
    refused = await cli.refused("m", "run", IMAGE, *APP, "--strict", "--machine-config", '{"zzz": 1}')
    assert "zzz: unknown field, not used" in refused
    assert len(cli.agent.machines) == 1


async def test_a_config_that_is_read_whole_warns_of_nothing(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    config = {"guest": {"cpus": 2}, "containers": [{"name": "a", "image": IMAGE, "healthchecks": []}]}
    ended = await cli.run("m", "run", *APP, "-d", "--strict", "--machine-config", json.dumps(config))
    assert (ended.code, "warning" in ended.err) == (0, False)


async def test_update_changes_ports_as_flyctl_spells_them(cli: Cli, made: FakeMachine) -> None:
    update = ("m", "update", made.id, "--yes", *APP)
    await cli.ok(*update, "-p", "443:8080/tcp:http:tls", "-p", "5432/tcp:pg_tls")
    assert ports(made.config) == [
        (8080, "tcp", [(80, ["http"]), (443, ["http", "tls"])]),
        (5432, "tcp", [(5432, ["pg_tls"])]),
    ]
    await cli.ok(*update, "-p", "80:8080/tcp:tls,5432/tcp:-")
    assert ports(made.config) == [(8080, "tcp", [(443, ["http", "tls"]), (80, ["tls"])])]
    assert "there is no such port to remove" in await cli.refused(*update, "-p", "81:8080/tcp:-")


async def test_update_changes_files_and_keeps_the_others(cli: Cli, made: FakeMachine) -> None:
    (cli.folder / "motd").write_text("hello")
    given = ["--file-local", "/etc/motd=motd", "--file-literal", "/etc/word=a=b", "--file-secret", "/etc/key=KEY"]
    await cli.ok("m", "update", made.id, "--yes", *APP, *given)
    assert [(file.guest_path, file.raw_value, file.secret_name) for file in made.config.files or []] == [
        ("/etc/motd", base64.b64encode(b"hello").decode(), None),
        ("/etc/kept", "aGk=", None),
        ("/etc/word", base64.b64encode(b"a=b").decode(), None),
        ("/etc/key", None, "KEY"),
    ]
    refused = await cli.refused("m", "update", made.id, "--yes", *APP, "--file-local", "/etc/motd=missing")
    assert "--file-local" in refused


async def test_another_size_leaves_what_else_a_guest_says(cli: Cli, made: FakeMachine) -> None:
    await cli.ok("m", "update", made.id, "--yes", *APP, "--vm-size", "shared-cpu-2x")
    guest = made.config.guest
    assert guest is not None
    assert (made.config.size, guest.cpus, guest.memory_mb, guest.persist_rootfs) == (None, 2, 512, "restart")
    await cli.ok("m", "update", made.id, "--yes", *APP, "--rootfs-persist", "always")
    assert made.config.rootfs is not None
    assert made.config.rootfs.persist == "always"
    assert made.config.guest is not None
    assert made.config.guest.persist_rootfs is None
