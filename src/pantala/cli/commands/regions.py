"""`pantala regions`: where an app's machines are. The original dropped these commands; many texts still show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from pantala.cli.commands.scale import carry_out, known_regions
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit_json, emit_table
from pantala.cli.session import api, app_options, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pantala.wire.machine import Machine

codes_argument = click.argument("codes", nargs=-1, required=True, metavar="CODE...")
group_option = click.option("--group", metavar="GROUP", help="Only this process group; default all.")


@click.group(cls=CommandGroup)
def regions() -> None:
    """Add, remove and list the regions that an app runs in."""


@regions.command()
@codes_argument
@app_options
@group_option
@yes_option
@json_option
def add(
    *,
    codes: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    group: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Run in CODE too: a machine in each region that has none; shows the plan first."""
    from pantala.planner.scale import plan_add

    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            where = await known_regions(client, codes)
            machines = await client.machines(name)
            groups = [group] if group else _groups(machines) or ["app"]
            plans = [plan_add(machines=machines, group=each, regions=where) for each in groups]
            question = f"Add {', '.join(where)} to {name}?"
            await carry_out(client, name, plans, question=question, yes=yes, as_json=as_json)

    run(main)


@regions.command()
@codes_argument
@app_options
@group_option
@yes_option
@json_option
def remove(
    *,
    codes: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    group: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Leave CODE: the machines there are destroyed; shows the plan first."""
    from pantala.planner.scale import plan_remove

    name = resolve_app(app_name, config_path)
    where = [code for item in codes for code in item.split(",") if code]

    async def main() -> None:
        async with api() as client:
            machines = await client.machines(name)
            groups = [group] if group else _groups(machines)
            found = [plan_remove(machines=machines, group=each, regions=where) for each in groups]
            plans = [plan for plan in found if plan is not None]
            if not any(plan.changes for plan in plans):
                here = ", ".join(sorted({region for plan in plans for region in plan.before})) or "no region"
                raise InvalidRequest(f"{name} has no machine in {', '.join(where)}; it runs in {here}", field="region")
            question = f"Remove {', '.join(where)} from {name}?"
            await carry_out(client, name, plans, question=question, yes=yes, as_json=as_json)

    run(main)


@regions.command("list")
@app_options
@json_option
def list_regions(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List the app's regions with their machines."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            machines = await client.machines(name)
        rows = [
            _row(region, [m for m in machines if m.region == region]) for region in sorted({m.region for m in machines})
        ]
        if as_json:
            emit_json(rows)
        else:
            table = [(row.region, row.machines, row.started, ", ".join(row.groups)) for row in rows]
            emit_table(("REGION", "MACHINES", "STARTED", "GROUPS"), table, empty=f"{name} has no machines.")

    run(main)


def _groups(machines: Sequence[Machine]) -> list[str]:
    from pantala.planner.deploy import group_of

    return sorted({group_of(machine) for machine in machines})


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    region: str
    machines: int
    started: int
    groups: list[str]


def _row(region: str, here: Sequence[Machine]) -> _Row:
    return _Row(
        region=region,
        machines=len(here),
        started=sum(machine.state == "started" for machine in here),
        groups=_groups(here),
    )
