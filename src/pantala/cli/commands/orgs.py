"""`pantala orgs`: one's orgs, and whose `fly-replay` reaches their apps. Subcommands and `--json` as in flyctl."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pantala.cli.commands.apps import default_org
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, confirm, json_option, run, yes_option

if TYPE_CHECKING:
    from pantala.wire.api import ReplayRules, UpdateReplayRules

org_option = click.option("-o", "--org", metavar="SLUG", help="The org (else that of the login).")
slugs_argument = click.argument("slugs", nargs=-1, required=True, metavar="SLUG...")


@click.group(cls=CommandGroup)
def orgs() -> None:
    """List orgs, and whose replays reach their apps."""


@orgs.command("list")
@json_option
def list_orgs(*, as_json: bool) -> None:
    """List the orgs you belong to."""

    async def main() -> None:
        async with api() as client:
            mine = (await client.user()).orgs
        if as_json:
            emit_json(mine)
        else:
            emit_table(("NAME", "SLUG"), [(org.name, org.slug) for org in mine], empty="You belong to no org.")

    run(main)


@orgs.group("replay-sources", cls=CommandGroup)
def replay_sources() -> None:
    """Other orgs whose apps may replay requests to this one's."""


@replay_sources.command("list")
@org_option
@json_option
def list_sources(org: str | None, *, as_json: bool) -> None:
    """List the orgs whose apps may replay requests to this one's."""
    slug, rules = run(lambda: _rules(org))
    if as_json:
        emit_json(rules.sources)
    elif rules.sources:
        emit("\n".join(rules.sources))
    else:
        say(f"No other org may replay requests to the apps of {slug}.")


@replay_sources.command()
@slugs_argument
@org_option
@json_option
def add(slugs: tuple[str, ...], org: str | None, *, as_json: bool) -> None:
    """Let apps of SLUG replay requests to this org's apps. You must belong to both."""
    from pantala.wire.api import UpdateReplayRules

    slug, rules = run(lambda: _update(org, UpdateReplayRules(add=list(slugs))))
    say(f"Apps of {', '.join(slugs)} may now replay requests to those of {slug}.")
    if as_json:
        emit_json(rules.sources)


@replay_sources.command()
@slugs_argument
@org_option
@yes_option
@json_option
def remove(slugs: tuple[str, ...], org: str | None, *, yes: bool, as_json: bool) -> None:
    """Let apps of SLUG no longer replay requests to this org's apps."""
    from pantala.wire.api import UpdateReplayRules

    confirm(f"Refuse replays from {', '.join(slugs)}? Requests that rely on them will fail.", yes=yes)
    slug, rules = run(lambda: _update(org, UpdateReplayRules(remove=list(slugs))))
    say(f"Apps of {', '.join(slugs)} may no longer replay requests to those of {slug}.")
    if as_json:
        emit_json(rules.sources)


@orgs.group("cross-network-replays", cls=CommandGroup)
def cross_network_replays() -> None:
    """Replays between this org's private networks."""


@cross_network_replays.command()
@org_option
@json_option
def status(org: str | None, *, as_json: bool) -> None:
    """Show whether apps may replay requests to other networks of the org."""
    slug, rules = run(lambda: _rules(org))
    if as_json:
        _emit_networks(rules)
    else:
        emit(f"Replays between the networks of {slug} are {'allowed' if rules.cross_network else 'refused'}.")


@cross_network_replays.command()
@org_option
@yes_option
@json_option
def enable(org: str | None, *, yes: bool, as_json: bool) -> None:
    """Let apps replay requests to other networks of the org."""
    question = "Let all apps of the org replay requests into each other's networks?"
    _switch(org, allowed=True, question=question, yes=yes, as_json=as_json)


@cross_network_replays.command()
@org_option
@yes_option
@json_option
def disable(org: str | None, *, yes: bool, as_json: bool) -> None:
    """Keep replays within a network."""
    question = "Refuse replays between networks? Requests that rely on them fail."
    _switch(org, allowed=False, question=question, yes=yes, as_json=as_json)


def _switch(org: str | None, *, allowed: bool, question: str, yes: bool, as_json: bool) -> None:
    from pantala.wire.api import UpdateReplayRules

    confirm(question, yes=yes)
    slug, rules = run(lambda: _update(org, UpdateReplayRules(cross_network=allowed)))
    say(f"Replays between the networks of {slug} are now {'allowed' if allowed else 'refused'}.")
    if as_json:
        _emit_networks(rules)


def _emit_networks(rules: ReplayRules) -> None:
    emit_json({"allowAllCrossNetworkReplays": rules.cross_network})


async def _rules(org: str | None) -> tuple[str, ReplayRules]:
    async with api() as client:
        slug = org or await default_org(client)
        return slug, await client.replay_rules(slug)


async def _update(org: str | None, request: UpdateReplayRules) -> tuple[str, ReplayRules]:
    async with api() as client:
        slug = org or await default_org(client)
        return slug, await client.update_replay_rules(slug, request)
