"""What `pantala ssh sftp` does with a machine's files: copies, and a shell of a few commands.

The shell reads in the main thread and works in another, so that Ctrl-C at the prompt, or while something is copied,
ends that and leaves terminal and session as they were.
"""

from __future__ import annotations

import importlib
import posixpath
import shlex
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pantala.cli.output import emit, say, show_error
from pantala.cli.session import interactive
from pantala.errors import Conflict, InvalidRequest, NotFound, PantalaError, UserError
from pantala.kit.tasks import first_error

if TYPE_CHECKING:
    import asyncssh
    from anyio.from_thread import BlockingPortal

LINE_LENGTH_MAX = 64 * 1024


# -- copies ------------------------------------------------------------------------------------------------------


def local_place(remote: str, local: str | None) -> Path:
    """Where a copy goes. Raises Conflict when a file is there."""
    place = Path(local or posixpath.basename(remote.rstrip("/")) or ".")
    if place.is_dir():
        place = place / posixpath.basename(remote.rstrip("/"))
    if place.exists() and not place.is_dir():
        raise Conflict(f"{place} is there already", hint="name another place: get REMOTE LOCAL")
    return place


async def fetch(files: asyncssh.SFTPClient, remote: str, place: Path, *, recursive: bool) -> None:
    remote = remote.rstrip("/") or "/"
    if not recursive and await files.isdir(remote):
        raise InvalidRequest(f"{remote} is a folder", field="get", hint="-R copies it with all that is in it")
    with _local():
        await files.get(remote, str(place.parent if place.is_dir() else place), recurse=recursive, preserve=True)
    say(f"{remote} is copied to {place}")


async def send(files: asyncssh.SFTPClient, local: str, remote: str | None, *, recursive: bool) -> str:
    """Where it is now."""
    source = Path(local)
    if not source.exists():
        raise NotFound(f"there is no {local} here")
    if not recursive and source.is_dir():
        raise InvalidRequest(f"{local} is a folder", field="put", hint="-R copies it with all that is in it")
    place = remote or source.name
    if await files.isdir(place) and not source.is_dir():
        place = posixpath.join(place, source.name)
    if await files.isfile(place):
        raise Conflict(f"{place} is there already", hint="remove it first, or name another place")
    with _local():
        await files.put(local, place, recurse=recursive)
    say(f"{local} is copied to {place}")
    return place


@contextmanager
def _local() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'a file here'}: {error.strerror or error}") from error


# -- the shell ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    words: list[str]
    flags: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """`flags` are the letters that it takes; so many words follow it."""

    run: Callable[[FileShell, Asked], Awaitable[None]]
    usage: str
    what: str
    flags: str = ""
    least: int = 0
    most: int = 0


class FileShell:
    def __init__(self, files: asyncssh.SFTPClient) -> None:
        self._files = files
        self._home = "/"
        self.folder = "/"

    async def begin(self) -> None:
        self._home = _text(await self._files.realpath("."))
        await self._go(self._home)

    async def obey(self, words: list[str]) -> None:
        """One command. Raises what is wrong with it."""
        name, *rest = words
        verb = VERBS.get(name)
        if verb is None:
            raise InvalidRequest(f"there is no command {name}", hint=f"there are {', '.join([*VERBS, 'exit'])}")
        flags = frozenset("".join(word[1:] for word in rest if _is_flag(word)))
        asked = Asked(words=[word for word in rest if not _is_flag(word)], flags=flags)
        if flags - set(verb.flags) or not verb.least <= len(asked.words) <= verb.most:
            raise InvalidRequest(f"usage: {verb.usage}")
        await verb.run(self, asked)

    async def ls(self, asked: Asked) -> None:
        for path in asked.words or ["."]:
            attrs = await self._files.stat(path)
            if not stat.S_ISDIR(attrs.permissions or 0):
                self._show(path, attrs, long="l" in asked.flags)
                continue
            entries = {_text(entry.filename): entry.attrs for entry in await self._files.readdir(path)}
            for name in sorted(entries.keys() - {".", ".."}):
                self._show(name, entries[name], long="l" in asked.flags)

    def _show(self, name: str, attrs: asyncssh.SFTPAttrs, *, long: bool) -> None:
        if not long:
            emit(name)
            return
        mode = stat.filemode(attrs.permissions or 0)
        changed = datetime.fromtimestamp(attrs.mtime or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        emit(f"{mode}  {attrs.uid or 0:>5}  {attrs.gid or 0:>5}  {attrs.size or 0:>12}  {changed}  {name}")

    async def cd(self, asked: Asked) -> None:
        path = asked.words[0] if asked.words else self._home
        if await self._files.isfile(path):
            raise InvalidRequest(f"{path} is not a folder")
        await self._go(path)

    async def _go(self, path: str) -> None:
        await self._files.chdir(path)
        self.folder = _text(await self._files.getcwd())

    async def pwd(self, asked: Asked) -> None:
        del asked
        emit(self.folder)

    async def get(self, asked: Asked) -> None:
        place = local_place(asked.words[0], asked.words[1] if len(asked.words) > 1 else None)
        await fetch(self._files, asked.words[0], place, recursive=bool(asked.flags))

    async def put(self, asked: Asked) -> None:
        remote = asked.words[1] if len(asked.words) > 1 else None
        await send(self._files, asked.words[0], remote, recursive=bool(asked.flags))

    async def rm(self, asked: Asked) -> None:
        for path in asked.words:
            if not await self._files.isdir(path) or await self._files.islink(path):
                await self._files.remove(path)
            elif asked.flags:
                await self._files.rmtree(path)
            else:
                raise InvalidRequest(f"{path} is a folder", hint="-R removes it with all that is in it")

    async def mkdir(self, asked: Asked) -> None:
        for path in asked.words:
            if asked.flags:
                await self._files.makedirs(path, exist_ok=True)
            else:
                await self._files.mkdir(path)

    async def help(self, asked: Asked) -> None:
        del asked
        for verb in VERBS.values():
            emit(f"{verb.usage:<32}{verb.what}")
        emit(f"{'exit':<32}End the session")


WORDS_MAX = 1000
VERBS = {
    "ls": Verb(run=FileShell.ls, usage="ls [-l] [PATH...]", what="List a folder", flags="l", most=WORDS_MAX),
    "cd": Verb(run=FileShell.cd, usage="cd [PATH]", what="Go to a folder, or home", most=1),
    "pwd": Verb(run=FileShell.pwd, usage="pwd", what="Say which folder this is"),
    "get": Verb(
        run=FileShell.get,
        usage="get [-R] REMOTE [LOCAL]",
        what="Copy from the machine; -R with all that is in it",
        flags="rR",
        least=1,
        most=2,
    ),
    "put": Verb(
        run=FileShell.put,
        usage="put [-R] LOCAL [REMOTE]",
        what="Copy to the machine; -R with all that is in it",
        flags="rR",
        least=1,
        most=2,
    ),
    "rm": Verb(
        run=FileShell.rm,
        usage="rm [-R] PATH...",
        what="Remove; -R with all that is in it",
        flags="rR",
        least=1,
        most=WORDS_MAX,
    ),
    "mkdir": Verb(
        run=FileShell.mkdir,
        usage="mkdir [-p] PATH...",
        what="Make a folder; -p with those above it",
        flags="p",
        least=1,
        most=WORDS_MAX,
    ),
    "help": Verb(run=FileShell.help, usage="help", what="Show this"),
}


def converse(
    opened: AbstractAsyncContextManager[asyncssh.SFTPClient], *, translated: Callable[[], AbstractContextManager[None]]
) -> None:
    """Until `exit` or the end of the input. At a terminal a refusal is shown and the next line asked for."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(_alone(opened)) as files:
        shell = FileShell(files)
        portal.call(shell.begin)
        typed = interactive()
        if typed:
            with suppress(ImportError):
                importlib.import_module("readline")  # keys and history of `input`
        for line in _typed(shell) if typed else _piped():
            try:
                words = _split(line)
                if words[:1] in (["exit"], ["quit"], ["bye"]):
                    return
                if words:
                    _obey(portal, shell, words, translated)
            except PantalaError as error:
                if not typed:
                    raise
                show_error(error)


def _obey(
    portal: BlockingPortal, shell: FileShell, words: list[str], translated: Callable[[], AbstractContextManager[None]]
) -> None:
    future = portal.start_task_soon(shell.obey, words)
    try:
        with translated():
            future.result()
    except KeyboardInterrupt:
        future.cancel()
        if not interactive():
            raise
        say("Interrupted.")


def _typed(shell: FileShell) -> Generator[str]:
    while True:
        try:
            yield input(f"{shell.folder}> ")
        except KeyboardInterrupt:
            say()
        except EOFError:
            say()
            return


def _piped() -> Generator[str]:
    while line := sys.stdin.readline(LINE_LENGTH_MAX):
        yield line


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise InvalidRequest(f"the line cannot be split into words: {error}") from error


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-")


def _text(path: object) -> str:
    return path.decode() if isinstance(path, bytes) else str(path)


@asynccontextmanager
async def _alone(opened: AbstractAsyncContextManager[asyncssh.SFTPClient]) -> AsyncGenerator[asyncssh.SFTPClient]:
    """Task groups on the way raise their first error, as `session.run` has it for other commands."""
    async with first_error(), opened as files:
        yield files
