"""Writes docs/reference/cli.md from the commands themselves: `python scripts/cli_reference.py [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from pantala.box.layout import RUN_NAME
from pantala.cli.main import ALIASES, cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"

HEAD = """\
# Commands

Written by `scripts/cli_reference.py` from the commands themselves. Data goes to standard output, everything else to
standard error; a refusal is one message and a non-zero exit code. Variables: `FLY_API_TOKEN` or `FLY_ACCESS_TOKEN` wins
over the token of `pantala auth login`, `FLY_FLAPS_BASE_URL` over the API's address, `FLY_APP` over that of fly.toml;
`PANTALA_CONFIG_DIR` is where the login is kept (default `~/.pantala`), `PANTALA_CACHE_DIR` where a box keeps bases and
build caches (default `/var/cache/pantala`), `PANTALA_BIN_DIR` a directory to look for programs first.

For scripts: every command takes `--json` and then writes one JSON document to standard output when it is done (`logs`
one per line), except those that hand on what another program says: `ssh console`, `box at`, `host run`. Questions are
asked on a terminal only; without one a command that would ask is refused and names `--yes`.

| Exit code | Means |
| --- | --- |
| 0 | done |
| 1 | refused or failed: the message says why. Also what a check found: `doctor`, `audit leaks`, `config validate` |
| 2 | the command line is wrong: unknown command or option, missing argument |
| 130 | interrupted |
| 141 | nobody reads its output any more |
| that of the command | `machine exec`, `ssh console` and `box at` end as what they ran (128 + N after signal N) |
"""


def page() -> str:
    sections = [HEAD]
    for name, command, context in commands(cli, click.Context(cli, info_name="pantala")):
        lines = [f"## {name}", ""]
        usage = " ".join(word for word in command.collect_usage_pieces(context) if word != "[OPTIONS]")
        lines += [f"`{name}{' ' + usage if usage else ''}`", "", (command.help or "").strip()]
        options = [
            option_line(option) for option in command.params if isinstance(option, click.Option) and not option.hidden
        ]
        sections.append("\n".join([*lines, "", *options]).rstrip() + "\n")
    other = ", ".join(f"`{alias}` is `{name}`" for alias, name in ALIASES.items())
    sections.append(f"## Other spellings\n\n{other}.\n")
    return "\n".join(sections).replace(f"{RUN_NAME}.", "pantala/box.")  # whatever instance this environment names


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command that does something, with its whole name."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        below = click.Context(command, parent=context, info_name=name)
        if isinstance(command, click.Group):
            yield from commands(command, below)
        else:
            yield below.command_path, command, below


def option_line(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else f" {choices(option)}"
    return f"- {names}{value}{': ' + option.help if option.help else ''}"


def choices(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "|".join(str(choice) for choice in option.type.choices)
    return option.metavar or option.type.name.upper()


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text() == page()
        if not current:
            sys.stderr.write(f"{PAGE} is not current; run python scripts/cli_reference.py\n")
        return 0 if current else 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
