"""Every command can be scripted: `--json`, the exit codes of docs/reference/cli.md, no question without a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from commands import Cli

from pantala.cli.main import cli as root
from pantala.host.place import Place
from pantala.host.record import HostRecord, save_record
from pantala.host.settings import Tuning

HANDS_ON = {"ssh console", "ssh sftp shell", "console", "box at", "host run"}
"""What these write is another program's."""

ASKING = {
    "apps destroy": ["shop"],
    "certs remove": ["shop.example", "-a", "shop"],
    "host leave": ["--state", "STATE"],
    "host lost": ["node-1"],
    "host remove": ["node-1"],
    "launch": ["--name", "new"],
    "machine leases clear": ["ID", "-a", "shop"],
    "machine update": ["ID", "-e", "A=2", "-a", "shop"],
    "orgs cross-network-replays disable": [],
    "orgs cross-network-replays enable": [],
    "orgs replay-sources remove": ["other"],
    "scale count": ["3", "-a", "shop"],
    "scale memory": ["512", "-a", "shop"],
    "scale vm": ["shared-cpu-2x", "-a", "shop"],
    "secrets keys delete": ["hooks", "-a", "shop"],
}
"""Commands with `--yes`, and how each is called here."""

NEVER_ASK = {"deploy", "ips allocate-v4", "machine destroy"}
"""These take `--yes` because clients give it."""

ASK_LIKE_SCALE = {"regions add", "regions remove"}
"""They ask by `carry_out`, as `scale count` does; here is one region only."""


def leaves(group: click.Group, *before: str) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, *before, name)
        else:
            yield " ".join((*before, name)), command


def flags(command: click.Command) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts}


def test_every_command_has_json() -> None:
    without = {name for name, command in leaves(root) if "--json" not in flags(command)}
    assert without == HANDS_ON


def test_every_command_that_asks_can_be_answered() -> None:
    """A prompt is behind `confirm`, or behind a look whether there is somebody to ask."""
    asking = {name for name, command in leaves(root) if "--yes" in flags(command)}
    assert asking == ASKING.keys() | NEVER_ASK | ASK_LIKE_SCALE
    source = Path(__file__).resolve().parents[2] / "src" / "pantala"
    prompts = {
        path.name: len(re.findall(r"click\.(?:prompt|confirm)\(|\binput\(|getpass\(", text))
        for folder in ("cli", "box", "host")
        for path in (source / folder).rglob("*.py")
        if re.search(r"click\.(?:prompt|confirm)\(|\binput\(|getpass\(", text := path.read_text())
    }
    assert prompts == {"session.py": 1, "auth.py": 1, "launch.py": 2, "login.py": 1, "file_shell.py": 1}


@pytest.mark.anyio
async def test_without_a_terminal_nobody_is_asked_and_nothing_is_done(cli: Cli, tmp_path: Path) -> None:
    await cli.platform.create_app("shop")
    made = await cli.platform.create_machine("shop", config={"image": "registry.pantala.test/shop:v1"})
    cli.write("Dockerfile", "FROM scratch\n")
    place = Place(state="host", run="run", logs="logs", address="192.0.2.1", listen=[])
    save_record(HostRecord(root=str(tmp_path), place=place, tuning=Tuning(resolvers=[]), systemd=False))
    words = {"ID": made["id"], "STATE": str(tmp_path)}
    lines = [[*name.split(), *(words.get(word, word) for word in given)] for name, given in ASKING.items()]
    for line, ended in zip(lines, await cli.run_many(*lines), strict=True):
        assert (line, ended.code, ended.out) == (line, 1, "")
        assert "There is no terminal to ask on\n  add --yes to go on" in ended.err, (line, ended.err)
    machine = cli.agent.machines[made["id"]]
    assert (machine.state.value, machine.config.env) == ("started", None)
    assert len(cli.agent.machines) == 1
    assert (await cli.ok("apps", "list", "-q")).split() == ["shop"]
    assert not (cli.folder / "fly.toml").exists()


@pytest.mark.anyio
async def test_what_was_done_is_one_document(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    service = {"protocol": "tcp", "internal_port": 80, "ports": [{"port": 80, "handlers": ["http"]}]}
    config = {"image": "registry.pantala.test/shop:v1", "services": [service]}  # who answers is well at once
    one = (await cli.platform.create_machine("shop", config=config))["id"]
    flycast = await cli.platform.http.post(
        "/v1/apps/shop/ip_assignments", json={"type": "private_v6"}, headers=cli.platform.auth
    )
    ip = flycast.json()["ip"]
    expected: list[tuple[str, object]] = [
        ("open -a shop", {"url": "https://shop.apps.pantala.test/"}),
        (f"m stop {one} -a shop", [{"id": one, "state": "stopped"}]),
        (f"m start {one} -a shop", [{"id": one, "state": "started"}]),
        (f"m suspend {one} -a shop", [{"id": one, "state": "suspended"}]),
        (f"m start {one} -a shop", [{"id": one, "state": "started"}]),
        (f"m restart {one} -a shop", [{"id": one, "state": "started"}]),
        (f"m cordon {one} -a shop", [{"id": one, "cordoned": True}]),
        (f"m uncordon {one} -a shop", [{"id": one, "cordoned": False}]),
        (f"m signal {one} hup -a shop", {"machine_id": one, "signal": "hup"}),
        (f"m kill {one} -a shop", {"machine_id": one, "signal": "SIGKILL"}),
        (f"m wait {one} -a shop", {"id": one, "state": "started"}),
        (f"m leases clear {one} --yes -a shop", {"ended": []}),
        ("secrets set KEY=1 --stage -a shop", [{"name": "KEY"}]),
        ("secrets unset KEY --stage -a shop", []),
        ("secrets keys generate nacl_sign hooks -a shop", {"name": "hooks", "type": "nacl_sign"}),
        ("secrets keys delete hooks --yes -a shop", {"deleted": ["hooks"]}),
        ("scale count 2 --yes -a shop", [{"state": "started"}, {"state": "started"}]),
        (f"ips release {ip} -a shop", {"released": [ip]}),
        (f"m destroy {one} --force -a shop", {"destroyed": [one]}),
        ("apps destroy shop --yes", {"destroyed": ["shop"]}),
        ("auth logout", {"logged_out": True}),
    ]
    lines = [[*line.split(), "--json"] for line, _ in expected]
    for (line, document), ended in zip(expected, await cli.run_many(*lines), strict=True):
        assert (line, ended.code) == (line, 0), ended.err
        assert (line, pick(json.loads(ended.out), document)) == (line, document)


def pick(found: object, like: object) -> object:
    """Of documents what the expected ones name."""
    if isinstance(found, list) and isinstance(like, list) and len(found) == len(like):
        return [pick(one, other) for one, other in zip(found, like, strict=True)]
    if isinstance(found, dict) and isinstance(like, dict):
        return {key: found.get(key) for key in like}
    return found


@pytest.mark.anyio
async def test_exit_codes(cli: Cli) -> None:
    expected = {
        "apps list": 0,
        "status -a nowhere": 1,
        "status --no-such-flag": 2,
        "no-such-command": 2,
        "machine start": 2,
    }
    ended = await cli.run_many(*(line.split() for line in expected))
    assert dict(zip(expected, (one.code for one in ended), strict=True)) == expected
