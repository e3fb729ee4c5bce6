"""`pantala machine`: single machines."""

from __future__ import annotations

from collections.abc import Iterator

import click

from pantala.cli.commands.machine_change import CHANGES
from pantala.cli.commands.machine_inside import INSIDE
from pantala.cli.commands.machine_parts import WAIT_S, named
from pantala.cli.commands.machine_run import RUNS
from pantala.cli.commands.status import checks_summary, size_of
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, resolve_app, run, yes_option
from pantala.wire.machine import Event, Machine, MachineCPU


@click.group()
def machine() -> None:
    """Run, list, start, stop and destroy machines."""


for _command in (*RUNS, *CHANGES, *INSIDE):
    machine.add_command(_command)


@machine.command(name="list")
@app_options
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@json_option
def list_machines(*, app_name: str | None, config_path: str | None, quiet: bool, as_json: bool) -> None:
    """List an app's machines."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            machines = await client.machines(name)
        if as_json:
            emit_json(machines)
        elif quiet:
            for found in machines:
                emit(found.id)
        else:
            rows = [
                (m.id, m.name, m.state, checks_summary(list(m.checks)), m.region, m.private_ip, m.image_ref.tag)
                for m in machines
            ]
            headers = ("ID", "NAME", "STATE", "CHECKS", "REGION", "PRIVATE IP", "IMAGE TAG")
            emit_table(headers, rows, empty=f"{name} has no machines.")

    run(main)


@machine.command()
@click.argument("machine_id")
@app_options
@json_option
def status(*, machine_id: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Show one machine, its checks and events."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                found = await client.machine(name, machine_id)
        if as_json:
            emit_json(found)
            return
        for label, value in (
            ("ID", found.id),
            ("Name", found.name),
            ("State", found.state),
            ("Host", found.host_status),
            ("Isolation", found.isolation or "-"),
            ("Region", found.region),
            ("Version", found.instance_id),
            ("Image", f"{found.image_ref.repository}:{found.image_ref.tag}"),
            ("Private IP", found.private_ip),
            ("Size", size_of(found) or "-"),
            ("CPU", _cpu(found.cpu) if found.cpu else "-"),
        ):
            emit(f"{label:<11} {value}")
        for label, value in _plans(found):
            emit(f"{label:<11} {value}")
        emit("")
        checks = [(check.name, check.status, check.output) for check in found.checks]
        emit_table(("CHECK", "STATUS", "OUTPUT"), checks, empty="No checks.")
        emit("")
        events = [(e.type, e.status, e.source, e.timestamp, _event_note(e)) for e in found.events]
        emit_table(("EVENT", "STATUS", "SOURCE", "AT (MS)", "NOTE"), events, empty="No events.")

    run(main)


def _cpu(cpu: MachineCPU) -> str:
    """What it always has, and how long it may burst at full speed on what it saved."""
    if not cpu.balance and not cpu.throttled and cpu.baseline >= 100:
        return f"{cpu.baseline:g} % of a CPU, its own"
    now = "held back to that now" if cpu.throttled else f"{cpu.balance / 100:.1f} s saved for bursts"
    return f"{cpu.baseline:g} % of a CPU, {now}"


def _action(verb: str, state: str, help_text: str) -> click.Command:
    """start, stop, restart and suspend differ in one word."""

    @click.command(name=verb, help=help_text)
    @click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
    @app_options
    @json_option
    def command(*, machine_ids: tuple[str, ...], app_name: str | None, config_path: str | None, as_json: bool) -> None:
        name = resolve_app(app_name, config_path)

        async def main() -> None:
            async with api() as client:
                for machine_id in machine_ids:
                    with named(name, machine_id):
                        await getattr(client, verb)(name, machine_id)
                    found = await client.machine(name, machine_id)
                    version = found.instance_id
                    await client.wait(name, machine_id, states=[state], timeout_s=WAIT_S, version=version)
                    say(f"Machine {machine_id} is {state}")
                if as_json:
                    emit_json([await client.machine(name, machine_id) for machine_id in machine_ids])

        run(main)

    return command


machine.add_command(_action("start", "started", "Start machines."))
machine.add_command(_action("stop", "stopped", "Stop machines."))
machine.add_command(_action("restart", "started", "Restart machines."))
machine.add_command(_action("suspend", "suspended", "Suspend machines: their memory is kept until the next start."))


@machine.command()
@click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
@app_options
@click.option("--force", is_flag=True, help="Also when it is running.")
@yes_option
@json_option
def destroy(
    *,
    machine_ids: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    force: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Destroy machines."""
    name = resolve_app(app_name, config_path)
    confirm(f"Destroy {', '.join(machine_ids)}?", yes=yes or force)

    async def main() -> None:
        async with api() as client:
            for machine_id in machine_ids:
                with named(name, machine_id):
                    await client.destroy(name, machine_id, force=force)
                say(f"Machine {machine_id} is destroyed")
        if as_json:
            emit_json({"destroyed": machine_ids})

    run(main)


def _plans(found: Machine) -> Iterator[tuple[str, str]]:
    """Why it is awake, when it runs next and how its last runs went, for whom it stands by."""
    if found.hold is not None:
        yield "Held awake", f"until {found.hold.until}: {found.hold.reason}"
    if found.schedule is not None:
        yield "Next run", found.schedule.next_run
        for run in found.schedule.runs:
            yield "Run", f"{run.due_at} {run.outcome}" + (f": {run.reason}" if run.reason else "")
    config = found.config or found.incomplete_config
    if config is not None and config.standbys:
        yield "Standby for", ", ".join(config.standbys)


def _event_note(event: Event) -> str:
    request = event.request
    if request is None:
        return ""
    if request.exit_event is not None:
        return f"exit code {request.exit_event.exit_code}" + (
            ", out of memory" if request.exit_event.oom_killed else ""
        )
    return request.reason or ""
