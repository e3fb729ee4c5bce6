"""SSH into a machine: the real `pantala-init`, a client that is not ours (asyncssh)."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import asyncssh
import pytest
from init_rig import Init

from pantala.drivers import guest
from pantala.testing.poll import until
from pantala.testing.ports import free_port
from pantala.wire.guest import SSH, Start, Started

pytestmark = [pytest.mark.anyio, pytest.mark.root]

SCOPE = "acme/web"
CONNECTIONS_MAX = 32


def _key() -> asyncssh.SSHKey:
    return asyncssh.generate_private_key("ssh-ed25519")


def _text(key: asyncssh.SSHKey, form: str = "private") -> str:
    exported = key.export_private_key() if form == "private" else key.export_public_key()
    return exported.decode().strip()


class Machine:
    def __init__(self, init: Init, port: int, authority: asyncssh.SSHKey, host_key: asyncssh.SSHKey) -> None:
        self.init, self.port, self.authority, self.host_key = init, port, authority, host_key
        self.key = _key()

    def certificate(
        self,
        principals: tuple[str, ...] = (f"root@{SCOPE}",),
        *,
        authority: asyncssh.SSHKey | None = None,
        after: str | int = "-1m",
        before: str | int = "+1h",
        force_command: str | None = None,
        source_address: tuple[str, ...] | None = None,
        permit_pty: bool = True,
        permit_port_forwarding: bool = True,
    ) -> asyncssh.SSHCertificate:
        return (authority or self.authority).generate_user_certificate(
            self.key,
            "ada@example.com",
            principals=list(principals),
            valid_after=after,
            valid_before=before,
            force_command=force_command,
            source_address=list(source_address) if source_address else None,
            permit_pty=permit_pty,
            permit_port_forwarding=permit_port_forwarding,
        )

    @asynccontextmanager
    async def login(
        self, certificate: asyncssh.SSHCertificate | None = None, *, username: str = "root", password: str | None = None
    ) -> AsyncGenerator[asyncssh.SSHClientConnection]:
        keys = [(self.key, certificate or self.certificate())]
        async with asyncssh.connect(
            "127.0.0.1",
            self.port,
            username=username,
            client_keys=keys if password is None else None,
            password=password,
            known_hosts=([self.host_key.convert_to_public()], [], []),
            agent_path=None,
            config=None,
            login_timeout=15,
        ) as connection:
            yield connection


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncGenerator[Machine]:
    init = Init(tmp_path, 1 << 20)
    try:
        authority, host_key, port = _key(), _key(), free_port()
        ssh = SSH(
            listen=f"127.0.0.1:{port}",
            authorities=[_text(_key(), "public"), _text(authority, "public")],
            principals=[SCOPE],
            host_key=_text(host_key),
        )
        app = ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1; done"]
        env = {"PATH": "/usr/bin:/bin", "GREETING": "hello"}
        reply = await guest.call(init.socket, Start(argv=app, env=env, ssh=ssh))
        assert isinstance(reply, Started)
        yield Machine(init, port, authority, host_key)
    finally:
        init.process.kill()
        await init.code()


async def test_a_command_gets_input_environment_and_gives_its_status(machine: Machine) -> None:
    with anyio.fail_after(30):
        async with machine.login() as connection:
            script = "cat; echo $GREETING $USER $FLY_SSH_MACHINE; echo oops >&2; exit 7"
            done = await connection.run(script, input="words\n", env={"FLY_SSH_MACHINE": "1"})
            assert (done.stdout, done.stderr, done.exit_status) == ("words\nhello root 1\n", "oops\n", 7)
            killed = await connection.run("kill -TERM $$")
            assert killed.exit_signal is not None
            assert killed.exit_signal[0] == "TERM"


async def test_a_terminal_has_the_client_s_size_and_follows_it(machine: Machine) -> None:
    with anyio.fail_after(30):
        async with machine.login() as connection:
            async with connection.create_process("sh", term_type="xterm", term_size=(101, 37)) as shell:
                shell.stdin.write("stty size; tty; echo $TERM\n")
                await shell.stdout.readuntil("37 101")
                await shell.stdout.readuntil("/dev/pts/")
                await shell.stdout.readuntil("\nxterm")
                shell.change_terminal_size(90, 40)
                shell.stdin.write("stty size; exit 3\n")
                await shell.stdout.readuntil("40 90")
                await shell.stdout.read()
                assert (await shell.wait()).exit_status == 3


@pytest.mark.parametrize(
    "wrong",
    ["another authority", "ended", "not yet", "another app", "another user", "no scope", "unknown option", "too long"],
)
async def test_a_certificate_that_is_not_for_here_and_now_is_refused(machine: Machine, wrong: str) -> None:
    certificate = {
        "another authority": lambda: machine.certificate(authority=_key()),
        "ended": lambda: machine.certificate(after="-2h", before="-1h"),
        "not yet": lambda: machine.certificate(after="+1h", before="+2h"),
        "another app": lambda: machine.certificate(("root@acme/other",)),
        "another user": lambda: machine.certificate((f"nobody@{SCOPE}",)),
        "no scope": lambda: machine.certificate(("root",)),
        "unknown option": lambda: machine.certificate(source_address=("127.0.0.1/32",)),
        "too long": lambda: machine.certificate(before="+5d"),
    }[wrong]()
    with anyio.fail_after(30), pytest.raises(asyncssh.PermissionDenied):
        async with machine.login(certificate):
            pytest.fail("it was let in")


async def test_keys_without_certificate_and_passwords_are_refused(machine: Machine) -> None:
    with anyio.fail_after(30):
        for how in ({"client_keys": [machine.key]}, {"client_keys": None, "password": "secret"}):
            with pytest.raises(asyncssh.PermissionDenied):
                async with asyncssh.connect(
                    "127.0.0.1", machine.port, username="root", known_hosts=None, agent_path=None, config=None, **how
                ):
                    pytest.fail("it was let in")


async def test_what_a_certificate_does_not_permit_is_refused(machine: Machine) -> None:
    certificate = machine.certificate(force_command="echo only this", permit_pty=False, permit_port_forwarding=False)
    with anyio.fail_after(30):
        async with machine.login(certificate) as connection:
            done = await connection.run("id")
            assert done.stdout == "only this\n"
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.run(term_type="xterm")
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.open_connection("127.0.0.1", machine.port)


async def test_a_session_is_the_user_that_the_certificate_names(machine: Machine) -> None:
    with anyio.fail_after(30):
        certificate = machine.certificate((f"nobody@{SCOPE}",))
        async with machine.login(certificate, username="nobody") as connection:
            done = await connection.run("id -un; id -u")
            assert done.stdout == "nobody\n65534\n"
            async with connection.start_sftp_client() as sftp:
                with pytest.raises(asyncssh.SFTPPermissionDenied):
                    await sftp.open("/etc/shadow")


async def test_files_come_and_go(machine: Machine, tmp_path: Path) -> None:
    sent, back, folder = tmp_path / "sent", tmp_path / "back", tmp_path / "there"
    sent.write_bytes(os.urandom(10_000_000))
    with anyio.fail_after(60):
        async with machine.login() as connection, connection.start_sftp_client() as sftp:
            await sftp.mkdir(str(folder))
            await sftp.put(str(sent), str(folder / "a"))
            await sftp.get(str(folder / "a"), str(back))
            assert back.read_bytes() == sent.read_bytes()
            await sftp.rename(str(folder / "a"), str(folder / "b"))
            await sftp.posix_rename(str(folder / "b"), str(folder / "c"))
            await sftp.chmod(str(folder / "c"), 0o600)
            await connection.run(f"ln -s c {folder}/d")
            assert await sftp.readlink(str(folder / "d")) == "c"
            assert {"c", "d"} == set(await sftp.listdir(str(folder))) - {".", ".."}
            assert (await sftp.stat(str(folder / "c"))).size == 10_000_000
            assert (folder / "c").stat().st_mode & 0o777 == 0o600
            await sftp.remove(str(folder / "c"))
            await sftp.remove(str(folder / "d"))
            await sftp.rmdir(str(folder))
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await sftp.stat(str(folder))
    assert not folder.exists()


async def test_much_goes_both_ways_at_once(machine: Machine) -> None:
    """Input far beyond every queue on the way, through a program that answers while it is still being sent."""
    data = os.urandom(20_000_000)
    with anyio.fail_after(60):
        async with machine.login() as connection:
            done = await connection.run("cat", input=data, encoding=None)
            assert done.stdout == data


async def test_one_connection_runs_any_number_of_programs_one_after_the_other(machine: Machine) -> None:
    with anyio.fail_after(60):
        async with machine.login() as connection:
            for _ in range(40):
                assert (await connection.run("true")).exit_status == 0


async def test_a_program_that_ends_unread_leaves_nobody_waiting(machine: Machine) -> None:
    data = bytes(3_000_000)
    with anyio.fail_after(60):
        async with machine.login() as connection:
            for _ in range(60):
                # Of all that only one byte: before it was sent, the client's own library takes an end for an error.
                done = await connection.run("exec head -c1", input=data, encoding=None)
                assert done.exit_status == 0


async def test_a_port_of_the_machine_is_reached_through_it(machine: Machine) -> None:
    with anyio.fail_after(30):
        async with machine.login() as connection:
            reader, writer = await connection.open_connection("127.0.0.1", machine.port)
            writer.write(b"SSH-2.0-test\r\n")
            assert (await reader.readline()).startswith(b"SSH-2.0-Pantala")
            writer.close()


async def test_what_a_session_runs_ends_with_its_connection(machine: Machine, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with anyio.fail_after(30):
        async with machine.login() as connection:
            await connection.create_process(f"sleep 4711 & echo $$ > {pids}; echo $! >> {pids}; wait")

            async def written() -> int:
                return len(pids.read_text().split()) if pids.exists() else 0

            await until(written, lambda count: count == 2, within_s=10)
            listing = await connection.run("ps -e -o args=")
            assert "sleep 4711" in str(listing.stdout)
        async with machine.login() as connection:

            async def gone() -> bool:
                listing = await connection.run("ps -e -o args=")
                return "sleep 4711" not in str(listing.stdout).splitlines()

            await until(gone, bool, within_s=10)


async def test_so_many_connections_and_no_more(machine: Machine) -> None:
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            ready = anyio.Event()
            answers: list[str] = []

            async def one(number: int) -> None:
                async with machine.login() as connection:
                    done = await connection.run(f"echo {number}")
                    answers.append(str(done.stdout).strip())
                    await ready.wait()

            for number in range(CONNECTIONS_MAX):
                tasks.start_soon(one, number)

            async def answered() -> int:
                return len(answers)

            await until(answered, lambda count: count == CONNECTIONS_MAX, within_s=40)
            assert sorted(map(int, answers)) == list(range(CONNECTIONS_MAX))
            with pytest.raises((asyncssh.Error, OSError)):
                async with machine.login():
                    pytest.fail("it was let in")
            ready.set()
        async with machine.login() as connection:  # there is room again
            assert (await connection.run("true")).exit_status == 0
