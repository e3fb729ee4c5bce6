"""`pantala platform`."""

from __future__ import annotations

import click

from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit_json, emit_table
from pantala.cli.session import api, json_option, run


@click.group(cls=CommandGroup)
def platform() -> None:
    """Regions of this platform, and sizes of machines."""


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


@platform.command(name="vm-sizes")
@json_option
def vm_sizes(*, as_json: bool) -> None:
    """List the sizes a machine can have. Built in: nothing is asked of the platform."""
    from pantala.domain import guests

    sizes = [guests.preset(name, field="size") for name in guests.PRESETS]
    most = {size.name: guests.memory_bounds(size.cpu_kind, size.cpus)[1] for size in sizes}
    if as_json:
        emit_json(
            [
                {
                    "name": size.name,
                    "cpu_kind": size.cpu_kind,
                    "cpus": size.cpus,
                    "cpu_baseline": size.cpu_share,
                    "memory_mb": size.memory_mb,
                    "max_memory_mb": most[size.name],
                    "memory_step_mb": guests.MEMORY_STEP_MB,
                }
                for size in sizes
            ]
        )
        return
    rows = [
        (size.name, size.cpus, f"{size.cpu_share:g}", _memory(size.memory_mb), _memory(most[size.name]))
        for size in sizes
    ]
    emit_table(("NAME", "CPU CORES", "ALWAYS", "MEMORY", "UP TO"), rows, empty="")


def _memory(megabytes: int) -> str:
    return f"{megabytes} MB" if megabytes < 1024 or megabytes % 1024 else f"{megabytes // 1024} GB"
