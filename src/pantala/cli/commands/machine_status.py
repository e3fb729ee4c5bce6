"""`pantala machine status` and `pantala why-awake`: one machine, what keeps it apart, what it does and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import click
import msgspec

from pantala.cli.commands.machine_parts import named
from pantala.cli.commands.status import size_of
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, json_option, resolve_app, run
from pantala.wire.escape import EscapeSuite
from pantala.wire.machine import Event, Isolation, Machine, MachineCPU


@click.command()
@click.argument("machine_id")
@app_options
@click.option("-d", "--display-config", is_flag=True, help="Also what isolates it, and its config.")
@json_option
def status(
    *, machine_id: str, app_name: str | None, config_path: str | None, display_config: bool, as_json: bool
) -> None:
    """Show one machine: state, size, isolation, checks, events."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                found = await client.machine(name, machine_id)
        if as_json:
            emit_json(found)
            return
        for label, value in (*_about(found), *_plans(found)):
            emit(f"{label:<11} {value}")
        emit("")
        checks = [(check.name, check.status, check.output) for check in found.checks]
        emit_table(("CHECK", "STATUS", "OUTPUT"), checks, empty="No checks.")
        emit("")
        events = [(e.type, e.status, e.source, _moment(e.timestamp), _event_note(e)) for e in found.events]
        emit_table(("EVENT", "STATUS", "SOURCE", "AT", "NOTE"), events, empty="No events.")
        if display_config:
            emit("")
            for label, value in _isolation(found.isolation_details):
                emit(f"{label:<15} {value}")
            emit("\nConfig:")
            emit(json.dumps(msgspec.to_builtins(found.config or found.incomplete_config), indent=2))

    run(main)


@click.command(name="why-awake")
@click.argument("machine_ids", nargs=-1, metavar="[ID...]")
@app_options
@json_option
def why_awake(*, machine_ids: tuple[str, ...], app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Say why these machines of an app (default: all that run) are not put to sleep."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            wanted = machine_ids or [one.id for one in await client.machines(name) if one.state == "started"]
            found: list[Machine] = []
            for machine_id in wanted:
                with named(name, machine_id):
                    found.append(await client.machine(name, machine_id))
        told = [
            {"id": one.id, "state": one.state, "group": _group(one), "because": one.awake_because or []}
            for one in found
        ]
        if as_json:
            emit_json(told)
            return
        rows = [(one.id, one.state, _group(one), "; ".join(_because(one))) for one in found]
        emit_table(("MACHINE", "STATE", "GROUP", "BECAUSE"), rows, empty=f"No machine of {name} is awake.")

    run(main)


def _because(one: Machine) -> list[str]:
    if one.awake_because:
        return one.awake_because
    if one.host_status != "ok":
        return ["its host does not answer"]
    return [] if one.state == "started" else ["it is not awake"]


def _group(one: Machine) -> str:
    from pantala.planner.deploy import group_of

    return group_of(one)


def _about(found: Machine) -> Iterator[tuple[str, str]]:
    image = found.image_ref
    yield "ID", found.id
    yield "Name", found.name
    yield "State", found.state + (" (cordoned)" if found.cordoned else "")
    if found.progress is not None:
        now = found.progress
        waits = f", {now.waits_for}" if now.waits_for else ""
        yield (
            "On its way",
            f"since {now.since}, asked for by {now.asked_by}{waits}; stuck if it lasts to {now.stuck_at}",
        )
    yield "Host", f"{found.node or '-'} ({found.host_status})"
    yield "Isolation", _isolated(found)
    yield "Region", found.region
    yield "Version", found.instance_id
    yield "Image", f"{image.repository}:{image.tag}" if image.tag else image.repository
    if image.digest:
        yield "Digest", image.digest
    yield "Private IP", found.private_ip
    yield "Size", size_of(found) or "-"
    yield "CPU", _cpu(found.cpu) if found.cpu else "-"


def _isolated(found: Machine) -> str:
    """The driver's word, and whose kernel it runs on."""
    details = found.isolation_details
    word = found.isolation or "-"
    return f"{word}; kernel: {details.kernel}" if details is not None and details.kernel else word


def _isolation(details: Isolation | None) -> Iterator[tuple[str, str]]:
    if details is None:
        say("Its host does not say what isolates it.")
        return
    yield "Driver", details.driver
    yield "Boundary", details.boundary
    yield "Kernel", details.kernel or "-"
    yield "Seccomp filter", details.seccomp or "-"
    yield "Capabilities", ", ".join(details.capabilities) or "none"
    yield "User mapping", details.user_mapping or "-"
    yield "New privileges", "never" if details.no_new_privileges else "by set-user-id programs"
    yield "Runtime", details.runtime or "-"
    yield "Init", details.init or "-"
    yield "Escape suite", escape_line(details.escape_suite)


def escape_line(suite: EscapeSuite | None) -> str:
    """When, with what outcome, and whether that still speaks of what machines are made with now."""
    if suite is None:
        return "never run on this host (pantala host escape-suite)"
    got = f"{', '.join(suite.through)} got through, " if suite.through else ""
    got += f"{suite.held} attempts held"
    unclear = f"; unclear: {', '.join(suite.unclear)}" if suite.unclear else ""
    apart = f"; {suite.not_applicable} not applicable" if suite.not_applicable else ""
    stale = f"; OUT OF DATE, changed since: {', '.join(suite.outdated)}" if suite.outdated else ""
    return f"{suite.ran_at} (pantala {suite.version}): {got}{unclear}{apart}{stale}"


def _plans(found: Machine) -> Iterator[tuple[str, str]]:
    """Why it is awake, when it runs next and how its last runs went, for whom it stands by."""
    for why in found.awake_because or []:
        yield "Awake", why
    if found.schedule is not None:
        yield "Next run", found.schedule.next_run
        for run in found.schedule.runs:
            yield "Run", f"{run.due_at} {run.outcome}" + (f": {run.reason}" if run.reason else "")
    config = found.config or found.incomplete_config
    if config is not None and config.standbys:
        yield "Standby for", ", ".join(config.standbys)
    for container in found.containers or []:
        health = f", {container.health}" if container.health else ""
        yield "Container", f"{container.name} {container.state}{health}, restarted {container.restarts} times"


def _cpu(cpu: MachineCPU) -> str:
    """What it always has, and how long it may burst at full speed on what it saved."""
    if not cpu.balance and not cpu.throttled and cpu.baseline >= 100:
        return f"{cpu.baseline:g} % of a CPU, its own"
    now = "held back to that now" if cpu.throttled else f"{cpu.balance / 100:.1f} s saved for bursts"
    return f"{cpu.baseline:g} % of a CPU, {now}"


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event_note(event: Event) -> str:
    request = event.request
    if request is None:
        return ""
    if request.exit_event is None:
        return request.reason or ""
    ended = request.exit_event
    reason = request.reason or f"exited with code {ended.exit_code}"
    note = reason + (", out of memory" if ended.oom_killed else "")
    note += ", stop was asked for" if ended.requested_stop else ""
    return note + (f"; restart {request.restart_count}" if ended.restarting and request.restart_count else "")
