"""`pantala apps`, `pantala open`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from pantala.cli.context import load_config
from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, confirm, json_option, resolve_app, run, yes_option
from pantala.errors import InvalidRequest
from pantala.kit.ids import generated_name

if TYPE_CHECKING:
    from pantala.client.api import ApiClient


@click.group(cls=CommandGroup)
def apps() -> None:
    """Create, list and destroy apps."""


@apps.command()
@click.argument("name", required=False)
@click.option("--name", "named", metavar="NAME")
@click.option("--generate-name", is_flag=True, help="Let Pantala choose a name.")
@click.option("-o", "--org", metavar="SLUG")
@json_option
def create(*, name: str | None, named: str | None, generate_name: bool, org: str | None, as_json: bool) -> None:
    """Create an app without deploying anything."""
    chosen = name or named or (generated_name() if generate_name else None)
    if not chosen:
        raise InvalidRequest("a name is needed", field="NAME", hint="give one, or --generate-name")

    async def main() -> None:
        async with api() as client:
            slug = org or await default_org(client)
            app = await client.create_app(chosen, slug)
        if as_json:
            emit_json(app)
        else:
            say(f"New app created: {app.name}")

    run(main)


@apps.command(name="list")
@click.option("-o", "--org", metavar="SLUG")
@click.option("-q", "--quiet", is_flag=True, help="Names only.")
@json_option
def list_apps(*, org: str | None, quiet: bool, as_json: bool) -> None:
    """List apps."""

    async def main() -> None:
        async with api() as client:
            slugs = [org] if org else [o.slug for o in (await client.user()).orgs]
            found = [(slug, app) for slug in slugs for app in await client.apps(slug)]
        if as_json:
            emit_json([app for _, app in found])
        elif quiet:
            for _, app in found:
                emit(app.name)
        else:
            rows = [(app.name, slug, app.status, app.machine_count) for slug, app in found]
            emit_table(("NAME", "ORG", "STATUS", "MACHINES"), rows, empty="There are no apps yet.")

    run(main)


@apps.command()
@click.argument("names", nargs=-1, required=True)
@yes_option
@json_option
def destroy(*, names: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Destroy apps with their machines, secrets and releases."""
    confirm(f"Destroy {', '.join(names)}? This cannot be undone.", yes=yes)

    async def main() -> None:
        async with api() as client:
            for name in names:
                await client.delete_app(name)
                say(f"Destroyed app {name}")
        if as_json:
            emit_json({"destroyed": names})

    run(main)


@click.command(name="open")
@click.argument("path", default="/")
@app_options
@json_option
def open_app(*, path: str, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Print the app's address, and open it where there is a browser."""
    name = resolve_app(app_name, config_path)

    async def main() -> str:
        async with api() as client:
            return (await client.app(name)).hostname

    url = f"https://{run(main)}/{path.lstrip('/')}"
    if as_json:
        emit_json({"url": url})
        return
    emit(url)
    if sys.stdout.isatty():
        click.launch(url)
    config = load_config()
    if config.ca_file:
        say(f"  certificates of this box: {config.ca_file}; its address: {config.edge}")


async def default_org(client: ApiClient) -> str:
    """The box's organisation, or the only one there is."""
    if known := load_config().org:
        return known
    orgs = (await client.user()).orgs
    if len(orgs) == 1:
        return orgs[0].slug
    raise InvalidRequest(f"you belong to {', '.join(o.slug for o in orgs) or 'no organisation'}", field="--org")
