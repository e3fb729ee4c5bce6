"""The `pantala` command. Imports nothing heavy: a command's module is loaded when it runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import click

from pantala import __version__
from pantala.errors import PantalaError

COMMANDS: dict[str, tuple[str, str]] = {
    "launch": ("launch:launch", "Create an app from a directory: find out what it is, write fly.toml, deploy"),
    "deploy": ("deploy:deploy", "Build and release the app of this directory"),
    "status": ("status:status", "Show an app and its machines"),
    "why-awake": ("machine_status:why_awake", "Say why machines are not put to sleep"),
    "logs": ("logs:logs", "Show and follow an app's log"),
    "trace": ("trace:trace", "Show where a request was and how long each step took"),
    "open": ("apps:open_app", "Print (and open) the app's address"),
    "apps": ("apps:apps", "Create, list and destroy apps"),
    "machine": ("machine:machine", "Run, list, start, stop and destroy machines"),
    "ssh": ("ssh:ssh", "Log in to machines, copy files, get certificates"),
    "console": ("console:console", "Log in to a machine made for it, which goes with the session"),
    "scale": ("scale:scale", "Change how many machines an app has, and their size"),
    "regions": ("regions:regions", "Add, remove and list the regions that an app runs in"),
    "secrets": ("secrets:secrets", "Set, list and unset an app's secrets"),
    "certs": ("certs:certs", "Add host names of your own, check and remove them"),
    "ips": ("ips:ips", "List, allocate and release an app's addresses"),
    "releases": ("releases:releases", "List an app's releases"),
    "config": ("config:config", "Check and show fly.toml"),
    "orgs": ("orgs:orgs", "List orgs, and whose replays reach their apps"),
    "auth": ("auth:auth", "Log in, log out, show who you are"),
    "tokens": ("auth:tokens", "Make, list and revoke tokens for programs"),
    "platform": ("platform:platform", "Regions and machine sizes"),
    "host": ("hosts:host", "The platform's servers: invite, join, list"),
    "up": ("host:up", "Start a platform in a box on this machine"),
    "down": ("host:down", "Stop the box"),
    "box": ("host:box", "Look into the box: run a command as a client, show its state"),
    "doctor": ("host:doctor", "Check what this machine can do and what is wrong"),
    "images": ("host:images", "Base images for places without a container registry"),
    "audit": ("audit:audit", "Who did what; and what belongs to nobody"),
    "version": ("version:version", "Show the version"),
}
"""Command to `module:attribute` below `pantala.cli.commands`, and its line in the list."""

ALIASES = {
    "ip": "ips",
    "cert": "certs",
    "certificates": "certs",
    "machines": "machine",
    "m": "machine",
    "app": "apps",
    "org": "orgs",
    "secret": "secrets",
    "release": "releases",
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        target = COMMANDS.get(ALIASES.get(cmd_name, cmd_name))
        if target is None:
            return None
        module, _, attribute = target[0].partition(":")
        loaded = importlib.import_module(f"pantala.cli.commands.{module}")
        return cast("click.Command", getattr(loaded, attribute))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], [*COMMANDS, *ALIASES], n=1)
            if near:
                raise click.UsageError(f"{error.message} Did you mean {near[0]}?", ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, so that `--help` loads no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Your own Fly.io on your own servers.",
)
@click.version_option(__version__, "-v", "--version", prog_name="pantala", message="%(prog)s %(version)s")
def cli() -> None:
    """Commands take flags as flyctl does: -a/--app, -c/--config, -j/--json, -y/--yes."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run; errors become one message on stderr and a non-zero exit code."""
    try:
        code: Any = cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    except PantalaError as error:
        from pantala.cli.output import show_error

        show_error(error)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
