"""`pantala ssh`, `console`, `machine exec --tty` through the real API, to a server that is not ours (asyncssh)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import asyncssh
import pytest
from commands import Cli

from pantala.testing.fake_agent import FakeMachine
from pantala.testing.ports import free_port
from pantala.testing.relayed_streams import RelayedStreams

pytestmark = pytest.mark.anyio

CONTAINERS = [{"name": "web", "image": "registry.pantala.test/shop:v1"}, {"name": "side", "image": "b"}]


@pytest.fixture
async def made(cli: Cli) -> FakeMachine:
    await cli.platform.create_app("shop")
    config = {"image": "registry.pantala.test/shop:v1", "containers": CONTAINERS}
    made = await cli.platform.create_machine("shop", config=config)
    return cli.agent.machines[made["id"]]


@pytest.fixture
async def disk(cli: Cli, tmp_path: Path) -> AsyncGenerator[Path]:
    """What the machine's file server shows. Programs say how they were begun."""
    await cli.platform.control.publication.publish_all()
    authority = cli.platform.rows.rows["ssh/authorities"]["authorities"][0]
    known = tmp_path / "authorized"
    known.write_text(f'cert-authority,principals="root@acme/shop" {authority}\n')
    folder = tmp_path / "disk"
    (folder / "srv").mkdir(parents=True)

    def begun(process: asyncssh.SSHServerProcess[str]) -> None:
        if process.command == "drop":
            process.channel.get_connection().abort()
            return
        where = process.env.get("FLY_SSH_CONTAINER") or process.env.get("FLY_SSH_MACHINE")
        process.stdout.write(f"{process.command} in {where} with {process.term_type or 'no terminal'}\n")
        process.exit(7)

    def files(channel: asyncssh.SSHServerChannel[bytes]) -> asyncssh.SFTPServer:
        return asyncssh.SFTPServer(channel, chroot=str(folder).encode())

    port = free_port()
    async with asyncssh.listen(
        "127.0.0.1",
        port,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        authorized_client_keys=str(known),
        process_factory=begun,
        sftp_factory=files,
    ):
        cli.agent.streams = RelayedStreams(port)
        yield folder


async def test_the_file_shell_takes_commands_from_a_pipe(cli: Cli, made: FakeMachine, disk: Path) -> None:
    (cli.folder / "sent").write_text("of here\n")
    (cli.folder / "tree").mkdir()
    (cli.folder / "tree" / "leaf").write_text("green\n")
    commands = """
        pwd
        cd srv          # from where it is
        mkdir -p a/b
        put sent
        put sent "a/b/other name"
        put -R tree a
        pwd
        ls
        ls -l a/tree
        get "a/b/other name" back
        get -R a copies
        rm sent
        cd
        pwd
        exit
        rm -R srv
    """
    out = await cli.ok("ssh", "sftp", "shell", "-a", "shop", stdin=commands)
    lines = out.splitlines()
    assert lines[:4] == ["/", "/srv", "a", "sent"]
    assert lines[4].startswith("-rw")
    assert lines[4].split()[3:] == ["6", lines[4].split()[4], "leaf"]
    assert lines[5:] == ["/"]
    assert (cli.folder / "back").read_text() == "of here\n"
    assert (cli.folder / "copies" / "tree" / "leaf").read_text() == "green\n"
    assert not (disk / "srv" / "sent").exists()
    assert (disk / "srv" / "a" / "b" / "other name").read_text() == "of here\n"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fetch x", "there is no command fetch"),
        ("ls -z", "usage: ls [-l] [PATH...]"),
        ("get nowhere", "No such file"),
        ("get srv", "srv is a folder"),
        ("get srv/held held", "held is there already"),
        ("put missing", "there is no missing here"),
        ("put held srv", "srv/held is there already"),
        ("rm srv", "srv is a folder"),
    ],
    ids=lambda text: text.partition(" ")[0],
)
async def test_what_the_file_shell_cannot_do_it_says_and_ends(
    cli: Cli, made: FakeMachine, disk: Path, line: str, wanted: str
) -> None:
    for folder in (cli.folder, disk / "srv"):
        (folder / "held").write_text("kept\n")
    refused = await cli.refused("ssh", "sftp", "shell", "-a", "shop", stdin=f"{line}\nrm -R srv\n")
    assert wanted in refused
    for folder in (cli.folder, disk / "srv"):
        assert (folder / "held").read_text() == "kept\n"


async def test_files_are_copied_and_listed_one_by_one(cli: Cli, made: FakeMachine, disk: Path) -> None:
    (cli.folder / "sent").write_text("of here\n")
    await cli.ok("ssh", "sftp", "put", "sent", "/srv", "-a", "shop", "--machine", made.id)
    assert await cli.ok("ssh", "sftp", "find", "/srv", "-a", "shop") == "/srv\n/srv/sent\n"
    await cli.ok("ssh", "sftp", "get", "/srv/sent", "back", "-a", "shop")
    assert (cli.folder / "back").read_text() == "of here\n"
    assert "back is there already" in await cli.refused("ssh", "sftp", "get", "/srv/sent", "back", "-a", "shop")
    (disk / "srv" / "sub").mkdir()
    assert "-R copies it" in await cli.refused("ssh", "sftp", "get", "/srv", "-a", "shop")


async def test_sessions_say_which_container_they_are_for(cli: Cli, made: FakeMachine, disk: Path) -> None:
    said = [
        await cli.run("ssh", "console", "-a", "shop", "-C", "id", *more)
        for more in ([], ["--container", "side"], ["--pty"])
    ]
    assert [one.out for one in said][:2] == ["id in 1 with no terminal\n", "id in side with no terminal\n"]
    assert "no terminal" not in said[2].out
    assert {one.code for one in said} == {7}
    refused = await cli.refused("ssh", "console", "-a", "shop", "-C", "id", "--container", "other")
    assert f"machine {made.id} has no container other: it has web, side" in refused


async def test_a_group_is_that_which_deploys_know(cli: Cli, made: FakeMachine, disk: Path) -> None:
    """A machine whose metadata names no group is one of `app`, as in every other command."""
    ended = await cli.run("ssh", "console", "-a", "shop", "-g", "app", "-C", "id")
    assert ended.code == 7
    assert "shop has no machine of worker" in await cli.refused("ssh", "console", "-a", "shop", "-g", "worker")


# -- machine exec, console ------------------------------------------------------------------------------------------


async def test_exec_on_a_terminal_goes_where_exec_goes(cli: Cli, made: FakeMachine, disk: Path) -> None:
    first = await cli.run("m", "exec", made.id, "sh -c 'a b'", "--tty", "-a", "shop", TERM="vt100")
    assert (first.code, first.out.strip()) == (7, "sh -c 'a b' in web with vt100")
    side = await cli.run("m", "exec", made.id, "id", "-t", "--container", "side", "-a", "shop", TERM="vt100")
    assert side.out.strip() == "id in side with vt100"
    assert "--tty: a terminal has no" in await cli.refused("m", "exec", made.id, "id", "-t", "--json", "-a", "shop")


async def test_console_makes_a_machine_for_the_session_and_takes_it_away(
    cli: Cli, made: FakeMachine, disk: Path
) -> None:
    """Config of the machine: fly-toml reference, `console_command`."""
    missing = await cli.refused("console", "-a", "shop")
    assert "shop has no release" in missing
    image = "registry.pantala.test/shop:v1"
    cli.write(
        "fly.toml",
        'app = "shop"\nprimary_region = "iad"\nconsole_command = "bin/repl --all"\n[env]\nA = "1"\n'
        "[http_service]\ninternal_port = 80\n",
    )
    ended = await cli.run("console", "-i", image, "-e", "B=2", "--vm-memory", "512", TERM="vt100")
    assert (ended.code, ended.out.strip()) == (7, "bin/repl --all in 1 with vt100"), ended.err
    (console,) = [machine for machine in cli.agent.machines.values() if machine.id != made.id]
    assert console.state.value == "destroyed"
    config = console.config
    assert config.init is not None
    assert config.init.exec == ["/bin/sleep", "inf"]
    assert (config.image, config.services, config.auto_destroy) == (image, None, True)
    assert config.restart is not None
    assert config.restart.policy == "no"
    assert config.dns is not None
    assert config.dns.skip_registration
    assert (config.metadata or {})["fly_process_group"] == "fly_app_console"
    assert {"A": "1", "B": "2"}.items() <= (config.env or {}).items()
    assert config.guest is not None
    assert config.guest.memory_mb == 512


async def test_console_in_a_machine_that_is_there_makes_none(cli: Cli, made: FakeMachine, disk: Path) -> None:
    ended = await cli.run("console", "-a", "shop", "--machine", made.id, "-C", "id")
    assert (ended.code, ended.out) == (7, "id in 1 with no terminal\n")
    assert len(cli.agent.machines) == 1
    assert "--machine: a machine" in await cli.refused("console", "-a", "shop", "--machine", made.id, "-r", "iad")


async def test_a_token_is_made_listed_and_revoked(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    made = await cli.ok("tokens", "create", "deploy", "-a", "shop", "-n", "ci")
    (row,) = [line for line in (await cli.ok("tokens", "list")).splitlines() if " ci " in line]
    assert row.split()[1:5] == ["ci", "shop", "deploy", "ada@example.com"]
    await cli.ok("apps", "list", FLY_API_TOKEN=made.strip())
    await cli.ok("tokens", "revoke", row.split()[0])
    assert "revoked" in await cli.refused("apps", "list", FLY_API_TOKEN=made.strip())
    assert "token not found" in await cli.refused("tokens", "revoke", row.split()[0])


async def test_a_session_that_is_cut_off_ends_with_a_sentence(cli: Cli, made: FakeMachine, disk: Path) -> None:
    cut = await cli.run("ssh", "console", "-a", "shop", "-C", "drop")
    assert cut.code == 1
    assert f"the connection to {made.id} is lost" in cut.err
    assert "Traceback" not in cut.err
