"""`pantala machine`: what a machine runs, who holds it, what happens inside; `pantala secrets keys`."""

from __future__ import annotations

import base64
import json

import pytest
from commands import Cli

from pantala.testing.fake_agent import FakeMachine
from pantala.wire import node as wire
from pantala.wire.escape import EscapeSuite
from pantala.wire.machine import Isolation, Progress

pytestmark = pytest.mark.anyio


@pytest.fixture
async def made(cli: Cli) -> FakeMachine:
    await cli.platform.create_app("shop")
    config = {"image": "registry.pantala.test/shop:v1", "env": {"A": "1"}}
    made = await cli.platform.create_machine("shop", config=config)
    return cli.agent.machines[made["id"]]


async def test_exec_gives_on_output_and_exit_code(cli: Cli, made: FakeMachine) -> None:
    cli.agent.executed = wire.ExecResult(
        exit_code=3, signal=0, stdout_base64=base64.b64encode(b"out\n").decode(), stderr_base64="ZXJyCg=="
    )
    ended = await cli.run("m", "exec", made.id, "sh -c 'cat; exit 3'", "--stdin", "-a", "shop", stdin="typed")
    assert (ended.code, ended.out, ended.err) == (3, "out\n", "err\n")
    call = cli.agent.calls[-1]
    assert isinstance(call, wire.ExecMachine)
    assert call.argv == ["sh", "-c", "cat; exit 3"]
    assert base64.b64decode(call.stdin_base64) == b"typed"


async def test_suspend_wait_signal(cli: Cli, made: FakeMachine) -> None:
    await cli.ok("m", "signal", made.id, "hup", "-a", "shop")
    await cli.ok("m", "kill", made.id, "-a", "shop")
    assert made.signals == [1, 9]
    await cli.ok("m", "suspend", made.id, "-a", "shop")
    await cli.ok("m", "wait", made.id, "--state", "suspended", "--timeout", "1", "-a", "shop")
    refused = await cli.refused("m", "wait", "00000000000000", "-a", "shop")
    assert "machine 00000000000000 not found in the app shop" in refused


async def test_update_adds_and_keeps_the_rest(cli: Cli, made: FakeMachine) -> None:
    first = made.instance_id
    await cli.ok("m", "update", made.id, "-e", "B=2", "-m", "role=web", "--vm-memory", "512mb", "--yes", "-a", "shop")
    assert made.config.env == {"A": "1", "B": "2"}
    assert made.config.metadata == {"role": "web"}
    assert made.config.guest is not None
    assert made.config.guest.memory_mb == 512
    listed = json.loads(await cli.ok("m", "versions", made.id, "--json", "-a", "shop"))
    assert [version["version"] for version in listed] == [made.instance_id, first]
    await cli.refused("m", "update", made.id, "-e", "B=3", "-a", "shop")
    assert made.config.env == {"A": "1", "B": "2"}


async def test_clone_runs_one_more_like_it(cli: Cli, made: FakeMachine) -> None:
    other = (await cli.ok("m", "clone", made.id, "--name", "second", "-a", "shop")).strip()
    clone = cli.agent.machines[other]
    assert (clone.name, clone.config.env, clone.region) == ("second", {"A": "1"}, made.region)


async def test_cordon_and_leases(cli: Cli, made: FakeMachine) -> None:
    await cli.ok("m", "cordon", made.id, "-a", "shop")
    assert made.cordoned
    await cli.ok("m", "uncordon", made.id, "-a", "shop")
    assert not made.cordoned
    path = f"/v1/apps/shop/machines/{made.id}/lease"
    await cli.platform.http.post(path, json={"ttl": 60, "description": "a deploy"}, headers=cli.platform.auth)
    (held,) = json.loads(await cli.ok("m", "leases", "view", "--json", "-a", "shop"))
    assert (held["machine_id"], held["lease"]["description"]) == (made.id, "a deploy")
    assert "lease currently held by" in await cli.refused("m", "cordon", made.id, "-a", "shop")
    await cli.ok("m", "leases", "clear", made.id, "--yes", "-a", "shop")
    assert json.loads(await cli.ok("m", "leases", "view", "--json", "-a", "shop")) == []


async def test_place_shows_where_machines_would_go(cli: Cli) -> None:
    placed = json.loads(await cli.ok("m", "place", "--region", "iad", "--count", "3", "--json"))
    assert placed == [{"region": "iad", "count": 3, "concurrency": 1}]


async def test_secret_keys(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    await cli.ok("secrets", "keys", "generate", "nacl_sign", "releases", "-a", "shop")
    value = base64.b64encode(b"k" * 32).decode()
    await cli.ok("secrets", "keys", "set", "hs256", "hooks", "-a", "shop", stdin=value)
    listed = json.loads(await cli.ok("secrets", "keys", "list", "--json", "-a", "shop"))
    assert [(key["name"], key["type"]) for key in listed] == [("hooks", "hs256"), ("releases", "nacl_sign")]
    await cli.ok("secrets", "keys", "delete", "hooks", "--yes", "-a", "shop")
    assert len(json.loads(await cli.ok("secrets", "keys", "list", "--json", "-a", "shop"))) == 1


async def test_run_and_create_take_the_flags_of_flyctl(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    image = "registry.pantala.test/shop:v1"
    ended = await cli.run_many(
        ["m", "run", image, "-a", "shop", "--schedule", "0 4 * * * Europe/Berlin", "--vm-size", "shared-cpu-2x"],
        ["m", "create", image, "-a", "shop", "-m", "role=web", "--vm-cpus", "2", "--entrypoint", "sh -c", "--", "exit"],
        ["m", "run", image, "-a", "shop", "--schedule", "@daily"],
        ["m", "run", image, "-a", "shop", "--vm-size", "shared-cpu-2x", "--vm-cpus", "4"],
    )
    assert [one.code for one in ended] == [0, 0, 1, 1], ended
    scheduled, left = (cli.agent.machines[one.out.strip()] for one in ended[:2])
    assert scheduled.config.schedule == "0 4 * * * Europe/Berlin"
    assert scheduled.config.restart is None  # what has an end is not started again and again
    assert scheduled.config.guest is not None
    assert (scheduled.config.guest.cpus, scheduled.config.guest.memory_mb) == (2, 512)
    assert left.state.value == "created"  # its image is not fetched here
    assert left.config.init is not None
    assert (left.config.init.entrypoint, left.config.init.cmd) == (["sh", "-c"], ["exit"])
    assert left.config.metadata == {"role": "web"}
    assert "config.schedule" in ended[2].err
    assert "--vm-size" in ended[3].err
    (unplanned,) = await cli.run_many(["m", "update", scheduled.id, "--schedule", "", "--yes", "-a", "shop"])
    assert unplanned.code == 0, unplanned.err
    assert scheduled.config.schedule is None


async def test_status_tells_what_isolates_a_machine_and_why_it_is_awake(cli: Cli, made: FakeMachine) -> None:
    apart = Isolation(
        driver="container",
        boundary="namespaces",
        kernel="the host's",
        seccomp="sha256:1234",
        capabilities=["CAP_CHOWN"],
        user_mapping="0-65535 -> 70000-135535",
        no_new_privileges=True,
        runtime="crun version 1.8.1",
        escape_suite=EscapeSuite(
            ran_at="2026-01-01T00:00:00.000Z",
            version="0.1.0",
            attempts=4,
            held=2,
            not_applicable=1,
            through=["mount-proc"],
            unclear=[],
            outdated=["runtime"],
        ),
    )
    progress = Progress(since="2026-01-01T00:00:00.000Z", asked_by="user", waits_for="its image", stuck_at="later")
    because = ["min_machines_running keeps 1 awake, and 1 are"]
    cli.agent.details[made.id] = {"isolation_details": apart, "progress": progress, "awake_because": because}
    app = ["-a", "shop"]
    status, awake, short, nobody = await cli.run_many(
        ["m", "status", made.id, "--display-config", *app],
        ["why-awake", "--json", *app],
        ["why-awake", *app],
        ["why-awake", "00000000000000", *app],
    )
    for text in (
        "node-1 (ok)", "kernel: the host's", "sha256:1234", "CAP_CHOWN", "70000-135535", '"A": "1"',
        made.image.digest, "asked for by user, its image; stuck", because[0], "crun version 1.8.1",
        "mount-proc got through, 2 attempts held; 1 not applicable; OUT OF DATE, changed since: runtime",
    ):  # fmt: skip
        assert text in status.out, status.out
    assert json.loads(awake.out) == [{"id": made.id, "state": "started", "group": "app", "because": because}]
    assert because[0] in short.out
    assert nobody.code == 1


async def test_ports_files_and_sizes_are_spelt_as_flyctl_spells_them(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    (cli.folder / "motd").write_text("hello")
    (cli.folder / "config.json").write_text(json.dumps({"env": {"A": "1"}, "guest": {"cpus": 2, "memory_mb": 1024}}))
    image, app = "registry.pantala.test/shop:v1", ["-a", "shop"]
    ended = await cli.run_many(
        ["m", "run", image, *app, "-p", "80:8080/tcp:http,443:8080/tcp:http:tls", "-p", "6000-6002:7000/tcp"],
        ["m", "run", image, *app, "-p", "443:8080/http+tls", "--autostop=suspend", "--restart", "on-failure"],
        ["m", "run", "--autostop", image, *app, "-p", "5432/tcp:pg_tls", "--memory", "1gb", "--rootfs-size", "2"],
        ["m", "run", image, *app, "--machine-config", "config.json", "--file-local", "/etc/motd=motd", "-e", "B=2",
         "--file-literal", "/etc/word=a=b", "--file-secret", "/etc/key=KEY"],
        ["m", "run", *app],
        ["m", "run", image, *app, "-p", "80:1:2/tcp"],
        ["m", "run", image, *app, "--file-local", "etc=motd"],
        ["m", "run", image, *app, "--file-local", "/etc/motd=missing"],
        ["m", "run", image, *app, "--machine-config", "{"],
        ["m", "run", image, *app, "--vm-memory", "1tb"],
    )  # fmt: skip
    assert [one.code for one in ended] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2], ended
    ports, old, small, whole = (cli.agent.machines[one.out.strip()].config for one in ended[:4])
    assert [
        (s.internal_port, s.protocol, [(p.port, p.start_port, p.end_port, p.handlers) for p in s.ports or []])
        for s in ports.services or []
    ] == [
        (8080, "tcp", [(80, None, None, ["http"]), (443, None, None, ["http", "tls"])]),
        (7000, "tcp", [(None, 6000, 6002, [])]),
    ]
    (service,) = old.services or []
    assert (service.autostop, [p.handlers for p in service.ports or []]) == ("suspend", [["http", "tls"]])
    assert old.restart is not None
    assert old.restart.policy == "on-failure"
    (service,) = small.services or []
    assert (service.autostop, service.internal_port) == ("stop", 5432)
    assert small.guest is not None
    assert small.rootfs is not None
    assert (small.guest.memory_mb, small.rootfs.size_gb) == (1024, 2)
    assert whole.guest is not None
    assert (whole.env, whole.guest.cpus, whole.guest.memory_mb) == ({"A": "1", "B": "2"}, 2, 1024)
    assert [(file.guest_path, file.raw_value, file.secret_name) for file in whole.files or []] == [
        ("/etc/motd", base64.b64encode(b"hello").decode(), None),
        ("/etc/word", base64.b64encode(b"a=b").decode(), None),
        ("/etc/key", None, "KEY"),
    ]
    flags = ["IMAGE", "--port", "--file-local", "--file-local", "--machine-config", "--vm-memory"]
    assert [flag for flag, one in zip(flags, ended[4:], strict=True) if flag not in one.err] == []


async def test_stop_and_restart_say_how(cli: Cli, made: FakeMachine) -> None:
    app = ["-a", "shop"]
    ended = await cli.run_many(
        ["m", "stop", made.id, *app, "--signal", "term", "--timeout", "7"],
        ["m", "start", made.id, *app],
        ["m", "restart", made.id, *app, "-s", "SIGQUIT", "--time", "3", "--force-stop"],
    )
    assert [one.code for one in ended] == [0, 0, 0], ended
    stop, restart = (c for c in cli.agent.calls if isinstance(c, wire.StopMachine | wire.RestartMachine))
    assert (stop.signal, stop.timeout_s) == ("SIGTERM", 7)
    assert isinstance(restart, wire.RestartMachine)
    assert (restart.signal, restart.timeout_s, restart.force_stop) == ("SIGQUIT", 3, True)


async def test_destroy_asks_nothing_and_spares_what_runs(cli: Cli, made: FakeMachine) -> None:
    """As flyctl: scripts call it without `--yes`."""
    app = ["-a", "shop"]
    ended = await cli.run_many(
        ["m", "rm", made.id, *app],
        ["m", "stop", made.id, *app],
        ["m", "remove", made.id, *app],
        ["m", "ls", "--json", *app],
        ["m", "lits", *app],
    )
    assert [one.code for one in ended] == [1, 0, 0, 0, 2], ended
    assert "--force" in ended[0].err
    assert json.loads(ended[3].out) == []
    assert "Did you mean list?" in ended[4].err


async def test_list_has_the_columns_of_flyctl(cli: Cli, made: FakeMachine) -> None:
    head, row = (await cli.ok("m", "list", "-a", "shop")).splitlines()
    for title, cell in (("STATE", "started"), ("REGION", made.region), ("IMAGE", "shop:v1"), ("VOLUME", "-")):
        assert title in head
        assert cell in row
    assert " fdaa:" in row


async def test_who_holds_a_machine_is_said_with_what_to_do(cli: Cli, made: FakeMachine) -> None:
    path = f"/v1/apps/shop/machines/{made.id}/lease"
    await cli.platform.http.post(path, json={"ttl": 60}, headers=cli.platform.auth)
    refused = await cli.refused("m", "stop", made.id, "-a", "shop")
    assert f"machine {made.id}: lease currently held by" in refused
    assert "leases clear" in refused


async def test_a_token_is_told_with_the_id_that_revokes_it(cli: Cli, made: FakeMachine) -> None:
    token = json.loads(await cli.ok("tokens", "create", "deploy", "-a", "shop", "--json"))
    await cli.ok("tokens", "revoke", token["id"])
    refused = await cli.run("m", "list", "-a", "shop", FLY_API_TOKEN=token["token"])
    assert refused.code == 1
