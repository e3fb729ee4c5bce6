"""`pantala host`: the servers of the platform. What runs on a server itself (`init`, `join`, `run`) is loaded by name
when it is asked for: the CLI knows neither control plane nor agent.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import click

from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, confirm, json_option, run, yes_option
from pantala.errors import InvalidRequest

if TYPE_CHECKING:
    from pantala.client.api import ApiClient
    from pantala.wire.escape import EscapeReport
    from pantala.wire.hosts import HostDeparture, HostView

WATCH_EVERY_S = 1.0
WATCH_LOOKS_MAX = 3600

ON_THE_HOST = {
    "init": "Make this server the first host of a new platform",
    "join": "Make this server a host of a platform, with a token of it",
    "leave": "Take the platform off this server",
    "replace": "Put a new proxy in the place of this host's running one; no request is lost",
    "run": "Run this host's processes (systemd calls it)",
}
"""Commands of `pantala.host.commands`, and their lines in the list."""


class HostGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_on_the_host()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _on_the_host():
            return super().get_command(ctx, cmd_name)
        commands = importlib.import_module("pantala.host.commands")
        return cast("click.Command", getattr(commands, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table, so that `--help` loads nothing."""
        rows = [(name, command.get_short_help_str(80)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl([*rows, *_on_the_host().items()])


def _on_the_host() -> dict[str, str]:
    """Nothing where the distribution was installed without what runs on servers."""
    return ON_THE_HOST if importlib.util.find_spec("pantala.host") is not None else {}


@click.group(cls=HostGroup)
def host() -> None:
    """The servers of the platform: invite, list, drain, remove, join."""


@host.command()
@click.option("--region", default="", metavar="CODE", help="Where the new host is, such as iad.")
@click.option("--expires", default="1h", show_default=True, metavar="DURATION", help="How long the token is good.")
@json_option
def token(region: str, expires: str, *, as_json: bool) -> None:
    """Make a one-time token and print the line to run on the new host."""
    from pantala.kit.units import parse_go_duration
    from pantala.wire.hosts import CreateHostTokenRequest

    try:
        expires_in_s = int(parse_go_duration(expires))
    except ValueError as error:
        raise InvalidRequest(str(error), field="--expires") from error
    request = CreateHostTokenRequest(region=region, expires_in_s=expires_in_s)

    async def main() -> None:
        async with api() as client:
            made = await client.create_host_token(request)
        if as_json:
            emit_json(made)
            return
        say(f"Run this on the new host, before {made.expires_at}; the token works once:")
        emit(join_line(made.token, region))

    run(main)


def join_line(text: str, region: str) -> str:
    """What the operator copies; what only they know stays a placeholder in capitals."""
    return f"pantala host join {shlex.quote(text)} --region {region or 'REGION'} --address ADDRESS"


@host.command("list")
@json_option
def list_hosts(*, as_json: bool) -> None:
    """List the hosts, with what each has free."""

    async def main() -> None:
        async with api() as client:
            hosts = await client.hosts()
        if as_json:
            emit_json(hosts)
        else:
            headers = ("HOST", "REGION", "ADDRESS", "STATUS", "EDGE", "MACHINES", "CPUS", "MEMORY FREE", "VERSION")
            emit_table(headers, _table(hosts), empty="There are no hosts.")

    run(main)


@host.command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let the host take machines again.")
@click.option("--detach", is_flag=True, help="Do not wait until the machines are gone.")
@json_option
def drain(node: str, *, undo: bool, detach: bool, as_json: bool) -> None:
    """Move a host's machines to others, one by one; it takes no new ones.

    The platform goes on with it when this command ends.
    """

    async def main() -> None:
        async with api() as client:
            seen = await client.drain_host(node, undo=undo)
            if undo:
                say(f"{node} takes machines again.")
            elif not detach:
                seen = await _watch(client, seen)
        if as_json:
            emit_json(seen)
        elif not undo:
            _tell_rest(seen)

    run(main)


@host.command(name="escape-suite")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@click.option("--last", is_flag=True, help="Show what became of the last one; run nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Also the attempts that held, with the errno of each refusal.")
@json_option
def escape_suite(nodes: tuple[str, ...], *, last: bool, verbose: bool, as_json: bool) -> None:
    """Try to get out of a machine of these hosts (default: all), in every known way.

    Each host makes a machine for it, like any other, for some seconds. Ends with 1 when an attempt got through. What
    became of it is shown with each machine: pantala machine status ID --display-config.
    """

    async def main() -> bool:
        async with api() as client:
            wanted = nodes or [one.id for one in await client.hosts() if one.status in ("active", "draining")]
            reports: list[EscapeReport] = []
            for node in wanted:
                if not last and not as_json:
                    say(f"{node}: trying to get out…")
                reports.append(await client.escape_suite(node, run=not last))
        if as_json:
            emit_json(reports)
        else:
            for report in reports:
                _tell_escapes(report, verbose=verbose)
        return any(report.suite is not None and report.suite.through for report in reports)

    if run(main):
        raise click.exceptions.Exit(1)


def _tell_escapes(report: EscapeReport, *, verbose: bool) -> None:
    from pantala.cli.commands.machine_status import escape_line

    emit(f"{report.host}: {escape_line(report.suite)}")
    told = [one for one in report.attempts if verbose or one.outcome in ("through", "unclear")]
    if told:
        rows = [(one.name, one.outcome.replace("_", " "), one.detail) for one in told]
        emit_table(("ATTEMPT", "OUTCOME", "HOW"), rows, empty="")


@host.command()
@click.argument("node")
@click.option("--force", is_flag=True, help="Also while machines are on it; they are treated as lost.")
@yes_option
@json_option
def remove(node: str, *, force: bool, yes: bool, as_json: bool) -> None:
    """Take a host out of the platform for good."""
    confirm(f"Remove {node} for good? A host with this id never comes back.", yes=yes)

    async def main() -> None:
        async with api() as client:
            seen = await client.remove_host(node, force=force)
        _tell_gone(seen, "was removed", as_json=as_json)

    run(main)


@host.command()
@click.argument("node")
@yes_option
@json_option
def lost(node: str, *, yes: bool, as_json: bool) -> None:
    """Declare a host lost: its machines without volumes come back on other hosts.

    What still runs there stops as soon as the host hears of it, and never starts again.
    """
    confirm(f"Declare {node} lost for good? If it comes back, it has to join as a new host.", yes=yes)

    async def main() -> None:
        async with api() as client:
            seen = await client.lose_host(node)
        _tell_gone(seen, "is lost", as_json=as_json)

    run(main)


async def _watch(client: ApiClient, seen: HostDeparture) -> HostDeparture:
    """Says what moves, until nothing is left or what is left stays."""
    import anyio

    told: dict[str, str] = {}
    for _ in range(WATCH_LOOKS_MAX):
        here = {machine.id: machine for machine in seen.machines}
        for machine_id in [machine_id for machine_id in told if machine_id not in here]:
            say(f"{machine_id}: moved")
            del told[machine_id]
        for machine in here.values():
            line = f"moving to {machine.target}" if machine.state == "moving" else machine.reason
            if line and told.get(machine.id) != line:
                say(f"{machine.id} ({machine.app}): {line}")
            told[machine.id] = line
        if all(machine.state == "stays" for machine in seen.machines):
            break
        await anyio.sleep(WATCH_EVERY_S)
        seen = await client.host_departure(seen.host)
    return seen


def _tell_rest(seen: HostDeparture) -> None:
    if not seen.machines:
        say(f"No machine is left on {seen.host}.")
        return
    rows = [(machine.id, machine.app, machine.region, machine.state, machine.reason) for machine in seen.machines]
    emit_table(("MACHINE", "APP", "REGION", "STATE", "WHY"), rows, empty="")


def _tell_gone(seen: HostDeparture, what: str, *, as_json: bool) -> None:
    if as_json:
        emit_json(seen)
        return
    stay = [machine for machine in seen.machines if machine.state == "stays"]
    coming = len(seen.machines) - len(stay)
    say(f"{seen.host} {what}; {coming} of its machines come back on other hosts.")
    for machine in stay:
        say(f"{machine.id} ({machine.app}) does not: {machine.reason}")


def _table(hosts: Sequence[HostView]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for one in hosts:
        silent = one.status in ("active", "draining") and not one.reachable
        memory = f"{one.memory_mib_free} of {one.memory_mib} MiB" if one.reachable else ""
        rows.append(
            (
                one.id,
                one.region,
                one.address,
                f"{one.status}, does not answer" if silent else one.status,
                "yes" if one.edge else "no",
                one.machines,
                one.cpus or "",
                memory,
                one.version,
            )
        )
    return rows
