"""The CLI as a user runs it, a process of its own, against the real API with fake agents."""

from __future__ import annotations

import json
import re
from collections import Counter

import anyio
import pytest
from commands import Cli

pytestmark = pytest.mark.anyio

IMAGE = "registry.pantala.test/web:v1"
FLY_TOML = f"""
app = "web"
primary_region = "iad"

[build]
image = "{IMAGE}"

[http_service]
internal_port = 8080
"""
SERVICE = {"protocol": "tcp", "internal_port": 8080, "ports": [{"port": 443, "handlers": ["http", "tls"]}]}
"""A version that answers is well at once; one that is not asked has to stay up for seconds first."""


@pytest.fixture
async def web(cli: Cli) -> Cli:
    """An app with a fly.toml and two machines of version 1, which answer over HTTP."""
    await cli.platform.create_app("web")
    cli.write("fly.toml", FLY_TOML)
    release = await cli.platform.http.post("/v1/apps/web/releases", json={"image": IMAGE}, headers=cli.platform.auth)
    metadata = {
        "fly_platform_version": "v2",
        "fly_process_group": "app",
        "fly_release_version": "1",
        "fly_release_id": release.json()["id"],
    }
    for _ in range(2):
        config = {"image": IMAGE, "metadata": metadata, "services": [SERVICE]}
        await cli.platform.create_machine("web", config=config)
    return cli


def ids(cli: Cli) -> list[str]:
    return sorted(m.id for m in cli.agent.machines.values() if m.state.value != "destroyed")


# -- launch and deploy -------------------------------------------------------------------------------------------------


async def test_launch_builds_the_directory_and_deploys_it(cli: Cli) -> None:
    cli.write("Dockerfile", "FROM scratch\nEXPOSE 3000\nCMD serve\n")
    cli.write(".dockerignore", "secret.txt\n")
    cli.write("secret.txt", "x")
    cli.write("app.js", "x")
    ended = await cli.run("launch", "--yes", "--now", "--no-ha")
    assert ended.code == 0, ended.err
    assert ended.out.strip() == "https://shop.apps.pantala.test/"
    assert cli.platform.builder.contexts == [[".dockerignore", "Dockerfile", "app.js", "fly.toml"]]
    assert 'app = "shop"' in (cli.folder / "fly.toml").read_text()
    assert "internal_port = 3000" in (cli.folder / "fly.toml").read_text()
    (machine,) = cli.agent.machines.values()
    assert machine.config.services
    assert machine.config.services[0].internal_port == 3000
    assert "v1 is live" in ended.err


async def test_flags_of_a_build_reach_the_builder(cli: Cli) -> None:
    await cli.platform.create_app("web")
    (cli.folder / "docker").mkdir()
    cli.write("docker/Api", "FROM scratch\n")
    cli.write("fly.toml", 'app = "web"\n[build.args]\nA = "1"\n')
    flags = [
        "--dockerfile",
        "docker/Api",
        "--build-arg",
        "B=2",
        "--build-target",
        "final",
        "--no-cache",
        "--build-only",
    ]
    out = await cli.ok("deploy", *flags)
    assert re.fullmatch(r"registry\.pantala\.test/web:deployment-\w+@sha256:[0-9a-f]{64}\n", out)
    (options,) = cli.platform.builder.options
    assert (options.dockerfile, options.args, options.target, options.no_cache) == (
        "docker/Api",
        {"A": "1", "B": "2"},
        "final",
        True,
    )
    assert cli.agent.machines == {}


async def test_launch_of_a_directory_nobody_knows_makes_nothing(cli: Cli) -> None:
    cli.write("notes.txt", "x")
    assert "cannot tell what" in await cli.refused("launch", "--yes")
    assert await cli.ok("apps", "list", "--quiet") == ""
    assert [path.name for path in cli.folder.iterdir()] == ["notes.txt"]


async def test_launch_takes_another_name_unless_it_was_given(cli: Cli) -> None:
    await cli.platform.create_app("shop")
    cli.write("Dockerfile", "FROM scratch\n")
    assert "shop" in await cli.refused("launch", "--yes", "--name", "shop")
    assert not (cli.folder / "fly.toml").exists()
    ended = await cli.run("launch", "--yes", "--no-deploy")
    assert ended.code == 0, ended.err
    assert "the name shop is taken" in ended.err
    assert re.search(r'app = "shop-\w', (cli.folder / "fly.toml").read_text())


async def test_a_dry_run_says_what_a_deploy_would_do(web: Cli) -> None:
    before = await web.ok("releases", "--json")
    out = await web.ok("deploy", "--dry-run")
    assert all(machine in out for machine in ids(web))
    assert await web.ok("releases", "--json") == before


async def test_a_version_that_exits_is_refused_with_code_and_log(web: Cli) -> None:
    web.agent.exit_at_start = 3
    web.agent.last_words = "no such table: users"
    message = await web.refused("deploy", "--image", "registry.pantala.test/web:v2")
    assert "exited at start with code 3" in message
    assert "no such table: users" in message
    listed = json.loads(await web.ok("releases", "--json"))
    assert listed[0]["status"] == "failed"
    assert "code 3" in listed[0]["reason"]


async def test_an_image_that_is_not_there(web: Cli) -> None:
    web.platform.registry.missing.add("registry.pantala.test/web:none")
    before = [web.agent.machines[machine].instance_id for machine in ids(web)]
    assert "registry.pantala.test/web:none" in await web.refused("deploy", "-i", "registry.pantala.test/web:none")
    assert [web.agent.machines[machine].instance_id for machine in ids(web)] == before


# -- what is there -----------------------------------------------------------------------------------------------------


async def test_status_and_lists(web: Cli) -> None:
    text = await web.ok("status")
    assert "https://web.apps.pantala.test/" in text
    assert all(machine in text for machine in ids(web))
    document = json.loads(await web.ok("status", "--json"))
    assert document["app"]["name"] == "web"
    assert sorted(machine["id"] for machine in document["machines"]) == ids(web)
    assert document["release"]["version"] == 1
    assert sorted((await web.ok("machine", "list", "-q")).split()) == ids(web)
    assert (await web.ok("open")).strip() == "https://web.apps.pantala.test/"
    assert (await web.ok("apps", "list", "-q")).split() == ["web"]
    assert "v1" in await web.ok("releases", "--image")
    one = await web.ok("machine", "status", ids(web)[0])
    assert "started" in one
    assert "launch" in one


async def test_logs_end_without_tail(web: Cli) -> None:
    first, second = ids(web)
    web.agent.say(first, "hello from one")
    web.agent.say(second, "hello from two")
    text = await web.ok("logs", "--no-tail")
    assert "hello from one" in text
    assert "hello from two" in text
    assert "hello from two" not in await web.ok("logs", "-n", "-i", first)
    lines = [json.loads(line) for line in (await web.ok("logs", "-n", "--json")).splitlines()]
    assert {line["message"] for line in lines} >= {"hello from one", "hello from two"}


async def test_a_command_that_is_given_up_leaves_the_others_alone(cli: Cli) -> None:
    await cli.platform.create_app("web")
    with anyio.move_on_after(0.3) as given_up:
        await cli.run("logs", "-a", "web")
    assert given_up.cancelled_caught
    assert [(await cli.ok("apps", "list", "-q")).split() for _ in range(2)] == [["web"]] * 2


# -- machines ----------------------------------------------------------------------------------------------------------


async def test_the_life_of_a_machine(cli: Cli) -> None:
    await cli.platform.create_app("web")
    flags = ["-a", "web", "-e", "A=b=c", "-p", "443:8080/http+tls", "--vm-memory", "512", "-n", "one"]
    made = (await cli.ok("machine", "run", IMAGE, *flags, "--", "serve", "--fast")).strip()
    config = cli.agent.machines[made].config
    assert config.env == {"A": "b=c"}
    assert config.init
    assert config.init.cmd == ["serve", "--fast"]
    assert config.services
    assert [(p.port, p.handlers) for p in config.services[0].ports or []] == [(443, ["http", "tls"])]
    await cli.ok("machine", "stop", made, "-a", "web")
    assert cli.agent.machines[made].state.value == "stopped"
    await cli.ok("machine", "start", made, "-a", "web")
    assert "stop it first" in await cli.refused("machine", "destroy", made, "-a", "web", "--yes")
    assert cli.agent.machines[made].state.value == "started"
    await cli.ok("m", "destroy", made, "-a", "web", "--force")
    assert ids(cli) == []


async def test_scale_counts_and_shows(web: Cli) -> None:
    await web.ok("scale", "count", "3", "-y")
    (row,) = json.loads(await web.ok("scale", "show", "--json"))
    assert (row["process"], row["count"], row["regions"]) == ("app", 3, {"iad": 3})
    await web.ok("scale", "count", "app=1", "-y")
    assert len(ids(web)) == 1


def sizes(web: Cli) -> set[tuple[str | None, int | None, int | None]]:
    guests = [web.agent.machines[machine].config.guest for machine in ids(web)]
    return {(guest.cpu_kind, guest.cpus, guest.memory_mb) for guest in guests if guest is not None}


async def test_sizes_and_memory_scale_apart_and_a_deploy_keeps_them(web: Cli) -> None:
    await web.ok("scale", "memory", "1024", "-y")
    assert sizes(web) == {("shared", 1, 1024)}
    ended = await web.run("scale", "vm", "shared-cpu-2x", "-y")
    assert ended.code == 0, ended.err
    assert "shared-cpu-1x 1024 MB -> shared-cpu-2x 1024 MB" in ended.err
    assert sizes(web) == {("shared", 2, 1024)}
    await web.ok("scale", "vm", "performance-1x", "-y")
    assert sizes(web) == {("performance", 1, 2048)}
    (row,) = json.loads(await web.ok("scale", "show", "--json"))
    assert (row["cpu_kind"], row["cpus"], row["memory_mb"]) == ("performance", 1, 2048)
    assert "performance-1x 2048 MB" in await web.ok("status")
    releases = json.loads(await web.ok("releases", "--json"))
    assert [release["description"] for release in releases[:2]] == ["scale vm", "scale vm"]
    assert [release["status"] for release in releases[:3]] == ["complete"] * 3

    await web.ok("deploy", "--image", "registry.pantala.test/web:v2")
    assert sizes(web) == {("performance", 1, 2048)}
    text = (web.folder / "fly.toml").read_text()
    web.write("fly.toml", f'{text}\n[[vm]]\nsize = "shared-cpu-1x"\n')
    await web.ok("deploy", "--image", "registry.pantala.test/web:v3")
    assert sizes(web) == {("shared", 1, 256)}
    ended = await web.run("scale", "vm", "shared-cpu-2x", "--memory", "768", "-y")
    assert "the next deploy gives machines the size that stands there" in ended.err
    assert sizes(web) == {("shared", 2, 768)}
    assert "Nothing to do" in (await web.run("scale", "memory", "768", "-y")).err


async def test_sleeping_machines_are_resized_without_being_started(web: Cli) -> None:
    asleep = ids(web)[0]
    await web.ok("machine", "stop", asleep)
    await web.ok("scale", "memory", "512", "-y")
    assert sizes(web) == {("shared", 1, 512)}
    assert web.agent.machines[asleep].state.value == "stopped"


async def test_the_sizes_are_told_without_a_platform(cli: Cli) -> None:
    rows = json.loads(await cli.ok("platform", "vm-sizes", "--json", FLY_FLAPS_BASE_URL="http://127.0.0.1:1"))
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == 14
    assert (by_name["shared-cpu-4x"]["cpus"], by_name["shared-cpu-4x"]["memory_mb"]) == (4, 1024)
    assert (by_name["shared-cpu-4x"]["max_memory_mb"], by_name["shared-cpu-4x"]["cpu_baseline"]) == (8192, 0.25)
    assert by_name["performance-16x"]["max_memory_mb"] == 131072
    assert "shared-cpu-1x    1          0.0625  256 MB   2 GB" in await cli.ok("platform", "vm-sizes")


def places(web: Cli) -> dict[str, int]:
    found = [
        m for agent in web.platform.agents.values() for m in agent.machines.values() if m.state.value != "destroyed"
    ]
    return dict(Counter(m.region for m in found))


@pytest.mark.parametrize("flags", [["--region", "iad,lhr"], ["-r", "iad", "-r", "lhr"]], ids=["commas", "repeated"])
async def test_scaling_over_regions_shows_its_plan_and_spreads_evenly(web: Cli, flags: list[str]) -> None:
    await web.platform.add_agent("node-2", region="lhr")
    ended = await web.run("scale", "count", "2", *flags, "--max-per-region", "1", "-y")
    assert ended.code == 0, ended.err
    assert ended.err.startswith("app: 2 in iad -> 1 in iad, 1 in lhr\n  + 1 in lhr\n  - destroy ")
    assert places(web) == {"iad": 1, "lhr": 1}


async def test_regions_are_added_listed_and_removed(web: Cli) -> None:
    await web.platform.add_agent("node-2", region="lhr")
    await web.ok("regions", "add", "lhr", "-y")
    listed = json.loads(await web.ok("regions", "list", "--json"))
    assert [(row["region"], row["machines"]) for row in listed] == [("iad", 2), ("lhr", 1)]
    await web.ok("regions", "remove", "iad", "-y")
    assert places(web) == {"lhr": 1}
    assert "no machine left" in await web.refused("regions", "remove", "lhr", "-y")
    assert "it runs in lhr" in await web.refused("regions", "remove", "nrt", "-y")
    assert "regions with hosts: iad, lhr" in await web.refused("regions", "add", "syd", "-y")


async def test_a_scaling_that_fails_half_way_leaves_what_was_there(web: Cli) -> None:
    small = await web.platform.add_agent("node-2", region="lhr", memory_mib=300)
    assert await web.refused("scale", "count", "4", "--region", "iad,lhr", "-y")
    assert places(web) == {"iad": 2}
    assert all(m.state.value == "destroyed" for m in small.machines.values())


async def test_secrets_are_written_and_never_shown(web: Cli) -> None:
    before = {machine: web.agent.machines[machine].instance_id for machine in ids(web)}
    await web.ok("secrets", "set", "KEY=s3cret=value", "PIPED=-", stdin="from a pipe")
    assert web.agent.secrets_of("web") == {"KEY": "s3cret=value", "PIPED": "from a pipe"}
    assert all(web.agent.machines[machine].instance_id != version for machine, version in before.items())
    listed = await web.ok("secrets", "list")
    assert "KEY" in listed
    assert "s3cret" not in listed
    await web.ok("secrets", "unset", "KEY", "--stage")
    assert [secret["name"] for secret in json.loads(await web.ok("secrets", "list", "--json"))] == ["PIPED"]


# -- who we are --------------------------------------------------------------------------------------------------------


async def test_log_in_and_who_am_i(cli: Cli) -> None:
    (cli.config_dir / "config.json").unlink()
    assert "pantala auth login" in await cli.refused("auth", "whoami")
    out = await cli.ok("auth", "login", "--api", cli.url, stdin=f"{cli.platform.token}\n")
    assert out.strip() == "ada@example.com"
    file = cli.config_dir / "config.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert (await cli.ok("auth", "token")).strip() == cli.platform.token
    assert json.loads(await cli.ok("auth", "whoami", "--json"))["email"] == "ada@example.com"
    await cli.refused("auth", "login", "--api", cli.url, "-t", "wrong")
    assert (await cli.ok("auth", "token")).strip() == cli.platform.token, "a wrong token replaced the right one"
    await cli.ok("auth", "logout")
    assert not file.exists()


async def test_the_variable_wins_over_the_file(cli: Cli) -> None:
    cli.log_in("wrong")
    assert "token" in (await cli.refused("apps", "list")).lower()
    assert await cli.ok("apps", "list", FLY_API_TOKEN=cli.platform.token) == ""
    assert (await cli.ok("auth", "token", FLY_API_TOKEN="mine")).strip() == "mine"


async def test_a_deploy_token_manages_its_app_alone(web: Cli) -> None:
    await web.platform.create_app("other")
    token = (await web.ok("tokens", "create", "deploy", "-a", "web")).strip()
    assert (await web.ok("machine", "list", "-q", FLY_API_TOKEN=token)).split()
    await web.refused("machine", "list", "-a", "other", FLY_API_TOKEN=token)


async def test_another_orgs_app_is_not_there(web: Cli) -> None:
    other = (await web.platform.admin("eve@example.com", "evil"))["authorization"].removeprefix("Bearer ")
    for arguments in (
        ["status", "-a", "web"],
        ["secrets", "set", "A=b", "-a", "web"],
        ["apps", "destroy", "web", "--yes"],
        ["logs", "-n", "-a", "web"],
        ["deploy"],
    ):
        assert "web" in await web.refused(*arguments, FLY_API_TOKEN=other)
    assert len(ids(web)) == 2
    assert web.agent.secrets_of("web") == {}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["machine", "run", IMAGE, "-p", "eighty"], "--port"),
        (["machine", "run", IMAGE, "-p", "70000/http"], "port"),
        (["machine", "run", IMAGE, "-e", "NOVALUE"], "--env"),
        (["machine", "run", IMAGE, "--vm-memory", "much"], "--vm-memory"),
        (["machine", "run", IMAGE, "--vm-memory", "1000000"], "memory"),
        (["machine", "run", IMAGE, "-r", "nowhere"], "region"),
        (["machine", "start", "0000000000"], "machine"),
        (["machine", "destroy", "0000000000", "-y"], "machine"),
        (["scale", "count", "many"], "COUNT"),
        (["scale", "count", "-r", "nowhere", "5", "-y"], "region"),
        (["scale", "count", "worker=2", "-y"], "worker"),
        (["scale", "vm", "huge", "-y"], "invalid machine preset requested, 'huge'"),
        (["scale", "vm", "shared-cpu-3x", "-y"], "'shared-cpu-3x' is an invalid machine size, choose one of: [shared"),
        (["scale", "vm", "a100-40gb", "-y"], "GPU"),
        (["scale", "vm", "shared-cpu-1x", "--memory", "4096", "-y"], "4096MiB of memory is too high"),
        (["scale", "vm", "shared-cpu-1x", "-g", "worker", "-y"], "No active machines in process group 'worker'"),
        (["scale", "memory", "300", "-y"], "300MiB of memory is not valid"),
        (["scale", "memory", "65536", "-y"], "For shared VMs with 1 CPUs, 65536MiB of memory is too high"),
        (["scale", "memory", "lots"], "MB"),
        (["secrets", "set", "novalue"], "NAME"),
        (["secrets", "set", "1A=b"], "NAME"),
        (["secrets", "set"], "NAME=VALUE"),
        (["deploy", "--strategy", "canary"], "strategy"),
        (["deploy", "--wait-timeout", "soon"], "--wait-timeout"),
        (["deploy", "-e", "x"], "--env"),
        (["deploy", "--max-unavailable", "-1"], "deploy.max_unavailable"),
        (["deploy", "--max-unavailable", "0"], "deploy.max_unavailable"),
        (["deploy", "--max-unavailable", "nan"], "deploy.max_unavailable"),
        (["apps", "create", "Bad_Name"], "app_name"),
        (["apps", "create", "web"], "web"),
        (["apps", "create"], "NAME"),
        (["status", "-a", "nothing"], "nothing"),
        (["statsu"], "Did you mean status?"),
        (["status", "-c", "missing.toml"], "missing.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_bad_input_names_the_field_and_changes_nothing(web: Cli, arguments: list[str], said: str) -> None:
    before = {machine: web.agent.machines[machine].instance_id for machine in ids(web)}
    assert said in await web.refused(*arguments)
    assert {machine: web.agent.machines[machine].instance_id for machine in ids(web)} == before
    listed = await web.platform.http.get("/v1/apps/web/releases", headers=web.platform.auth)
    assert len(listed.json()["releases"]) == 1


@pytest.mark.parametrize("arguments", [["apps", "destroy", "web"], ["scale", "count", "4"], ["launch"]])
async def test_without_a_terminal_nothing_is_asked(web: Cli, arguments: list[str]) -> None:
    assert "--yes" in await web.refused(*arguments)
    assert len(ids(web)) == 2


async def test_an_api_that_does_not_answer(cli: Cli) -> None:
    message = await cli.refused("apps", "list", FLY_FLAPS_BASE_URL="http://127.0.0.1:1")
    assert "http://127.0.0.1:1" in message


# -- fly.toml ----------------------------------------------------------------------------------------------------------


async def test_config_is_validated_with_line_and_nearest_name(cli: Cli) -> None:
    cli.write("fly.toml", 'app = "web"\nprimary_regoin = "iad"\n')
    ended = await cli.run("config", "validate")
    assert ended.code == 0
    assert "fly.toml:2" in ended.err
    assert "primary_region" in ended.err
    assert (await cli.run("config", "validate", "--strict")).code == 1
    document = json.loads((await cli.run("config", "validate", "--strict", "--json")).out)
    assert document["valid"] is False
    cli.write("fly.toml", 'app = "web"\n[http_service]\ninternal_port = 80800\n')
    ended = await cli.run("config", "validate")
    assert ended.code == 1
    assert "internal_port" in ended.err
    assert "internal_port" in await cli.refused("deploy")
    cli.write("fly.toml", 'app = "web\n')
    assert "fly.toml" in (await cli.run("config", "validate")).err


async def test_help_is_there_for_every_command(cli: Cli) -> None:
    from pantala.cli.main import COMMANDS

    text = await cli.ok("--help")
    assert all(name in text for name in COMMANDS)
    assert "pantala" in await cli.ok("--version")
