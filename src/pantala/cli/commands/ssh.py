"""`pantala ssh`: log in to a machine through the API, copy files, get certificates."""

from __future__ import annotations

import os
import posixpath
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import api, app_options, interactive, json_option, resolve_app, run
from pantala.errors import Conflict, Forbidden, InvalidRequest, NotFound, TransientError, WrongState

if TYPE_CHECKING:
    import asyncssh

    from pantala.client.api import ApiClient
    from pantala.wire.machine import Machine

LOGIN_S = 20

address_option = click.option("--machine", "machine_id", metavar="ID", help="This machine.")
select_option = click.option("-s", "--select", is_flag=True, help="Choose among the started machines.")
region_option = click.option("-r", "--region", metavar="CODE", help="A machine in this region.")
group_option = click.option("-g", "--group", metavar="NAME", help="A machine of this process group.")
user_option = click.option("-u", "--user", default="root", show_default=True, metavar="NAME", help="Log in as.")


@click.group()
def ssh() -> None:
    """Log in to machines, copy files, get certificates."""


@ssh.command()
@app_options
@address_option
@select_option
@region_option
@group_option
@user_option
@click.option("-C", "--command", "text", metavar="COMMAND", help="Run this instead of a shell.")
@click.option("--pty/--no-pty", default=None, help="With a terminal (default: when no command is given).")
@click.option("--container", metavar="NAME", help="In this container of the machine.")
def console(
    *,
    app_name: str | None,
    config_path: str | None,
    machine_id: str | None,
    select: bool,
    region: str | None,
    group: str | None,
    user: str,
    text: str | None,
    pty: bool | None,
    container: str | None,
) -> int:
    """Log in to a machine of the app. Ends with the exit status of what ran there."""
    from pantala.cli.terminal import converse

    app = resolve_app(app_name, config_path)
    env = {"FLY_SSH_CONTAINER": container} if container else {"FLY_SSH_MACHINE": "1"}

    async def main() -> int:
        async with _login(app, machine_id, select=select, region=region, group=group, user=user) as connection:
            return await converse(connection, text, pty=text is None if pty is None else pty, env=env)

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
    import asyncssh

    from pantala.wire.ssh import CertificateRequest

    app = resolve_app(app_name, config_path)
    if path.exists() and not overwrite:
        raise Conflict(f"{path} is there already", hint="add --overwrite to replace it")
    key = asyncssh.generate_private_key("ssh-ed25519", comment=f"pantala {app}")

    async def main() -> None:
        async with api() as client:
            request = CertificateRequest(
                public_key=key.export_public_key().decode(), principals=list(users) or ["root"], hours=hours
            )
            issued = await client.ssh_certificate(app, request)
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


@ssh.group()
def sftp() -> None:
    """Copy files from and to a machine."""


@sftp.command()
@click.argument("remote")
@click.argument("local", required=False)
@app_options
@address_option
@select_option
@region_option
@group_option
@user_option
@click.option("-R", "--recursive", is_flag=True, help="With all that is in it.")
@json_option
def get(
    *,
    remote: str,
    local: str | None,
    app_name: str | None,
    config_path: str | None,
    machine_id: str | None,
    select: bool,
    region: str | None,
    group: str | None,
    user: str,
    recursive: bool,
    as_json: bool,
) -> None:
    """Copy REMOTE of a machine to LOCAL (default: its name, here)."""
    app = resolve_app(app_name, config_path)
    target = Path(local or posixpath.basename(remote.rstrip("/")))
    if target.exists() and not target.is_dir():
        raise Conflict(f"{target} is there already", hint="name another place: `pantala ssh sftp get REMOTE LOCAL`")

    async def main() -> None:
        async with _files(app, machine_id, select=select, region=region, group=group, user=user) as files:
            await files.get(remote, str(target), recurse=recursive, preserve=True)
        say(f"{remote} is copied to {target}")
        if as_json:
            emit_json({"from": remote, "to": str(target)})

    run(main)


@sftp.command()
@click.argument("local", type=click.Path(exists=True))
@click.argument("remote", required=False)
@app_options
@address_option
@select_option
@region_option
@group_option
@user_option
@click.option("-R", "--recursive", is_flag=True, help="With all that is in it.")
@json_option
def put(
    *,
    local: str,
    remote: str | None,
    app_name: str | None,
    config_path: str | None,
    machine_id: str | None,
    select: bool,
    region: str | None,
    group: str | None,
    user: str,
    recursive: bool,
    as_json: bool,
) -> None:
    """Copy LOCAL to REMOTE of a machine (default: its name, in the user's folder)."""
    app = resolve_app(app_name, config_path)
    target = remote or Path(local).name

    async def main() -> None:
        async with _files(app, machine_id, select=select, region=region, group=group, user=user) as files:
            if await files.isfile(target):
                raise Conflict(f"{target} is there already", hint="remove it first, or name another place")
            await files.put(local, target, recurse=recursive)
        say(f"{local} is copied to {target}")
        if as_json:
            emit_json({"from": local, "to": target})

    run(main)


@sftp.command()
@click.argument("path", default=".")
@app_options
@address_option
@select_option
@region_option
@group_option
@user_option
@json_option
def find(
    *,
    path: str,
    app_name: str | None,
    config_path: str | None,
    machine_id: str | None,
    select: bool,
    region: str | None,
    group: str | None,
    user: str,
    as_json: bool,
) -> None:
    """List PATH and all that is in it, a path per line."""
    app = resolve_app(app_name, config_path)

    async def main() -> None:
        async with _files(app, machine_id, select=select, region=region, group=group, user=user) as files:
            found = _found(files, path)
            if as_json:
                emit_json([line async for line in found])
                return
            async for line in found:
                emit(line)

    run(main)


async def _found(files: asyncssh.SFTPClient, path: str) -> AsyncGenerator[str]:
    import asyncssh

    yield path
    if not await files.isdir(path) or await files.islink(path):
        return
    try:
        names = sorted(str(name) for name in await files.listdir(path))
    except asyncssh.SFTPError as error:
        say(f"{path}: {error.reason}")
        return
    for name in names:
        if name not in {".", ".."}:
            async for line in _found(files, posixpath.join(path, name)):
                yield line


@asynccontextmanager
async def _files(
    app: str, machine_id: str | None, *, select: bool, region: str | None, group: str | None, user: str
) -> AsyncGenerator[asyncssh.SFTPClient]:
    import asyncssh

    async with _login(app, machine_id, select=select, region=region, group=group, user=user) as connection:
        try:
            async with connection.start_sftp_client() as files:
                yield files
        except asyncssh.SFTPNoSuchFile as error:
            raise NotFound(error.reason) from error
        except asyncssh.SFTPPermissionDenied as error:
            raise Forbidden(error.reason) from error
        except asyncssh.SFTPError as error:
            raise InvalidRequest(error.reason, field="sftp") from error


@asynccontextmanager
async def _login(
    app: str, machine_id: str | None, *, select: bool, region: str | None, group: str | None, user: str
) -> AsyncGenerator[asyncssh.SSHClientConnection]:
    """A connection to one machine of the app, with a key and a certificate that live as long as it."""
    import asyncssh

    from pantala.cli.context import api_url, load_config, token
    from pantala.client.tunnel import open_tunnel
    from pantala.wire.ssh import CertificateRequest

    config = load_config()
    async with api(config) as client:
        chosen = await _choose(client, app, machine_id, select=select, region=region, group=group)
        key = asyncssh.generate_private_key("ssh-ed25519")
        public_key = key.export_public_key().decode()
        issued = await client.ssh_certificate(app, CertificateRequest(public_key=public_key, principals=[user]))
    certificate = asyncssh.import_certificate(issued.certificate)
    async with open_tunnel(api_url(config), token(config), app=app, machine=chosen.id) as tunnel:
        try:
            # Who answers there, the API and the platform's own connections vouch for.
            connection = await asyncssh.connect(
                sock=tunnel.local,
                username=user,
                client_keys=[(key, certificate)],
                known_hosts=None,
                agent_path=None,
                config=None,
                login_timeout=LOGIN_S,
            )
        except asyncssh.PermissionDenied as error:
            raise Forbidden(
                f"machine {chosen.id} does not let {user} in",
                hint="a machine that was started before the authority was changed lets in after a restart",
            ) from error
        except (OSError, asyncssh.Error) as error:
            raise tunnel.refusal or TransientError(f"machine {chosen.id} does not answer: {error}") from error
        try:
            async with connection:
                yield connection
        except (asyncssh.ConnectionLost, asyncssh.DisconnectError) as error:
            raise tunnel.refusal or TransientError(f"the connection to {chosen.id} is lost: {error}") from error
        if tunnel.refusal is not None:
            raise tunnel.refusal


async def _choose(
    client: ApiClient, app: str, machine_id: str | None, *, select: bool, region: str | None, group: str | None
) -> Machine:
    """Raises what is wrong with the machine that was named, or that none fits."""
    if machine_id:
        found = await client.machine(app, machine_id)
        if found.state != "started":
            raise WrongState(
                f"machine {machine_id} is {found.state}",
                hint=f"`pantala machine start {machine_id} -a {app}` starts it",
            )
        return found
    machines = await client.machines(app)
    fitting = [m for m in machines if region in {None, m.region} and group in {None, _group(m)}]
    started = sorted((m for m in fitting if m.state == "started"), key=lambda m: m.id)
    if not started:
        what = " ".join(["machine", *([f"of {group}"] if group else []), *([f"in {region}"] if region else [])])
        if not fitting:
            raise NotFound(f"{app} has no {what}", hint=f"`pantala machine list -a {app}` shows what there is")
        raise WrongState(
            f"no {what} of {app} is started", hint=f"`pantala machine start {fitting[0].id} -a {app}` starts one"
        )
    if not select or len(started) == 1:
        return started[0]
    if not interactive():
        raise InvalidRequest("there is no terminal to choose on", field="--select", hint="name it with --machine ID")
    for number, machine in enumerate(started, 1):
        say(f"{number:>3}  {machine.id}  {machine.region}  {_group(machine):<10} {machine.name}")
    number = click.prompt("Machine", type=click.IntRange(1, len(started)), default=1, err=True)
    return started[number - 1]


def _group(machine: Machine) -> str:
    metadata = (machine.config.metadata if machine.config else None) or {}
    return metadata.get("fly_process_group", "")
