"""`pantala scale`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest

if TYPE_CHECKING:
    from pantala.client.api import ApiClient
    from pantala.planner.scale import ScalePlan


@click.group()
def scale() -> None:
    """Change how many machines an app has."""


@scale.command()
@click.argument("counts", nargs=-1, required=True, metavar="COUNT | GROUP=COUNT...")
@app_options
@click.option("-r", "--region", "regions", multiple=True, metavar="CODE[,CODE]",
              help="Be in these regions and no other, evenly.")  # fmt: skip
@click.option("--max-per-region", type=click.IntRange(min=1), metavar="N")
@click.option("--process-group", metavar="GROUP")
@yes_option
def count(
    *,
    counts: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    regions: tuple[str, ...],
    max_per_region: int | None,
    process_group: str | None,
    yes: bool,
) -> None:
    """Make it COUNT machines, cloned from one that is there; shows the plan first."""
    from pantala.planner.scale import plan_scale

    name = resolve_app(app_name, config_path)
    wanted = [_parse(text, process_group) for text in counts]

    async def main() -> None:
        async with api() as client:
            where = await known_regions(client, regions)
            machines = await client.machines(name)
            plans = [
                plan_scale(machines=machines, group=group, count=number, regions=where, max_per_region=max_per_region)
                for group, number in wanted
            ]
            await carry_out(client, name, plans, question=f"Scale {name}?", yes=yes)

    run(main)


async def carry_out(client: ApiClient, name: str, plans: Sequence[ScalePlan], *, question: str, yes: bool) -> None:
    """Show the plans, ask, do them."""
    from pantala.deploys.scaling import Scaling

    for line in (line for plan in plans for line in plan.lines()):
        say(line)
    if any(plan.changes for plan in plans):
        confirm(question, yes=yes)
        await Scaling(client, name, say=say).run(plans)


async def known_regions(client: ApiClient, given: Sequence[str]) -> list[str]:
    """Codes from repeated and comma-separated values. Raises InvalidRequest before anything is planned."""
    codes = [code.strip() for item in given for code in item.split(",") if code.strip()]
    if not codes:
        return []
    there = [region.code for region in (await client.regions()).Regions]
    if unknown := [code for code in codes if code not in there]:
        raise InvalidRequest(
            f"there are no hosts in {', '.join(unknown)}",
            field="region",
            hint=f"regions with hosts: {', '.join(sorted(there))}",
        )
    return list(dict.fromkeys(codes))


@scale.command()
@app_options
@json_option
def show(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Show how many machines each group has, and their size."""
    from pantala.planner.deploy import group_of

    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            machines = await client.machines(name)
        rows: list[dict[str, object]] = []
        for group in sorted({group_of(m) for m in machines}):
            members = [m for m in machines if group_of(m) == group]
            guest = next((m.config.guest for m in members if m.config and m.config.guest), None)
            places = {m.region: sum(o.region == m.region for o in members) for m in members}
            rows.append(
                {
                    "process": group,
                    "count": len(members),
                    "cpu_kind": guest.cpu_kind if guest else None,
                    "cpus": guest.cpus if guest else None,
                    "memory_mb": guest.memory_mb if guest else None,
                    "regions": places,
                }
            )
        if as_json:
            emit_json(rows)
            return
        emit_table(
            ("NAME", "COUNT", "KIND", "CPUS", "MEMORY", "REGIONS"),
            [
                (
                    row["process"],
                    row["count"],
                    row["cpu_kind"],
                    row["cpus"],
                    f"{row['memory_mb']} MB" if row["memory_mb"] else None,
                    ", ".join(f"{region}({number})" for region, number in sorted(places_of(row).items())),
                )
                for row in rows
            ],
            empty=f"{name} has no machines.",
        )

    run(main)


def places_of(row: dict[str, object]) -> dict[str, int]:
    places = row["regions"]
    assert isinstance(places, dict)
    return places


def _parse(text: str, group: str | None) -> tuple[str, int]:
    name, equals, number = text.rpartition("=")
    if not number.isdigit():
        raise InvalidRequest(f"{text!r} is not a number, nor GROUP=NUMBER", field="COUNT")
    return (name if equals else group or "app"), int(number)
