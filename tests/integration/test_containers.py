"""Several containers in one machine: the real init in a real root each, by the container driver."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager

import anyio
import asyncssh
import msgspec
import pytest
from containers_rig import MACHINE, WITHIN_S
from containers_rig import ContainersRig as Rig

from pantala.errors import DriverError
from pantala.testing.driver_harness import ContainerHarness, container_harness
from pantala.testing.poll import until
from pantala.wire.guest import SSH, ContainerState, Exec
from pantala.wire.machine import (
    Container,
    ContainerMount,
    Dependency,
    ExecHealth,
    File,
    Healthcheck,
    HTTPHealth,
    Restart,
    StopConfig,
    TCPHealth,
    TempDir,
    Volume,
)

pytestmark = [pytest.mark.anyio, pytest.mark.root]

STAYS = "trap 'echo bye; exit 0' INT; echo up; while :; do sleep 0.02; done"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHarness]:
    with container_harness(tmp_path_factory.mktemp("c")) as made:
        subprocess.run(["nsenter", f"--net={made.netns}", "ip", "link", "set", "lo", "up"], check=True)
        yield made


@pytest.fixture
async def rig(harness: ContainerHarness) -> AsyncIterator[Rig]:
    made = Rig(harness)
    yield made
    await made.driver.destroy(MACHINE)
    assert harness.leftovers(MACHINE) == []


def shell(name: str, script: str, **more: object) -> Container:
    return msgspec.structs.replace(Container(name=name, image="a", exec=["sh", "-c", script]), **more)


def check(name: str = "up", **more: object) -> Healthcheck:
    return msgspec.structs.replace(Healthcheck(name=name, interval=1, timeout=5), **more)


async def test_web_waits_for_a_migration_and_a_healthy_sidecar_and_all_stop_in_reverse(rig: Rig) -> None:
    port = 8080
    sidecar = (
        f"trap 'echo bye; exit 0' INT; echo up; (sleep 0.4; httpd -f -p {port} -h /www) & while :; do sleep 0.02; done"
    )
    await rig.start(
        shell(
            "web",
            STAYS,
            depends_on=[
                Dependency(name="migrate", condition="exited_successfully"),
                Dependency(name="sidecar", condition="healthy"),
            ],
        ),
        shell("migrate", "echo migrated", depends_on=[Dependency(name="sidecar")]),
        shell(
            "sidecar",
            sidecar,
            healthchecks=[
                check(http=HTTPHealth(port=port, path="/index.html")),
                check("port", tcp=TCPHealth(port=port)),
            ],
        ),
    )
    said = await rig.until_said("web | up")
    assert said.index("migrate | migrated") < said.index("web | up")
    healthy = next(line for line in said if "container sidecar check up passes: HTTP/1.1 200" in line)
    assert said.index(healthy) < said.index("web | up")
    assert (await rig.state("sidecar")).health == "healthy"
    assert await rig.state("migrate") == ContainerState(name="migrate", state="stopped", exit_code=0)
    ended = await rig.stop()
    assert ended.exit is not None
    assert (ended.exit.exit_code, ended.exit.requested_stop) == (0, True)
    said = await rig.lines()
    assert said.index("web | bye") < said.index("sidecar | bye")


async def test_files_and_users_are_each_images_own_and_volumes_are_shared(rig: Rig) -> None:
    both = [ContainerMount(name="disk", path="/var/cache"), ContainerMount(name="fast", path="/deep/er/fast")]
    await rig.start(
        shell("one", "echo x > /own; echo up; sleep 1000", mounts=both),
        shell(
            "two",
            'echo "$(id -un) $TOKEN $NAMED $WHO $HOME"; sleep 1000',
            image="b",
            mounts=[*both, ContainerMount(name="files", path="/ro")],
            env={"TOKEN": "own"},
            secrets=[],
            files=[
                File(guest_path="/conf/a", raw_value=base64.b64encode(b"text").decode(), mode=0o640),
                File(guest_path="/conf/b", secret_name="FILE"),
            ],
        ),
        volumes=[
            Volume(name="disk", temp_dir=TempDir(storage_type="disk")),
            Volume(name="fast", temp_dir=TempDir(storage_type="memory", size_mb=1)),
            Volume(name="files", image="a"),
        ],
    )
    await rig.until_said("one | up", "two | keeper own   /")
    assert (
        await rig.run("ls /own; cat /only-b 2>&1 || true", "one")
        == "/own\ncat: can't open '/only-b': No such file or directory"
    )
    assert await rig.run("cat /only-b; test -e /own || echo none", "two") == "b\nnone"
    assert await rig.run("cat /conf/a /conf/b; stat -c %a /conf/a", "two") == "textof a secret640"
    await rig.run("echo shared > /var/cache/x; echo fast > /deep/er/fast/y", "one")
    assert await rig.run("cat /kept/x /deep/er/fast/y", "two") == "shared\nfast"
    assert await rig.run("cat /ro/www/index.html", "two") == "hello from a machine"
    assert "Read-only" in await rig.run("touch /ro/x 2>&1 || true", "two")
    assert (await rig.exec("head -c 2000000 /dev/zero > /deep/er/fast/z", "one")).exit_code != 0
    # What the platform puts into every root: its names, its devices, its own view of processes.
    for name in ("one", "two"):
        assert "172.19.0.2" in await rig.run("cat /etc/hosts", name)
        assert await rig.run("echo x > /dev/null; ls -l /dev/fd | sed 's/.*-> //'; cat /proc/1/comm", name) == (
            "/proc/self/fd\ninit"
        )
        assert await rig.run("test -S /.fly/api && echo api", name) == "api"
        assert (await rig.exec("cat /proc/kcore; echo 1 > /proc/sys/kernel/hostname", name)).exit_code != 0
    with pytest.raises(DriverError, match='no container "three"'):
        await rig.exec("true", "three")


async def test_a_command_of_the_machine_is_not_one_of_its_first_container(rig: Rig) -> None:
    await rig.start(shell("one", "touch /own; echo up; sleep 1000"), image="b")
    await rig.until_said("one | up")
    assert await rig.run("ls /own") == "/own"
    done = await rig.driver.exec(MACHINE, Exec(argv=["sh", "-c", "cat /only-b; ls /own; id -u"], machine=True))
    assert base64.b64decode(done.stdout_base64) == b"b\n0\n"
    seen = await rig.driver.exec(MACHINE, Exec(argv=["env"], machine=True))
    assert b"FLY_MACHINE_ID=m1\n" in base64.b64decode(seen.stdout_base64)


async def test_sessions_are_in_the_container_that_they_name(rig: Rig) -> None:
    signer, host_key, key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(3))
    port = 2222  # in a network of its own
    certificate = signer.generate_user_certificate(
        key, "ada", principals=["root@acme/app", "keeper@acme/app"], valid_after="-1m", valid_before="+1h"
    )
    ssh = SSH(
        listen=f"127.0.0.1:{port}",
        authorities=[signer.export_public_key().decode().strip()],
        principals=["acme/app"],
        host_key=host_key.export_private_key().decode(),
    )
    two = Container(name="two", image="b", exec=["sh", "-c", "echo two up; sleep 1000"], env={"WHICH": "2"})
    await rig.start(shell("one", "touch /own; echo one up; sleep 1000"), two, ssh=ssh)
    await rig.until_said("one | one up", "two | two up")

    def connect(user: str) -> AbstractAsyncContextManager[asyncssh.SSHClientConnection]:
        return asyncssh.connect(
            "machine",
            username=user,
            client_keys=[(key, certificate)],
            known_hosts=None,
            agent_path=None,
            config=None,
            proxy_command=["nsenter", f"--net={rig.harness.netns}", "busybox", "nc", "127.0.0.1", str(port)],
        )

    in_one, in_two = {"FLY_SSH_CONTAINER": "one"}, {"FLY_SSH_CONTAINER": "two"}
    with anyio.fail_after(60):
        async with connect("root") as connection:
            script = "ls -d /own /only-b 2>/dev/null; echo $WHICH $FLY_MACHINE_ID"
            done = [await connection.run(script, env=env) for env in ({"FLY_SSH_MACHINE": "1"}, in_one, in_two)]
            assert [one.stdout for one in done] == ["m1\n", "/own\nm1\n", "/only-b\n2 m1\n"]
            typed = await connection.run("tty; id -un", env=in_two, term_type="xterm")
            assert str(typed.stdout).split() == ["/dev/pts/0", "root"]
            nowhere = await connection.run("true", env={"FLY_SSH_CONTAINER": "three"})
            assert (nowhere.exit_status, nowhere.stderr) == (126, "this machine has no container three\r\n")
            async with connection.start_sftp_client(env=in_two) as files:
                assert await files.exists("/only-b")
                async with files.open("/left", "w") as file:
                    await file.write("by sftp\n")
            assert await rig.run("cat /left", "two") == "by sftp"
            # After a session in a container the server is in the machine's root again.
            again = await connection.run("ls -d /only-b || ls -d /.pantala/containers")
            assert again.stdout == "/.pantala/containers\n"
        async with connect("keeper") as connection:  # an account of that container only
            assert (await connection.run("id -u", env=in_two)).stdout == "1234\n"
            assert (await connection.run("id -u", env=in_one)).exit_status == 126


async def test_a_crash_restarts_only_its_container_and_a_policy_ends_it(rig: Rig) -> None:
    await rig.start(
        shell("stays", STAYS),
        shell("crashes", "sleep 0.1; exit 3"),
        shell("gives-up", "exit 4", restart=Restart(policy="on-failure", max_retries=1)),
        shell("once", "exit 0", restart=Restart(policy="no")),
    )
    before = await rig.state("stays")
    crashes = await until(lambda: rig.state("crashes"), lambda state: state.restarts >= 2, within_s=WITHIN_S)
    assert crashes.exit_code == 3
    assert await rig.until_state("gives-up", state="stopped") == ContainerState(
        name="gives-up", state="stopped", exit_code=4, restarts=1
    )
    assert (await rig.state("once")).state == "stopped"
    assert await rig.state("stays") == before
    ended = await rig.stop()
    assert ended.exit is not None
    assert ended.exit.exit_code == 4
    assert "container gives-up exited with code 4" in ended.exit.reason


async def test_liveness_stops_and_the_policy_starts_again(rig: Rig) -> None:
    turns = "test -e /ill && rm /ill || touch /ill"
    sick = f"echo begins; {turns}; trap 'echo asked; exit 0' TERM; while :; do sleep 0.02; done"
    alive = check(
        exec=ExecHealth(command=["test", "!", "-e", "/ill"]), failure_threshold=1, kind="liveness", unhealthy="stop"
    )
    told = check("told", exec=ExecHealth(command=["sh", "-c", "echo why; exit 1"]), failure_threshold=1)
    await rig.start(
        shell(
            "sick", sick, healthchecks=[alive], stop=StopConfig(signal="SIGTERM"), restart=Restart(policy="on-failure")
        ),
        shell("watched", "sleep 1000", healthchecks=[told]),
    )
    again = await rig.until_state("sick", restarts=1, health="healthy")
    assert again.exit_code == 0
    said = await rig.lines()
    assert said.count("sick | begins") == 2
    assert "sick | asked" in said
    watched = await rig.until_state("watched", health="unhealthy")
    assert (watched.state, watched.checks[0].output, watched.checks[0].passing) == ("started", "why", False)


async def test_the_machine_ends_when_all_have(rig: Rig) -> None:
    no = Restart(policy="no")
    await rig.start(shell("a", "exit 0", restart=no), shell("b", "sleep 0.2; exit 6", restart=no))
    ended = await rig.driver.wait(MACHINE)
    assert ended.exit is not None
    assert (ended.exit.exit_code, ended.exit.requested_stop) == (6, False)


async def test_what_can_never_start_ends_the_machine(rig: Rig) -> None:
    mounts = [ContainerMount(name="v", path="/v")]
    await rig.start(
        shell("web", "echo never", depends_on=[Dependency(name="migrate", condition="exited_successfully")]),
        shell(
            "migrate", "until test -e /v/up; do sleep 0.02; done; exit 5", restart=Restart(policy="no"), mounts=mounts
        ),
        shell("stays", STAYS.replace("echo up", "touch /v/up"), mounts=mounts),
        volumes=[Volume(name="v", temp_dir=TempDir(storage_type="disk"))],
    )
    ended = await rig.driver.wait(MACHINE)
    assert ended.exit is not None
    assert (ended.exit.exit_code, "migrate, which it depends on, exited with code 5" in ended.exit.reason) == (5, True)
    said = await rig.lines()
    assert "stays | bye" in said
    assert "web | never" not in said


async def test_a_command_that_is_not_there_refuses_the_machine(rig: Rig) -> None:
    with pytest.raises(DriverError, match=r'container two: the command "nothing" was not found') as refused:
        await rig.start(shell("one", "sleep 1000"), shell("two", "", exec=["nothing"]))
    assert refused.value.guest_fault
    ended = await rig.driver.wait(MACHINE)
    assert ended.exit is not None
    assert ended.exit.exit_code == 127


async def test_one_that_does_not_heed_is_killed_after_its_own_grace(rig: Rig) -> None:
    stubborn = "trap '' INT; echo up; while :; do sleep 0.02; done"
    await rig.start(
        shell("stubborn", stubborn, stop=StopConfig(timeout="300ms"), depends_on=[Dependency(name="base")]),
        shell("base", STAYS),
    )
    await rig.until_said("stubborn | up", "base | up")
    ended = await rig.stop()
    assert ended.exit is not None
    assert (ended.exit.exit_code, ended.exit.signal) == (137, 9)
    assert "base | bye" in await rig.lines()


async def test_links_of_an_image_lead_nowhere_out_of_the_machine(rig: Rig) -> None:
    """What stands where the platform mounts is the image's to say; it must not choose what of the host is mounted."""
    image = shutil.copytree(rig.b.layers[0], rig.harness.base / "links", symlinks=True)
    (image / ".fly").symlink_to("/etc")
    rig.b = msgspec.structs.replace(rig.b, layers=(image,))
    await rig.start(shell("one", "sleep 1000", image="b"))
    assert await rig.run("cut -d: -f1 /.fly/passwd /etc/passwd") == "root\nkeeper\nroot\nkeeper"
