"""`pantala machine update|clone|cordon|uncordon|wait|versions|leases|place`, one by one, as flyctl spells them."""

from __future__ import annotations

import time

import click

from pantala.cli.commands.machine_options import PORT_HELP, Size, file_options, files, services, with_files
from pantala.cli.commands.machine_parts import WAIT_S, named
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, pairs, resolve_app, run, yes_option
from pantala.errors import InvalidRequest, NotFound

STATES = ("created", "started", "stopped", "suspended", "destroyed", "failed", "settled")


@click.command()
@click.argument("machine_id", metavar="ID")
@app_options
@click.option("-i", "--image", metavar="IMAGE")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Added to what it has.")
@click.option("-m", "--metadata", multiple=True, metavar="NAME=VALUE", help="Added to what it has.")
@click.option("-C", "--command", metavar="COMMAND", help="What it runs instead of the image's command.")
@click.option("-p", "--port", "ports", multiple=True, metavar="PORT:INTERNAL/PROTOCOL:HANDLERS", help=PORT_HELP)
@file_options
@click.option("--vm-memory", "--memory", type=Size(), metavar="SIZE", help="512, 512mb, 1gb.")
@click.option("--vm-cpus", "--cpus", type=int, metavar="N")
@click.option("--vm-size", metavar="SIZE", help="A preset such as shared-cpu-2x.")
@click.option(
    "--rootfs-persist",
    type=click.Choice(["never", "restart", "always"]),
    default=None,
    help="Whether its root disk outlives restarts, or updates too.",
)
@click.option("--restart", type=click.Choice(["no", "always", "on-failure", "on-fail"]), default=None)
@click.option("--schedule", metavar="WHEN", help="hourly, daily, weekly, monthly, cron fields; '' for none any more.")
@click.option("--skip-start", is_flag=True, help="Leave it stopped.")
@yes_option
@json_option
def update(
    *,
    machine_id: str,
    app_name: str | None,
    config_path: str | None,
    image: str | None,
    env: tuple[str, ...],
    metadata: tuple[str, ...],
    command: str | None,
    ports: tuple[str, ...],
    file_local: tuple[str, ...],
    file_literal: tuple[str, ...],
    file_secret: tuple[str, ...],
    rootfs_persist: str | None,
    vm_memory: int | None,
    vm_cpus: int | None,
    vm_size: str | None,
    restart: str | None,
    schedule: str | None,
    skip_start: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Give a machine another image, size or environment; one that runs is restarted."""
    import shlex

    from msgspec.structs import replace

    from pantala.domain import guests
    from pantala.wire.api import LaunchMachineRequest
    from pantala.wire.machine import Guest, Init, Restart, RootFS

    if vm_size and (vm_memory or vm_cpus):
        raise InvalidRequest("give it, or --vm-memory and --vm-cpus", field="--vm-size")
    preset = guests.preset(vm_size, field="--vm-size") if vm_size else None
    given_files = files(local=file_local, literal=file_literal, secret=file_secret)
    name = resolve_app(app_name, config_path)
    confirm(f"Update machine {machine_id}?", yes=yes)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                found = await client.machine(name, machine_id)
            config = found.config
            if config is None:
                raise InvalidRequest(f"the host of machine {machine_id} does not answer", field=machine_id)
            config = replace(
                config,
                image=image or config.image,
                env={**(config.env or {}), **pairs(env, "--env")} or None,
                metadata={**(config.metadata or {}), **pairs(metadata, "--metadata")} or None,
            )
            if command:
                config = replace(config, init=replace(config.init or Init(), cmd=shlex.split(command)))
            if ports:
                config = replace(config, services=services(ports, config.services or []) or None)
            if given_files:
                config = replace(config, files=with_files(config.files or [], given_files))
            if rootfs_persist:
                # The one that newer clients have; two that differ are refused.
                known = replace(config.guest, persist_rootfs=None) if config.guest else None
                rootfs = replace(config.rootfs or RootFS(), persist=rootfs_persist)
                config = replace(config, guest=known, rootfs=rootfs)
            if preset is not None:
                # Of a guest only its size: what it says besides, such as whether its root is kept, stays.
                guest = replace(
                    config.guest or Guest(), cpu_kind=preset.cpu_kind, cpus=preset.cpus, memory_mb=preset.memory_mb
                )
                config = replace(config, size=None, guest=guest)
            elif vm_memory or vm_cpus:
                guest = config.guest or Guest()
                guest = replace(guest, memory_mb=vm_memory or guest.memory_mb, cpus=vm_cpus or guest.cpus)
                config = replace(config, guest=guest)
            if restart:
                policy = {"on-fail": "on-failure"}.get(restart, restart)
                config = replace(config, restart=replace(config.restart or Restart(), policy=policy))
            if schedule is not None:
                config = replace(config, schedule=schedule or None)
            request = LaunchMachineRequest(config=config, skip_launch=skip_start, current_version=found.instance_id)
            made = await client.update_machine(name, machine_id, request)
            await client.wait(name, machine_id, states=["settled"], timeout_s=WAIT_S, version=made.instance_id)
            made = await client.machine(name, machine_id)
        if as_json:
            emit_json(made)
        else:
            say(f"Machine {machine_id} is {made.state} at version {made.instance_id}")

    run(main)


@click.command()
@click.argument("machine_id", metavar="ID")
@app_options
@click.option("-r", "--region", metavar="CODE", help="Where; that of the original by default.")
@click.option("-n", "--name", "new_name", metavar="NAME")
@json_option
def clone(
    *,
    machine_id: str,
    app_name: str | None,
    config_path: str | None,
    region: str | None,
    new_name: str | None,
    as_json: bool,
) -> None:
    """Run one more machine like this one."""
    from msgspec.structs import replace

    from pantala.wire.api import LaunchMachineRequest

    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                found = await client.machine(name, machine_id)
            if found.config is None:
                raise InvalidRequest(f"the host of machine {machine_id} does not answer", field=machine_id)
            config = replace(found.config, standbys=None)
            request = LaunchMachineRequest(config=config, region=region or found.region, name=new_name)
            made = await client.create_machine(name, request)
            say(f"Machine {made.id} is created in {made.region}; waiting for it to start")
            await client.wait(name, made.id, states=["started"], timeout_s=WAIT_S, version=made.instance_id)
            made = await client.machine(name, made.id)
        if as_json:
            emit_json(made)
        else:
            emit(made.id)

    run(main)


def _routing(verb: str, done: str, help_text: str) -> click.Command:
    """cordon and uncordon differ in two words."""

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
                    say(f"Machine {machine_id} {done}")
                if as_json:
                    emit_json([await client.machine(name, machine_id) for machine_id in machine_ids])

        run(main)

    return command


@click.command()
@click.argument("machine_id", metavar="ID")
@app_options
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="One of these; started by default.")
@click.option("--timeout", type=click.IntRange(1, WAIT_S), default=WAIT_S, show_default=True, metavar="SECONDS")
@json_option
def wait(
    *,
    machine_id: str,
    app_name: str | None,
    config_path: str | None,
    states: tuple[str, ...],
    timeout: int,
    as_json: bool,
) -> None:
    """Wait until a machine is in a state."""
    name = resolve_app(app_name, config_path)
    wanted = list(states) or ["started"]

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                await client.wait(name, machine_id, states=wanted, timeout_s=timeout)
            found = await client.machine(name, machine_id) if as_json else None
        say(f"Machine {machine_id} is {' or '.join(wanted)}")
        if found is not None:
            emit_json(found)

    run(main)


@click.command()
@click.argument("machine_id", metavar="ID")
@app_options
@json_option
def versions(*, machine_id: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List a machine's versions, newest first."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            with named(name, machine_id):
                found = await client.versions(name, machine_id)
        if as_json:
            emit_json(found)
            return
        rows = [(one.version, one.status, one.created_at, one.user_config.image) for one in found]
        emit_table(("VERSION", "STATUS", "CREATED AT", "IMAGE"), rows, empty="No versions.")

    run(main)


# -- leases ------------------------------------------------------------------------------------------------------


@click.group(cls=CommandGroup)
def leases() -> None:
    """See who holds machines, and end a claim."""


@leases.command()
@click.argument("machine_ids", nargs=-1, metavar="[ID...]")
@app_options
@json_option
def view(*, machine_ids: tuple[str, ...], app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List leases of these machines, or of all of the app."""
    from pantala.wire.api import Lease

    name = resolve_app(app_name, config_path)

    async def main() -> None:
        held: list[tuple[str, Lease]] = []
        async with api() as client:
            for machine_id in machine_ids or [one.id for one in await client.machines(name)]:
                try:
                    with named(name, machine_id):
                        held.append((machine_id, await client.lease(name, machine_id)))
                except NotFound as error:
                    if not error.message.startswith("lease not found"):
                        raise
        if as_json:
            emit_json([{"machine_id": machine_id, "lease": lease} for machine_id, lease in held])
            return
        rows = [
            (
                machine_id,
                lease.nonce,
                lease.owner,
                f"{max(0, int(lease.expires_at - time.time()))} s",
                lease.description,
            )
            for machine_id, lease in held
        ]
        emit_table(("MACHINE", "NONCE", "OWNER", "ENDS IN", "DESCRIPTION"), rows, empty="Nobody holds a lease.")

    run(main)


@leases.command()
@click.argument("machine_ids", nargs=-1, required=True, metavar="ID...")
@app_options
@yes_option
@json_option
def clear(
    *, machine_ids: tuple[str, ...], app_name: str | None, config_path: str | None, yes: bool, as_json: bool
) -> None:
    """End the leases of machines, whoever holds them: what they are held for may go on."""
    name = resolve_app(app_name, config_path)
    confirm(f"End the leases of {', '.join(machine_ids)}?", yes=yes)

    async def main() -> None:
        ended: list[str] = []
        async with api() as client:
            for machine_id in machine_ids:
                try:
                    with named(name, machine_id):
                        lease = await client.lease(name, machine_id)
                        await client.release_lease(name, machine_id, nonce=lease.nonce)
                    ended.append(machine_id)
                    say(f"The lease of machine {machine_id} is ended")
                except NotFound as error:
                    if not error.message.startswith("lease not found"):
                        raise
                    say(f"Machine {machine_id} has no lease")
        if as_json:
            emit_json({"ended": ended})

    run(main)


# -- placement ---------------------------------------------------------------------------------------------------


@click.command()
@click.option("-o", "--org", default="personal", show_default=True, metavar="SLUG")
@click.option("-r", "--region", metavar="CODES", help="iad,any: in order of preference.")
@click.option("--count", type=int, default=1, show_default=True)
@click.option("--vm-cpu-kind", type=click.Choice(["shared", "performance"]), default="shared", show_default=True)
@click.option("--vm-cpus", type=int, default=1, show_default=True, metavar="N")
@click.option("--vm-memory", type=int, default=256, show_default=True, metavar="MIB")
@json_option
def place(
    *, org: str, region: str | None, count: int, vm_cpu_kind: str, vm_cpus: int, vm_memory: int, as_json: bool
) -> None:
    """Show where new machines would go. Nothing is reserved."""
    from pantala.wire.machine import Guest
    from pantala.wire.platform import PlacementsRequest

    guest = Guest(cpu_kind=vm_cpu_kind, cpus=vm_cpus, memory_mb=vm_memory)
    request = PlacementsRequest(org_slug=org, region=region, count=count, compute=guest)

    async def main() -> None:
        async with api() as client:
            found = (await client.placements(request)).regions
        if as_json:
            emit_json([{"region": one.region, "count": one.count, "concurrency": one.concurrency} for one in found])
            return
        rows = [(one.region, one.count, one.concurrency) for one in found]
        emit_table(("REGION", "COUNT", "HOSTS"), rows, empty="No region has room.")

    run(main)


CHANGES: tuple[click.Command, ...] = (
    update,
    clone,
    _routing("cordon", "gets no more requests", "Stop routing requests to machines; they keep running."),
    _routing("uncordon", "gets requests again", "Route requests to machines again."),
    wait,
    versions,
    leases,
    place,
)
