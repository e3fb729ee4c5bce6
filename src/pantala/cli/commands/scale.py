"""`pantala scale`: how many machines, and how large."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, interruptible, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest, PantalaError

if TYPE_CHECKING:
    from pantala.client.api import ApiClient
    from pantala.planner.scale import ScalePlan


@click.group(cls=CommandGroup)
def scale() -> None:
    """Change how many machines an app has, and their size."""


@scale.command()
@click.argument("counts", nargs=-1, required=True, metavar="COUNT | GROUP=COUNT...")
@app_options
@click.option("-r", "--region", "regions", multiple=True, metavar="CODE[,CODE]",
              help="Be in these regions and no other, evenly.")  # fmt: skip
@click.option("--max-per-region", type=click.IntRange(min=1), metavar="N")
@click.option("--process-group", metavar="GROUP")
@yes_option
@json_option
def count(
    *,
    counts: tuple[str, ...],
    app_name: str | None,
    config_path: str | None,
    regions: tuple[str, ...],
    max_per_region: int | None,
    process_group: str | None,
    yes: bool,
    as_json: bool,
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
            await carry_out(client, name, plans, question=f"Scale {name}?", yes=yes, as_json=as_json)

    run(main)


async def carry_out(
    client: ApiClient, name: str, plans: Sequence[ScalePlan], *, question: str, yes: bool, as_json: bool
) -> None:
    """Show the plans, ask, do them; in JSON the machines that there are then."""
    from pantala.deploys.scaling import Scaling

    for line in (line for plan in plans for line in plan.lines()):
        say(line)
    if any(plan.changes for plan in plans):
        confirm(question, yes=yes)
        await Scaling(client, name, say=say).run(plans)
    if as_json:
        emit_json(await client.machines(name))


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


group_option = click.option("-g", "--group", "--process-group", metavar="GROUP", help="Where there are several.")


@scale.command()
@click.argument("size", metavar="SIZE")
@app_options
@group_option
@click.option("--memory", "--vm-memory", "memory_mb", type=click.IntRange(min=1), metavar="MB",
              help="Instead of what they have, as far as the size allows it.")  # fmt: skip
@yes_option
@json_option
def vm(
    *,
    size: str,
    app_name: str | None,
    config_path: str | None,
    group: str | None,
    memory_mb: int | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Give the machines another SIZE (`pantala platform vm-sizes` lists them), one after the other."""
    name = resolve_app(app_name, config_path)
    resize(name, config_path, group=group, size=size, memory_mb=memory_mb, yes=yes, as_json=as_json)


@scale.command()
@click.argument("memory_mb", metavar="MB", type=click.IntRange(min=1))
@app_options
@group_option
@yes_option
@json_option
def memory(
    *, memory_mb: int, app_name: str | None, config_path: str | None, group: str | None, yes: bool, as_json: bool
) -> None:
    """Give the machines other memory, in MB, one after the other; they keep their CPUs."""
    name = resolve_app(app_name, config_path)
    resize(name, config_path, group=group, size=None, memory_mb=memory_mb, yes=yes, as_json=as_json)


def resize(
    name: str,
    config_path: str | None,
    *,
    group: str | None,
    size: str | None,
    memory_mb: int | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Show what will change, ask, and make it a release of its own; in JSON the machines that there are then."""
    from pantala.deploys.executor import Executor, Settings
    from pantala.domain import guests
    from pantala.planner.resize import plan_resize
    from pantala.wire.api import CreateReleaseRequest

    if size is not None:
        guests.preset(size, field="SIZE")  # told before anything is asked of the platform

    async def main() -> None:
        async with api() as client:
            machines = await client.machines(name)
            wanted = plan_resize(machines=machines, group=group, size=size, memory_mb=memory_mb)
            for line in wanted.lines():
                say(line)
            if not wanted.changes:
                say("Nothing to do.")
                if as_json:
                    emit_json(machines)
                return
            confirm(f"Resize {name}?", yes=yes)
            image = next(change.config.image or "" for change in wanted.changes)
            what = f"scale {'vm' if size is not None else 'memory'}"
            release = await client.create_release(name, CreateReleaseRequest(image=image, description=what))
            metadata = {"fly_release_id": release.id, "fly_release_version": str(release.version)}
            async with interruptible():
                executor = Executor(client, name, release, settings=Settings(), say=say)
                await executor.run(wanted.plan(metadata), machines)
            say(f"==> v{release.version} is live")
            if _file_has_sizes(name, config_path):
                say("fly.toml has [[vm]]: the next deploy gives machines the size that stands there")
            if as_json:
                emit_json(await client.machines(name))

    run(main)


def _file_has_sizes(name: str, config_path: str | None) -> bool:
    """Whether the app's fly.toml, where it is at hand, names sizes: `[[vm]]` goes before what machines have."""
    from pantala.appconfig.load import find_config, load

    path = find_config(Path.cwd(), config_path)
    if path is None:
        return False
    try:
        config = load(path).config
    except PantalaError:
        return False
    return config.app == name and bool(config.vms)


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
