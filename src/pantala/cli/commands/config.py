"""`pantala config`: fly.toml, checked and shown."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, say
from pantala.cli.session import config_option, json_option
from pantala.errors import InvalidRequest


@click.group(cls=CommandGroup)
def config() -> None:
    """Check and show fly.toml."""


@config.command()
@config_option
@click.option("-s", "--strict", is_flag=True, help="Refuse unknown keys.")
@json_option
def validate(*, config_path: str | None, strict: bool, as_json: bool) -> None:
    """Check fly.toml."""
    from pantala.appconfig.load import find_config, load

    path = find_config(Path.cwd(), config_path)
    if path is None:
        raise InvalidRequest(f"there is no fly.toml in {Path.cwd()}", hint="name it with -c PATH")
    loaded = load(path)
    bad = [f for f in loaded.findings if f.level == "error" or (strict and f.unknown)]
    if as_json:
        emit_json({"valid": not bad, "findings": loaded.findings})
    else:
        for finding in loaded.findings:
            level = "error" if finding in bad else finding.level
            say(f"{level}: {finding.text(path.name)}")
        if bad:
            say("App configuration is not valid")
        else:
            emit("✓ Configuration is valid")
    sys.exit(1 if bad else 0)


@config.command()
@config_option
@json_option
def show(*, config_path: str | None, as_json: bool) -> None:
    """Show fly.toml as JSON, unknown keys included."""
    from pantala.appconfig.load import find_config, load

    path = find_config(Path.cwd(), config_path)
    if path is None:
        raise InvalidRequest(f"there is no fly.toml in {Path.cwd()}", hint="name it with -c PATH")
    del as_json  # it is nothing else anyway
    emit_json(load(path).config.document)
