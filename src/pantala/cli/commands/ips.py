"""`pantala ips`: the addresses at which an app is reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pantala.cli.groups import CommandGroup
from pantala.cli.output import emit, emit_json, emit_table, say
from pantala.cli.session import api, app_options, json_option, resolve_app, run

if TYPE_CHECKING:
    from pantala.wire.addresses import AllocateRequest, Assignment

region_option = click.option("-r", "--region", metavar="CODE", help="Accepted for compatibility: addresses are global.")


@click.group(cls=CommandGroup)
def ips() -> None:
    """List, allocate and release an app's addresses."""


@ips.command(name="list")
@app_options
@json_option
def list_addresses(*, app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """List an app's addresses."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            found = await client.addresses(name)
        if as_json:
            emit_json(found)
            return
        rows = [(_version(one), one.ip, _type(one), one.region, one.created_at) for one in found]
        emit_table(
            ("VERSION", "IP", "TYPE", "REGION", "CREATED AT"), rows, empty=f"{name} has no addresses of its own."
        )

    run(main)


@ips.command(name="allocate-v4")
@click.option("--shared", is_flag=True, help="One that apps share; they are told apart by name.")
@region_option
@click.option("-y", "--yes", is_flag=True, help="Accepted for compatibility: nothing is charged.")
@app_options
@json_option
def allocate_v4(
    *, shared: bool, region: str | None, yes: bool, app_name: str | None, config_path: str | None, as_json: bool
) -> None:
    """Allocate an IPv4 address."""
    from pantala.wire.addresses import AllocateRequest

    del region, yes
    request = AllocateRequest(type="shared_v4" if shared else "v4")
    _allocate(resolve_app(app_name, config_path), request, as_json=as_json)


@ips.command(name="allocate-v6")
@click.option("--private", is_flag=True, help="A Flycast address, for machines of a private network only.")
@click.option(
    "--network", default="", metavar="NAME", help="Whose machines reach it; the app's own network by default."
)
@click.option("-o", "--org", default="", metavar="SLUG", help="The organization of that network.")
@region_option
@app_options
@json_option
def allocate_v6(
    *,
    private: bool,
    network: str,
    org: str,
    region: str | None,
    app_name: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Allocate an IPv6 address."""
    from pantala.wire.addresses import AllocateRequest

    del region
    request = AllocateRequest(type="private_v6" if private else "v6", network=network, org_slug=org)
    _allocate(resolve_app(app_name, config_path), request, as_json=as_json)


@ips.command()
@click.argument("addresses", nargs=-1, required=True, metavar="IP...")
@app_options
@json_option
def release(*, addresses: tuple[str, ...], app_name: str | None, config_path: str | None, as_json: bool) -> None:
    """Give addresses back."""
    name = resolve_app(app_name, config_path)

    async def main() -> None:
        async with api() as client:
            for address in addresses:
                await client.release_address(name, address)
                say(f"Released {address} from {name}")
        if as_json:
            emit_json({"released": addresses})

    run(main)


def _allocate(name: str, request: AllocateRequest, *, as_json: bool) -> None:
    async def main() -> None:
        async with api() as client:
            given = await client.allocate_address(name, request)
        if as_json:
            emit_json(given)
        else:
            emit(given.ip)

    run(main)


def _version(one: Assignment) -> str:
    return "v6" if ":" in one.ip else "v4"


def _type(one: Assignment) -> str:
    if one.shared:
        return "public shared"
    return "private" if one.ip.startswith("fdaa:") else "public"
