"""`pantala audit log`: who did what to what, over the API. `audit leaks`, which looks at this machine, is loaded by
name when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, cast

import click

from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import api, json_option, run
from pantala.errors import InvalidRequest

if TYPE_CHECKING:
    from pantala.wire.audit import AuditEntry

PAGE_MAX = 1000


class AuditGroup(click.Group):
    """With what only a machine that can be a host has."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(["leaks"] if _is_host_capable() else [])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "leaks" or not _is_host_capable():
            return super().get_command(ctx, cmd_name)
        commands = importlib.import_module("pantala.box.commands")
        return cast("click.Command", commands.audit.commands["leaks"])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From what is here, so that `--help` loads nothing."""
        rows = [(name, command.get_short_help_str(80)) for name, command in sorted(self.commands.items())]
        leaks = [("leaks", "Find what belongs to no machine and no box on this server")]
        with formatter.section("Commands"):
            formatter.write_dl([*(leaks if _is_host_capable() else []), *rows])


def _is_host_capable() -> bool:
    return importlib.util.find_spec("pantala.box") is not None


@click.group(cls=AuditGroup)
def audit() -> None:
    """Who did what; and what belongs to nobody."""


@audit.command()
@click.option("-a", "--app", "app_name", default="", metavar="NAME", help="Only this app and its parts.")
@click.option("-o", "--org", "org_slug", default="", metavar="SLUG", help="Only this org.")
@click.option("--since", default="", metavar="DURATION", help="How long ago at most, such as 1h. Default: all.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many at most.")
@json_option
def log(*, app_name: str, org_slug: str, since: str, limit: int, as_json: bool) -> None:
    """Show the audit log, newest first: logins to machines, tokens, secrets, changes of apps, machines and hosts.

    Members see what happened in their orgs, operators everything. What was refused is not in it.
    """
    from pantala.kit.units import parse_go_duration

    try:
        since_s = parse_go_duration(since) if since else 0.0
    except ValueError as error:
        raise InvalidRequest(str(error), field="--since") from error

    async def main() -> None:
        entries: list[AuditEntry] = []
        cursor = ""
        async with api() as client:
            while len(entries) < limit:
                page = await client.audit(
                    app=app_name,
                    org=org_slug,
                    since_s=since_s,
                    limit=min(limit - len(entries), PAGE_MAX),
                    cursor=cursor,
                )
                entries += page.entries
                cursor = page.next_cursor
                if not cursor:
                    break
        if as_json:
            emit_json(entries)
            return
        rows = [
            (one.at, one.actor, one.action, one.target, one.origin or "-", one.outcome, one.org or "-", one.request_id)
            for one in entries
        ]
        headers = ("AT", "WHO", "WHAT", "ON WHAT", "FROM", "OUTCOME", "ORG", "REQUEST")
        emit_table(headers, rows, empty="Nothing is recorded.")
        if cursor:
            say(f"There is more: --limit {limit * 2}")

    run(main)
