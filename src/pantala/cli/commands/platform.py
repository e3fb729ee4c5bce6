"""`pantala platform`."""

from __future__ import annotations

import click

from pantala.cli.output import emit_json, emit_table
from pantala.cli.session import api, json_option, run


@click.group()
def platform() -> None:
    """Regions of this platform."""


@platform.command()
@json_option
def regions(*, as_json: bool) -> None:
    """List the regions that have hosts."""

    async def main() -> None:
        async with api() as client:
            answer = await client.regions()
        if as_json:
            emit_json(answer)
        else:
            rows = [(r.name, r.code, "yes" if r.code == answer.Nearest else "") for r in answer.Regions]
            emit_table(("NAME", "CODE", "NEAREST"), rows, empty="There are no regions.")

    run(main)
