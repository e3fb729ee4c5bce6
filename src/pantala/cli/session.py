"""What most commands begin with: the app's name, a client, one event loop."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pantala.cli.context import Config, api_url, load_config, token
from pantala.errors import InvalidRequest, Unauthenticated

if TYPE_CHECKING:
    from pantala.client.api import ApiClient

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

app_option = click.option("-a", "--app", "app_name", metavar="NAME", help="The app (else FLY_APP, else fly.toml).")
config_option = click.option("-c", "--config", "config_path", metavar="PATH", help="fly.toml, or its directory.")
json_option = click.option("-j", "--json", "as_json", is_flag=True, help="JSON on standard output.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Answer yes to every question.")


def app_options(command: F) -> F:
    return app_option(config_option(command))


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a command's coroutine; a group of errors is raised as its first."""
    import anyio

    from pantala.kit.tasks import first_error

    async def wrapped() -> T:
        async with first_error():
            return await main()
        raise AssertionError("unreachable")

    return anyio.run(wrapped)


@asynccontextmanager
async def interruptible() -> AsyncGenerator[None]:
    """The first SIGINT or SIGTERM cancels the block, which may tidy up; then the command ends as interrupted. A second
    one ends it at once."""
    import signal

    import anyio

    block = anyio.CancelScope()
    async with anyio.create_task_group() as tasks:

        async def listen(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    block.cancel()
                    return

        await tasks.start(listen)
        with block:
            yield
        tasks.cancel_scope.cancel()
    if block.cancelled_caught:
        raise click.Abort


@asynccontextmanager
async def api(config: Config | None = None) -> AsyncGenerator[ApiClient]:
    """A connected client of the platform that the user is logged in to."""
    from pantala import __version__
    from pantala.client.api import connect

    known = config or load_config()
    secret = token(known)
    if not secret.reveal():
        raise Unauthenticated("you are not logged in", hint="run `pantala auth login`, or set FLY_API_TOKEN")
    async with connect(api_url(known), secret, user_agent=f"pantala/{__version__}") as client:
        yield client


def resolve_app(app_name: str | None, config_path: str | None) -> str:
    """`-a`, then `FLY_APP`, then `app` in fly.toml. Raises InvalidRequest."""
    if app_name or (app_name := os.environ.get("FLY_APP")):
        return app_name
    from pantala.appconfig.load import find_config, load

    path = find_config(Path.cwd(), config_path)
    if path is None:
        raise InvalidRequest(
            "which app? there is no fly.toml here", hint="name it with -a NAME, or run this in the app's directory"
        )
    name = load(path).config.app
    if not name:
        raise InvalidRequest(f"{path} names no app", field="app", hint="name it with -a NAME")
    return name


def confirm(question: str, *, yes: bool) -> None:
    """Ask a person; without a terminal `--yes` is needed. Raises InvalidRequest or Abort."""
    if yes:
        return
    if not interactive():
        raise InvalidRequest(f"{question} There is no terminal to ask on", hint="add --yes to go on")
    click.confirm(question, abort=True, err=True)


def interactive() -> bool:
    return sys.stdin.isatty()


def pairs(values: Sequence[str], flag: str) -> dict[str, str]:
    """NAME=VALUE each. Raises InvalidRequest naming the flag."""
    found: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InvalidRequest(f"{name!r}: must be NAME=VALUE", field=flag)
        found[name] = value
    return found
