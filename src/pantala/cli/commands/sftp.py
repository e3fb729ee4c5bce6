"""`pantala ssh sftp`: files of a machine, one by one or in a shell of their own (`cli/file_shell.py`)."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import click

from pantala.cli.groups import CommandGroup
from pantala.cli.login import Target, login, target_options
from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import json_option, run
from pantala.errors import Forbidden, InvalidRequest, NotFound

if TYPE_CHECKING:
    import asyncssh

recursive_option = click.option("-R", "--recursive", is_flag=True, help="With all that is in it.")


@click.group(cls=CommandGroup)
def sftp() -> None:
    """Copy files from and to a machine."""


@sftp.command()
@click.argument("remote")
@click.argument("local", required=False)
@target_options
@recursive_option
@json_option
def get(*, target: Target, remote: str, local: str | None, recursive: bool, as_json: bool) -> None:
    """Copy REMOTE of a machine to LOCAL (default: its name, here)."""
    from pantala.cli.file_shell import fetch, local_place

    place = local_place(remote, local)  # what is wrong with it is told before anybody logs in

    async def main() -> None:
        async with _files(target) as files:
            await fetch(files, remote, place, recursive=recursive)
        if as_json:
            emit_json({"from": remote, "to": str(place)})

    run(main)


@sftp.command()
@click.argument("local", type=click.Path(exists=True))
@click.argument("remote", required=False)
@target_options
@recursive_option
@json_option
def put(*, target: Target, local: str, remote: str | None, recursive: bool, as_json: bool) -> None:
    """Copy LOCAL to REMOTE of a machine (default: its name, in the user's folder)."""
    from pantala.cli.file_shell import send

    async def main() -> None:
        async with _files(target) as files:
            place = await send(files, local, remote, recursive=recursive)
            if as_json:
                emit_json({"from": local, "to": place})

    run(main)


@sftp.command()
@click.argument("path", default=".")
@target_options
@json_option
def find(*, target: Target, path: str, as_json: bool) -> None:
    """List PATH and all that is in it, a path per line."""

    async def main() -> None:
        async with _files(target) as files:
            found = _found(files, path)
            if as_json:
                emit_json([line async for line in found])
                return
            async for line in found:
                emit(line)

    run(main)


@sftp.command()
@target_options
def shell(*, target: Target) -> None:
    """Commands about a machine's files, typed or from a pipe: ls, cd, pwd, get, put, rm, mkdir, help, exit.

    From a pipe the first command that fails ends it.
    """
    from pantala.cli.file_shell import converse

    converse(_files(target), translated=translated)


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
async def _files(target: Target) -> AsyncGenerator[asyncssh.SFTPClient]:
    async with login(target) as connection:
        with translated():
            async with connection.start_sftp_client(env=target.env) as files:
                yield files


@contextmanager
def translated() -> Generator[None]:
    """What the machine's file server says, as a refusal; that it is gone is for `login` to tell."""
    import asyncssh

    try:
        yield
    except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
        raise
    except asyncssh.SFTPNoSuchFile as error:
        raise NotFound(error.reason) from error
    except asyncssh.SFTPPermissionDenied as error:
        raise Forbidden(error.reason) from error
    except asyncssh.SFTPError as error:
        raise InvalidRequest(error.reason, field="sftp") from error
