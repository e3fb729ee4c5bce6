"""The host commands of the CLI: up, down, box, doctor, images, audit. Loaded by name, because they need all of it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from pantala.box import audit as auditing
from pantala.box.at import run_at
from pantala.box.layout import APP_DOMAIN, EDGE_ADDRESS, REGISTRY_NAME, RUN_NAME, Box, LinkKind, load_box
from pantala.box.network_commands import add_network_commands
from pantala.box.up import down as bring_down
from pantala.box.up import is_running
from pantala.box.up import up as bring_up
from pantala.cli.context import Config, forget_config, load_config, save_config
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import json_option
from pantala.errors import InternalError, InvalidRequest, NotFound
from pantala.host.commands import buckets_option, cpus_option, memory_option
from pantala.host.settings import promised, read_buckets
from pantala.host.supervisor import Held, read_held, read_status, replace_running, write_held
from pantala.images.bootstrap import RECIPES, BaseCache, recipe_for

STOPPED_WITHIN_S = 60.0
STATE = Path("/var/lib") / RUN_NAME
RUN = Path("/run") / RUN_NAME

state_option = click.option(
    "--state", type=click.Path(path_type=Path), default=None, metavar="DIR", help=f"The box's state; default {STATE}."
)


def default_cache() -> Path:
    """Bases and build caches: shared by boxes, safe to delete."""
    given = os.environ.get("PANTALA_CACHE_DIR")
    return Path(given) if given else Path("/var/cache/pantala")


@click.command()
@click.option("--regions", default="", metavar="CODE[,CODE]",
              help="A host in each; default those that the box had, or iad.")  # fmt: skip
@click.option("--idle-window", "idle_window_s", default=60.0, show_default=True, metavar="SECONDS",
              help="Idle machines with auto stop are stopped after this.")  # fmt: skip
@click.option("--email", default="admin@pantala.test", show_default=True)
@click.option("-o", "--org", default="personal", show_default=True)
@click.option("--links", "links_kind", type=click.Choice(["plain", "wireguard"]), default="plain", show_default=True,
              help="How the private network goes from host to host.")  # fmt: skip
@click.option("--distances", is_flag=True, help="Packets between regions take as long as on Earth.")
@click.option("--bfd", "bfd_ms", type=click.IntRange(0, 5000), default=0, metavar="MS",
              help="How often edges are greeted; a dead one is left after three times that. Default by the number of"
              " regions.")  # fmt: skip
@cpus_option
@memory_option
@buckets_option
@click.option("--settings", "tuning", multiple=True, hidden=True, metavar="PART.FIELD=JSON",
              help="Settings of agent, proxy, mesh or server, for tests that have no time.")  # fmt: skip
@state_option
@json_option
def up(
    *,
    regions: str,
    idle_window_s: float,
    email: str,
    org: str,
    links_kind: LinkKind,
    distances: bool,
    bfd_ms: int,
    cpus: int | None,
    memory_mib: int | None,
    buckets: Path | None,
    tuning: tuple[str, ...],
    state: Path | None,
    as_json: bool,
) -> None:
    """Start a platform in a box on this machine, and log in to it."""
    if idle_window_s <= 0:
        raise InvalidRequest("must be above 0 seconds", field="--idle-window")
    chosen = {f"proxy.{name}": msgspec.json.encode(value).decode() for name, value in read_buckets(buckets).items()}
    chosen |= {f"agent.{name}": str(value) for name, value in promised(cpus, memory_mib).items()}
    started = bring_up(
        state=state or STATE,
        run=RUN,
        cache=default_cache(),
        regions=[code.strip() for code in regions.split(",") if code.strip()],
        idle_window_s=idle_window_s,
        tuning=chosen | {name: value for name, _, value in (text.partition("=") for text in tuning)},
        links_kind=links_kind,
        distances=distances,
        bfd_ms=bfd_ms,
        email=email,
        org=org,
        say=say,
    )
    config = Config(
        api_url=started.box.api_url,
        token=started.token,
        org=started.org,
        app_domain=APP_DOMAIN,
        edge=EDGE_ADDRESS,
        ca_file=started.ca_file,
        box_state=started.box.state,
    )
    save_config(config)
    if as_json:
        emit_json({"api_url": config.api_url, "edge": EDGE_ADDRESS, "ca_file": config.ca_file, "org": config.org})
    else:
        say(f"\nYou are logged in as {email}, organisation {org}. In a project's directory: pantala launch")


@click.command()
@state_option
@click.option("--purge", is_flag=True, help="Also remove the box's state: apps, secrets, images.")
@json_option
def down(*, state: Path | None, purge: bool, as_json: bool) -> None:
    """Stop the box; its state stays for the next `up`."""
    folder = _state(state)
    bring_down(state=folder, say=say, purge=purge)
    if load_config().box_state in ("", str(folder.resolve())):
        forget_config()
    left = auditing.leaks(None)
    for line in left:
        say(f"left behind: {line}")
    if as_json:
        emit_json({"left_behind": left})
    if left:
        sys.exit(1)
    say("==> The box is down")


@click.group()
def box() -> None:
    """Look into the box."""


@box.command(context_settings={"ignore_unknown_options": True})
@click.argument("region")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
@state_option
def at(*, region: str, command: tuple[str, ...], state: Path | None) -> None:
    """Run CMD as a client whose nearest edge is REGION's."""
    known = _running(state)
    ca_file = Path(load_config().ca_file or known.ca_file)
    sys.exit(run_at(known, region, ca_file, list(command)))


@box.command()
@state_option
@json_option
def status(*, state: Path | None, as_json: bool) -> None:
    """The box's processes."""
    known = _running(state)
    seen = read_status(known.state_dir)
    processes = seen.processes if seen else []
    if as_json:
        emit_json({"box": known, "processes": processes})
    else:
        rows = [(p.name, p.state, p.pid, p.restarts) for p in processes]
        emit_table(("NAME", "STATE", "PID", "RESTARTS"), rows, empty="No process runs.")


@box.command()
@click.argument("names", nargs=-1, required=True, metavar="PROCESS|HOST...")
@click.option("--kill", is_flag=True, help="By SIGKILL, as in a crash.")
@state_option
@json_option
def stop(*, names: tuple[str, ...], kill: bool, state: Path | None, as_json: bool) -> None:
    """Keep processes of the box down (all of a host's, for a host) until `box start`. Machines go on."""
    known = _running(state)
    wanted = _processes(known, names)
    held = read_held(known.state_dir)
    write_held(known.state_dir, Held(names=sorted({*held.names, *wanted}), kill=kill))
    _until(known, wanted, stopped=True)
    if as_json:
        emit_json({"stopped": wanted})


@box.command()
@click.argument("names", nargs=-1, metavar="[PROCESS|HOST...]")
@state_option
@json_option
def start(*, names: tuple[str, ...], state: Path | None, as_json: bool) -> None:
    """Let processes run again that `box stop` keeps down; without names all of them."""
    known = _running(state)
    held = read_held(known.state_dir)
    wanted = _processes(known, names) if names else held.names
    write_held(known.state_dir, Held(names=[name for name in held.names if name not in wanted]))
    _until(known, wanted, stopped=False)
    if as_json:
        emit_json({"started": wanted})


@box.command()
@click.argument("names", nargs=-1, required=True, metavar="PROCESS...")
@state_option
@json_option
def replace(*, names: tuple[str, ...], state: Path | None, as_json: bool) -> None:
    """Put new processes in the place of running proxies; no request is lost, the old ones end when they are empty."""
    known = _running(state)
    wanted = _processes(known, names)
    replace_running(known.state_dir, wanted)
    if as_json:
        emit_json({"replaced": wanted})


def _processes(known: Box, names: Sequence[str]) -> list[str]:
    """Process names; a host stands for all of its own."""
    seen = read_status(known.state_dir)
    there = [process.name for process in seen.processes] if seen else []
    found: list[str] = []
    for name in names:
        mine = [name] if name in there else [process for process in there if process.endswith(f"-{name}")]
        if not mine:
            raise NotFound(f"this box has no process or host {name}", hint=f"it has {', '.join(there)}")
        found += mine
    return found


def _until(known: Box, names: Sequence[str], *, stopped: bool) -> None:
    deadline, left = time.monotonic() + STOPPED_WITHIN_S, list(names)
    while time.monotonic() < deadline:
        seen = read_status(known.state_dir)
        states = {process.name: process.state for process in seen.processes} if seen else {}
        left = [name for name in names if states.get(name) != ("stopped" if stopped else "ready")]
        if not left:
            return
        time.sleep(0.05)
    raise InternalError(f"{', '.join(left)} did not {'stop' if stopped else 'start'}; see `pantala box status`")


@click.command()
@state_option
@json_option
def doctor(*, state: Path | None, as_json: bool) -> None:
    """Check what this machine can do and what is wrong."""
    from pantala.box.doctor import examine

    findings = examine(load_box(_state(state)))
    if as_json:
        emit_json(findings)
    else:
        for finding in findings:
            emit(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.detail}")
            if not finding.ok and finding.remedy:
                emit(f"      {finding.remedy}")
    sys.exit(0 if all(finding.ok or not finding.needed for finding in findings) else 1)


@click.group()
def images() -> None:
    """Base images for places without a container registry."""


@images.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@state_option
@json_option
def bootstrap(*, names: tuple[str, ...], state: Path | None, as_json: bool) -> None:
    """Make base images from Debian packages (all, or those named) and give them to the box."""
    import anyio

    from pantala.box.up import push_bases

    wanted = tuple(recipe_for(name).name for name in names) or tuple(recipe.name for recipe in RECIPES)
    known = load_box(_state(state))
    if known is not None and is_running(known):
        anyio.run(push_bases, known, say, wanted)
    else:
        cache = BaseCache(default_cache() / "bases")
        for name in wanted:
            cache.make(recipe_for(name), say=say)
        say(f"==> {len(wanted)} base(s) are in {default_cache() / 'bases'}; `pantala up` gives them to {REGISTRY_NAME}")
    if as_json:
        emit_json({"made": wanted})


@images.command(name="list")
@json_option
def list_images(*, as_json: bool) -> None:
    """Bases that can be made, and whether they are."""
    made = {recipe.name for recipe in BaseCache(default_cache() / "bases").made()}
    rows = [{"name": recipe.name, "tags": list(recipe.tags), "made": recipe.name in made} for recipe in RECIPES]
    if as_json:
        emit_json(rows)
    else:
        emit_table(
            ("NAME", "TAGS", "MADE"),
            [(recipe.name, ", ".join(recipe.tags), "yes" if recipe.name in made else "") for recipe in RECIPES],
            empty="",
        )


@click.group()
def audit() -> None:
    """Find what belongs to nobody."""


@audit.command()
@state_option
@json_option
def leaks(*, state: Path | None, as_json: bool) -> None:
    """Processes, namespaces, mounts, control groups and files that belong to no machine and no box."""
    folder = _state(state)
    known = load_box(folder)
    if known is not None and is_running(known):
        from pantala.box.running_audit import leaks_of_running

        found = leaks_of_running(known)
    else:
        found = auditing.leaks(known)
    if as_json:
        emit_json(found)
    else:
        for line in found:
            emit(line)
        say(f"{len(found)} leak(s)" if found else "Nothing is left behind.")
    sys.exit(1 if found else 0)


def _state(given: Path | None) -> Path:
    """The state given, that of the box we are logged in to, or the default one."""
    if given:
        return given
    return Path(load_config().box_state or STATE)


def _running(state: Path | None) -> Box:
    known = load_box(_state(state))
    if known is None or not is_running(known):
        raise NotFound("no box runs here", hint="`pantala up` starts one")
    return known


add_network_commands(box, _running)
