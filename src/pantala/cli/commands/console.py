"""`pantala console`: a session in a machine like the app's, made for it and removed after it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pantala.cli.commands.machine_parts import WAIT_S
from pantala.cli.login import Target, login
from pantala.cli.output import say
from pantala.cli.session import api, app_options, interruptible, pairs, resolve_app, run
from pantala.errors import InvalidRequest, PantalaError, RequestTimeout, WrongState

if TYPE_CHECKING:
    from pantala.appconfig.load import Loaded
    from pantala.client.api import ApiClient
    from pantala.wire.machine import Guest, Machine, MachineConfig

REMOVAL_S = 10


@click.command()
@app_options
@click.option("--machine", "machine_id", metavar="ID", help="In this machine; none is made.")
@click.option("-C", "--command", "text", metavar="COMMAND", help="Instead of fly.toml's console_command, or a shell.")
@click.option("--pty/--no-pty", default=None, help="With a terminal (default: without -C).")
@click.option("-u", "--user", default="root", show_default=True, metavar="NAME", help="Log in as.")
@click.option("-i", "--image", metavar="REF", help="From this image (default: the last release's).")
@click.option("-r", "--region", metavar="CODE", help="Default: the app's primary region.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Added to the app's.")
@click.option("--vm-size", metavar="SIZE", help="A preset such as shared-cpu-2x.")
@click.option("--vm-cpus", type=int, metavar="N")
@click.option("--vm-memory", type=int, metavar="MIB")
def console(
    *,
    app_name: str | None,
    config_path: str | None,
    machine_id: str | None,
    text: str | None,
    pty: bool | None,
    user: str,
    image: str | None,
    region: str | None,
    env: tuple[str, ...],
    vm_size: str | None,
    vm_cpus: int | None,
    vm_memory: int | None,
) -> int:
    """Log in to a machine of its own: image, environment and secrets of the app, but it serves nobody.

    It goes when the session ends. Ends with the exit status of what ran there.
    """
    from pantala.appconfig.load import find_config, load
    from pantala.cli.terminal import converse

    if vm_size and (vm_cpus or vm_memory):
        raise InvalidRequest("give it, or --vm-memory and --vm-cpus", field="--vm-size")
    if machine_id and (image or region or env or vm_size or vm_cpus or vm_memory):
        raise InvalidRequest("a machine that is there keeps what it has", field="--machine")
    app = resolve_app(app_name, config_path)
    path = find_config(Path.cwd(), config_path)
    loaded = load(path) if path else None
    if loaded is not None and loaded.config.app not in (app, None):
        loaded = None  # of another app
    command = text or (loaded.config.console_command if loaded else None)
    with_terminal = text is None if pty is None else pty

    async def main() -> int:
        async with interruptible():
            if machine_id:
                return await inside(machine_id)
            async with api() as client:
                config = await _config(client, app, loaded, image=image, env=pairs(env, "--env"))
                config = _sized(config, size=vm_size, cpus=vm_cpus, memory_mb=vm_memory)
                where = region or (loaded.config.primary_region if loaded else None)
                async with _machine(client, app, config, where) as made:
                    return await inside(made.id)
        raise AssertionError("unreachable: the block returns or raises")

    async def inside(where: str) -> int:
        target = Target(app=app, machine_id=where, user=user)
        async with login(target) as connection:
            return await converse(connection, command, pty=with_terminal, env=target.env)

    return run(main)


async def _config(
    client: ApiClient, app: str, loaded: Loaded | None, *, image: str | None, env: dict[str, str]
) -> MachineConfig:
    """Of the app's default group: by fly.toml if it is here, else as one of its machines has it."""
    from msgspec.structs import replace

    from pantala.appconfig.machines import console_config, machine_config
    from pantala.planner.deploy import managed_by_deploy
    from pantala.wire.machine import MachineConfig

    if image is None:
        complete = [release for release in await client.releases(app) if release.status == "complete"]
        if not complete:
            raise WrongState(f"{app} has no release whose image could be used", hint="deploy it, or name one with -i")
        image = max(complete, key=lambda release: release.version).image
    present = [m.config for m in await client.machines(app) if m.config and managed_by_deploy(m)]
    if loaded is not None:
        folder = loaded.path.parent
        base = machine_config(
            loaded.config,
            loaded.config.default_group(),
            image=image,
            metadata={},
            read_file=lambda path: (folder / path).read_bytes(),
            guest=present[0].guest if present else None,
        )
    else:
        base = replace(present[0] if present else MachineConfig(), image=image)
    return console_config(replace(base, env=(base.env or {}) | env))


def _sized(config: MachineConfig, *, size: str | None, cpus: int | None, memory_mb: int | None) -> MachineConfig:
    from msgspec.structs import replace

    from pantala.wire.machine import Guest

    if size:
        return replace(config, size=size, guest=None)
    if not cpus and not memory_mb:
        return config
    guest: Guest = config.guest or Guest()
    return replace(
        config, guest=replace(guest, cpus=cpus or guest.cpus, memory_mb=memory_mb or guest.memory_mb), size=None
    )


@asynccontextmanager
async def _machine(client: ApiClient, app: str, config: MachineConfig, region: str | None) -> AsyncGenerator[Machine]:
    """Started, and gone at the end of the block, however it ends."""
    import anyio

    from pantala.wire.api import LaunchMachineRequest

    made = await client.create_machine(app, LaunchMachineRequest(config=config, region=region))
    try:
        say(f"Machine {made.id} is made in {made.region}")
        try:
            await client.wait(app, made.id, states=["started"], timeout_s=WAIT_S)
        except RequestTimeout as error:
            raise WrongState(
                f"machine {made.id} does not start: {error.message}",
                hint=f"`pantala logs -a {app}` may say why; the image has to have /bin/sleep",
            ) from error
        yield made
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(REMOVAL_S) as removal:
            try:
                await client.destroy(app, made.id, force=True)
                say(f"Machine {made.id} is removed")
            except PantalaError as error:
                say(f"Machine {made.id} is left behind, a deploy removes it: {error.message}")
        if removal.cancelled_caught:
            say(f"Machine {made.id} is left behind, a deploy removes it: the API does not answer")
