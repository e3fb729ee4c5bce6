"""`pantala scale`."""

from __future__ import annotations

import click
import msgspec

from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest, PantalaError


@click.group()
def scale() -> None:
    """Change how many machines an app has."""


@scale.command()
@click.argument("counts", nargs=-1, required=True, metavar="COUNT | GROUP=COUNT...")
@app_options
@click.option("-r", "--region", "regions", multiple=True, metavar="CODE[,CODE]", help="Spread over these regions.")
@click.option("--process-group", metavar="GROUP")
@yes_option
def count(
    *,
    counts: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    regions: tuple[str, ...],
    process_group: str | None,
    yes: bool,
) -> None:
    """Make it COUNT machines, cloned from one that is there."""
    from pantala.planner.scale import plan_scale
    from pantala.wire.api import LaunchMachineRequest

    name = resolve_app(app_name, config_path)
    wanted = [_parse(text, process_group) for text in counts]
    where = [region for item in regions for region in item.split(",") if region]

    async def main() -> None:
        async with api() as client:
            machines = await client.machines(name)
            plans = [
                plan_scale(machines=machines, group=group, count=number, regions=where, primary_region="")
                for group, number in wanted
            ]
            for line in (line for plan in plans for line in plan.lines()):
                say(f"  {line}")
            if not any(plan.add or plan.remove for plan in plans):
                return
            confirm(f"Scale {name}?", yes=yes)
            for plan in plans:
                made: list[str] = []
                try:
                    for region in plan.add:
                        config = msgspec.structs.replace(plan.model.config, mounts=None) if plan.model.config else None
                        if config is None:
                            raise InvalidRequest("the machine to clone is not in reach", field="count")
                        machine = await client.create_machine(name, LaunchMachineRequest(config=config, region=region))
                        made.append(machine.id)
                        say(f"  created {machine.id} in {machine.region}")
                except PantalaError:
                    for machine_id in made:  # all or nothing
                        await client.destroy(name, machine_id, force=True)
                    raise
                for machine_id in plan.remove:
                    await client.destroy(name, machine_id, force=True)
                    say(f"  destroyed {machine_id}")

    run(main)


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
