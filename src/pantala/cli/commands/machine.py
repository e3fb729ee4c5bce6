"""`pantala machine`: single machines."""

from __future__ import annotations

import click

from pantala.cli.commands.machine_change import CHANGES
from pantala.cli.commands.machine_inside import INSIDE
from pantala.cli.commands.machine_parts import WAIT_S, named
from pantala.cli.commands.machine_run import RUNS
from pantala.cli.commands.machine_status import status
from pantala.cli.commands.status import checks_summary
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, resolve_app, run, yes_option


@click.group()
def machine() -> None:
    """Run, list, start, stop and destroy machines."""


for _command in (status, *RUNS, *CHANGES, *INSIDE):
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
