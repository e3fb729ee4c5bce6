"""`pantala logs`."""

from __future__ import annotations

import click
import msgspec

from pantala.cli.output import emit
from pantala.cli.session import api, app_options, json_option, resolve_app, run
from pantala.wire.api import LogLine


@click.command()
@app_options
@click.option("-i", "--instance", "--machine", "machine_id", metavar="ID", help="Only this machine.")
@click.option("-n", "--no-tail", is_flag=True, help="Show what there is and stop.")
@json_option
def logs(
    *, app_name: str | None, config_path: str | None, machine_id: str | None, no_tail: bool, as_json: bool
) -> None:
    """Show an app's log and follow it."""
    name = resolve_app(app_name, config_path)

    def show(line: LogLine) -> None:
        if as_json:
            emit(msgspec.json.encode(line).decode())
        else:
            emit(
                f"{line.timestamp[:23]} {line.provider}[{line.instance[:14]}] {line.region} "
                f"[{line.level}] {line.message}"
            )

    async def main() -> None:
        async with api() as client:
            answer = await client.logs(name, machine_id=machine_id)
            for line in answer.lines:
                show(line)
            if not no_tail:
                async for line in client.follow_logs(name, machine_id=machine_id, next_token=answer.next_token):
                    show(line)

    run(main)
