"""`pantala version`."""

from __future__ import annotations

import click

from pantala import __version__
from pantala.cli.output import emit, emit_json
from pantala.cli.session import json_option


@click.command()
@json_option
def version(*, as_json: bool) -> None:
    """Show the version."""
    if as_json:
        emit_json({"name": "pantala", "version": __version__})
    else:
        emit(f"pantala {__version__}")
