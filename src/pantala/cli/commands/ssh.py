"""`pantala ssh`: log in to a machine through the API, get certificates; files are `sftp.py`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pantala.cli.commands.sftp import sftp
from pantala.cli.groups import CommandGroup
from pantala.cli.login import Target, certified, login, target_options
from pantala.cli.output import emit_json, say
from pantala.cli.session import api, app_options, json_option, resolve_app, run
from pantala.errors import Conflict


@click.group(cls=CommandGroup)
def ssh() -> None:
    """Log in to machines, copy files, get certificates."""


ssh.add_command(sftp)


@ssh.command()
@target_options
@click.option("-C", "--command", "text", metavar="COMMAND", help="Run this instead of a shell.")
@click.option("--pty/--no-pty", default=None, help="With a terminal (default: when no command is given).")
def console(*, target: Target, text: str | None, pty: bool | None) -> int:
    """Log in to a machine of the app. Ends with the exit status of what ran there."""
    from pantala.cli.terminal import converse

    async def main() -> int:
        async with login(target) as connection:
            return await converse(connection, text, pty=text is None if pty is None else pty, env=target.env)

    return run(main)


@ssh.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@app_options
@click.option("-u", "--username", "users", multiple=True, metavar="NAME", help="Log in as (default: root).")
@click.option("--hours", default=1, show_default=True, type=click.IntRange(1, 24))
@click.option("--overwrite", is_flag=True, help="Also when PATH is there.")
@json_option
def issue(
    *,
    path: Path,
    app_name: str | None,
    config_path: str | None,
    users: tuple[str, ...],
    hours: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a key to PATH and its certificate to PATH-cert.pub, for an SSH client in the private network."""
    app = resolve_app(app_name, config_path)
    if path.exists() and not overwrite:
        raise Conflict(f"{path} is there already", hint="add --overwrite to replace it")

    async def main() -> None:
        async with api() as client:
            key, issued = await certified(client, app, users or ["root"], hours=hours)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.export_private_key())
        path.with_name(f"{path.name}.pub").write_bytes(key.export_public_key())
        path.with_name(f"{path.name}-cert.pub").write_text(f"{issued.certificate}\n")
        say(f"{path} and {path}-cert.pub open machines of {app} until {issued.valid_until}")
        if as_json:
            certificate = f"{path}-cert.pub"
            emit_json({"key": str(path), "certificate": certificate, "valid_until": issued.valid_until})

    run(main)
