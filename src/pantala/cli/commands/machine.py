"""`pantala machine`: single machines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click

from pantala.cli.commands.machine_change import CHANGES
from pantala.cli.commands.machine_inside import INSIDE
from pantala.cli.commands.machine_parts import WAIT_S, in_seconds, named, signal_name, signal_option, timeout_option
from pantala.cli.commands.machine_run import RUNS
from pantala.cli.commands.machine_status import status
from pantala.cli.commands.status import checks_summary, size_of
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, json_option, resolve_app, run
from pantala.errors import WrongState
from pantala.wire.machine import Machine

if TYPE_CHECKING:
    from pantala.client.api import ApiClient

    Act = Callable[[ApiClient, str], Awaitable[None]]


@click.group(cls=CommandGroup)
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
            headers = ("ID", "NAME", "STATE", "CHECKS", "REGION", "IMAGE", "IP ADDRESS", "VOLUME", "GROUP", "SIZE")
            rows = [_row(one) for one in machines]
            emit_table(headers, rows, empty=f"{name} has no machines.")

    run(main)


def _row(one: Machine) -> tuple[str | None, ...]:
    from pantala.planner.deploy import group_of

    reachable, image = one.host_status == "ok", one.image_ref
    config = one.config or one.incomplete_config
    mounts = (config.mounts if config else None) or []
    return (
        one.id,
        one.name,
        one.state + (" (cordoned)" if one.cordoned else "") + ("" if reachable else f" (host {one.host_status})"),
        checks_summary(list(one.checks)),
        one.region,
        f"{image.repository}:{image.tag}" if image.tag else image.repository,
        one.private_ip,
        ", ".join(mount.volume or mount.name or "" for mount in mounts),
        group_of(one),
        size_of(one),
    )


async def _each(app: str, machine_ids: tuple[str, ...], state: str, act: Act, *, as_json: bool) -> None:
    """Do it to one after the other, each until it is in `state`."""
    async with api() as client:
        for machine_id in machine_ids:
            with named(app, machine_id):
                await act(client, machine_id)
            found = await client.machine(app, machine_id)
            await client.wait(app, machine_id, states=[state], timeout_s=WAIT_S, version=found.instance_id)
            say(f"Machine {machine_id} is {state}")
        if as_json:
            emit_json([await client.machine(app, machine_id) for machine_id in machine_ids])


def _action(verb: str, state: str, help_text: str) -> click.Command:
    """start and suspend differ in one word."""

    @click.command(name=verb, help=help_text)
    @click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
    @app_options
    @json_option
    def command(*, machine_ids: tuple[str, ...], app_name: str | None, config_path: str | None, as_json: bool) -> None:
        name = resolve_app(app_name, config_path)

        async def act(client: ApiClient, machine_id: str) -> None:
            await getattr(client, verb)(name, machine_id)

        run(lambda: _each(name, machine_ids, state, act, as_json=as_json))

    return command


machine.add_command(_action("start", "started", "Start machines."))
machine.add_command(_action("suspend", "suspended", "Suspend machines: their memory is kept until the next start."))


@machine.command()
@click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
@app_options
@signal_option
@timeout_option
@json_option
def stop(
    *,
    machine_ids: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    signal: str | None,
    timeout: int | None,
    as_json: bool,
) -> None:
    """Stop machines; they are not started again until somebody asks."""
    name = resolve_app(app_name, config_path)

    async def act(client: ApiClient, machine_id: str) -> None:
        await client.stop(name, machine_id, signal=signal_name(signal), timeout=in_seconds(timeout))

    run(lambda: _each(name, machine_ids, "stopped", act, as_json=as_json))


@machine.command()
@click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
@app_options
@signal_option
@timeout_option
@click.option("--force-stop", is_flag=True, help="Kill it at once.")
@json_option
def restart(
    *,
    machine_ids: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    signal: str | None,
    timeout: int | None,
    force_stop: bool,
    as_json: bool,
) -> None:
    """Restart machines."""
    name = resolve_app(app_name, config_path)

    async def act(client: ApiClient, machine_id: str) -> None:
        given, seconds = signal_name(signal), in_seconds(timeout)
        await client.restart(name, machine_id, signal=given, timeout=seconds, force_stop=force_stop)

    run(lambda: _each(name, machine_ids, "started", act, as_json=as_json))


@machine.command()
@click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
@app_options
@click.option("-f", "--force", is_flag=True, help="Also when it is running.")
@click.option("-y", "--yes", is_flag=True, hidden=True, help="Nothing is asked: what runs needs --force.")
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
    """Destroy machines that do not run."""
    del yes
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            for machine_id in machine_ids:
                with named(name, machine_id):
                    try:
                        await client.destroy(name, machine_id, force=force)
                    except WrongState as error:
                        raise WrongState(f"machine {machine_id}: {error.message}", hint="--force kills it") from error
                    await client.wait(name, machine_id, states=["destroyed"], timeout_s=WAIT_S)
                say(f"Machine {machine_id} is destroyed")
        if as_json:
            emit_json({"destroyed": machine_ids})

    run(main)
