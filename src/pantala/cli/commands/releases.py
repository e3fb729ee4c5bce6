"""`pantala releases`."""

from __future__ import annotations

import click

from pantala.cli.output import emit_json, emit_table
from pantala.cli.session import api, app_options, json_option, resolve_app, run


@click.command()
@app_options
@click.option("--image", "show_image", is_flag=True, help="Show the image of each.")
@json_option
def releases(*, app_name: str | None, config_path: str | None, show_image: bool, as_json: bool) -> None:
    """List an app's releases, newest first."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            found = await client.releases(name)
        if as_json:
            emit_json(found)
            return
        headers = ["VERSION", "STATUS", "DESCRIPTION", "USER", "DATE"] + (["IMAGE"] if show_image else [])
        rows = [
            [f"v{r.version}", r.status, r.reason or r.description, r.user, r.created_at]
            + ([r.image] if show_image else [])
            for r in found
        ]
        emit_table(headers, rows, empty=f"{name} has no releases yet.")

    run(main)
