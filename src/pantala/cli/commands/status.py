"""`pantala status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pantala.cli.output import emit, emit_json, emit_table
from pantala.cli.session import api, app_options, json_option, resolve_app, run

if TYPE_CHECKING:
    from pantala.wire.machine import Machine

DAGGER = "†"


@click.command()
@app_options
@json_option
def status(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Show an app and its machines."""
    from pantala.planner.deploy import group_of

    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            app = await client.app(name)
            machines = await client.machines(name)
            releases = await client.releases(name)
        if as_json:
            emit_json({"app": app, "machines": machines, "release": releases[0] if releases else None})
            return
        emit(f"App       {app.name}")
        emit(f"Owner     {app.organization.slug}")
        emit(f"Hostname  https://{app.hostname}/")
        if releases:
            emit(f"Release   v{releases[0].version} ({releases[0].status}) {releases[0].image}")
        emit("")
        rows = [
            (
                group_of(machine) + (DAGGER if machine.config and machine.config.standbys else ""),
                machine.id,
                (machine.config.metadata or {}).get("fly_release_version") if machine.config else None,
                machine.region,
                size_of(machine),
                machine.state + (" (cordoned)" if machine.cordoned else ""),
                checks_summary(list(machine.checks)),
                machine.updated_at,
            )
            for machine in sorted(machines, key=lambda m: (group_of(m), m.region, m.id))
        ]
        headers = ("PROCESS", "ID", "VERSION", "REGION", "SIZE", "STATE", "CHECKS", "LAST UPDATED")
        emit_table(headers, rows, empty="There are no machines yet; `pantala deploy` makes them.")
        if any(str(row[0]).endswith(DAGGER) for row in rows):
            emit(f"\n{DAGGER} Standby machine (it takes over only when the host of a machine it watches is lost)")

    run(main)


def size_of(machine: Machine) -> str | None:
    """`shared-cpu-1x 256 MB`; nothing for a machine that is not in reach."""
    guest = machine.config.guest if machine.config else None
    if guest is None:
        return None
    name = f"shared-cpu-{guest.cpus}x" if guest.cpu_kind == "shared" else f"{guest.cpu_kind}-{guest.cpus}x"
    return f"{name} {guest.memory_mb} MB"


def checks_summary(checks: list[object]) -> str:
    """`2 total, 1 passing, 1 critical`, as the original's status says it."""
    states = [getattr(check, "status", "") for check in checks]
    if not states:
        return ""
    counts = [f"{states.count(state)} {state}" for state in ("passing", "warning", "critical") if state in states]
    return f"{len(states)} total, {', '.join(counts)}"
